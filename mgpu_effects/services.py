"""The services behind the consumers: settings, drivers, and the orders to load and unload."""

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import TypeAlias

import jmespath
from aiohttp import ClientSession

from mgpu_core.effects import How
from mgpu_core.events import Outcome
from mgpu_effects.calls import CallError, call
from mgpu_effects.drivers import ContainerDriver, Driver, make_driver
from mgpu_effects.following import JobId, follow, result_path
from mgpu_effects.gpu_processes import Owner, owner_of
from mgpu_effects.jobs import Job
from mgpu_effects.probes import ProbeFacts, ReadHolders, is_resident, probe
from mgpu_effects.settings import (
    KILLED_S,
    ConsumerSettings,
    ResidencySettings,
    SchedulerSettings,
    Settings,
)
from mgpu_effects.steps import run_steps
from mgpu_effects.units import is_model_name, units

# Between two questions whether a load or unload is done; and how long there may be no answer.
ASK_AGAIN_S = 0.2
UNTOLD_S = 5.0
MODELS_BYTES = 1 << 20
MODEL_IDS = jmespath.compile("data[*].id")

# Reads what is in use on cards together, in MiB; None where that can't be read.
UsedMib: TypeAlias = Callable[[Collection[int]], Awaitable[int | None]]

_log = logging.getLogger(__name__)


async def _unread(_cards: Collection[int]) -> None:
    """Nobody reads the cards."""


class Services:
    """Keeps a consumer that left the configuration until the core forgets it.

    Orders to one server are carried out one after the other, as they came. `on_exit` is told the
    consumer whose process ended by itself.
    """

    def __init__(
        self,
        session: ClientSession,
        on_exit: Callable[[str], None],
        used_mib: UsedMib = _unread,
    ) -> None:
        self._session = session
        self._on_exit = on_exit
        self._used_mib = used_mib
        self._limits = SchedulerSettings()
        self._whole: Mapping[str, ConsumerSettings] = {}
        self._consumers: dict[str, ConsumerSettings] = {}
        # By server: what runs it, and the settings that its driver was made from.
        self._drivers: dict[str, Driver | None] = {}
        self._made_from: dict[str, ConsumerSettings] = {}
        # What its probes could not tell and the log was told of, by the settings that they went by.
        self._said: dict[str, tuple[ConsumerSettings, frozenset[str]]] = {}
        self._orders: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def __getitem__(self, name: str) -> ConsumerSettings:
        """Give a unit, or a consumer of several as a whole."""
        return self._consumers.get(name) or self._whole[name]

    def configure(self, settings: Settings) -> None:
        """Take over checked settings."""
        self._limits = settings.scheduler
        self._whole = settings.consumers
        self._consumers.update(units(settings))
        for consumer in self._consumers.values():
            if consumer.server not in self._drivers:
                self._make_driver(consumer)

    async def forget_all_but(self, names: Collection[str]) -> None:
        """Let go of those whom the core knows no more; what their drivers run is ended."""
        for name in [name for name in self._consumers if name not in names]:
            del self._consumers[name]
        servers = {consumer.server for consumer in self._consumers.values()}
        gone = [server for server in self._drivers if server not in servers]
        drivers = [self._drivers.pop(server) for server in gone]
        for server in gone:
            del self._made_from[server]
        self._said = {name: said for name, said in self._said.items() if name in names}
        for driver in drivers:
            if driver is not None:
                await driver.close()

    async def listed_models(self, server: str, timeout_s: float) -> list[str]:
        """Ask a server which models it has, as OpenAI's clients do; none where it does not say."""
        try:
            listed = json.loads(
                await call(
                    self._session,
                    self._whole[server],
                    "GET",
                    "/v1/models",
                    timeout_s=timeout_s,
                    read_bytes=MODELS_BYTES,
                    keep=True,
                )
            )
        except (CallError, ValueError):
            return []
        names = MODEL_IDS.search(listed) or []
        return [name for name in names if isinstance(name, str) and is_model_name(name)]

    async def load(self, name: str) -> str | None:
        """Bring it up and in. None, or the code of what failed."""
        consumer = self._consumers[name]
        async with self._orders[consumer.server]:
            try:
                async with asyncio.timeout(self._limits.load_timeout_s):
                    driver = await self._current_driver(consumer)
                    if driver and (not consumer.load or await driver.running() is False):
                        error = await driver.start()
                        if error is not None:
                            return error
                    error = await run_steps(self._session, consumer, consumer.load)
                    if error is None and consumer.load:
                        await self._until(consumer, resident=True)
                    return error
            except TimeoutError:
                return "timeout"

    async def unload(self, name: str, how: How) -> str | None:
        """Have it give its memory back. None (which means accepted), or the code of what failed."""
        consumer = self._consumers[name]
        driver = self._drivers[consumer.server]
        async with self._orders[consumer.server]:
            try:
                async with asyncio.timeout(self._limits.unload_timeout_s):
                    if driver and (how == "driver" or not consumer.unload):
                        return await self._stop(driver)
                    if driver and await driver.running() is False:
                        return None  # nobody is there to be called, and nothing is held
                    return await self._unload_by_route(consumer)
            except TimeoutError:
                return "timeout"

    async def _unload_by_route(self, consumer: ConsumerSettings) -> str | None:
        cards, again_s = consumer.resident_mib_by_gpu, consumer.unload_again_s
        before_mib = await self._used_mib(cards) if again_s is not None else None
        error = await run_steps(self._session, consumer, consumer.unload)
        if error is not None:
            return error
        await self._until(consumer, resident=False)
        if again_s is None or await self._came_free(consumer, before_mib, again_s):
            return None
        return await run_steps(self._session, consumer, consumer.unload)

    async def _came_free(
        self, consumer: ConsumerSettings, before_mib: int | None, within_s: float
    ) -> bool:
        """Wait until its cards show at least half of what its unload should give back."""
        cards = consumer.resident_mib_by_gpu
        should_mib = sum(cards.values()) - consumer.vram_residue_mib * len(cards)
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        while loop.time() < until:
            now_mib = None if before_mib is None else await self._used_mib(cards)
            if now_mib is not None and before_mib is not None:
                freed_mib = before_mib - now_mib
                if freed_mib > 0 and 2 * freed_mib >= should_mib:
                    return True
            await asyncio.sleep(ASK_AGAIN_S)
        return False

    async def _until(self, consumer: ConsumerSettings, *, resident: bool) -> None:
        """Wait until the service says so itself, where it tells: many answer before they act.

        The caller limits it. Who can't tell for so long is taken at its first word; but who starts
        anew to load refuses connections until it is loaded.
        """
        if not isinstance(consumer.residency, ResidencySettings):
            return
        loop = asyncio.get_running_loop()
        until = loop.time() + UNTOLD_S
        refused = False if resident else None
        while (
            told := await is_resident(self._session, consumer, UNTOLD_S, refused=refused)
        ) is not resident:
            if told is not None:
                until = loop.time() + UNTOLD_S
            elif loop.time() >= until:
                return
            await asyncio.sleep(ASK_AGAIN_S)

    async def _stop(self, driver: Driver) -> str | None:
        """Stop it, and kill what is still there while there is time to see that work."""
        limit_s = self._limits.unload_timeout_s
        try:
            async with asyncio.timeout(max(limit_s - KILLED_S, limit_s / 2)):
                error = await driver.stop()
        except TimeoutError:
            error = "timeout"
        return await driver.kill() if error == "timeout" else error

    async def probe(
        self, server: str, timeout_s: float, read_holders: ReadHolders
    ) -> Mapping[str, ProbeFacts]:
        """Look at a server once, and give what that says of each of its units."""
        units = [one for one in self._consumers.values() if one.server == server]
        driver = self._drivers[server]
        facts = await probe(self._session, units, timeout_s, driver, read_holders=read_holders)
        for name, one in facts.items():
            if one.healthy and one.error is not None:
                self._say_once(self._consumers[name], one.error.split(", "))
        return facts

    def server_of(self, name: str) -> str:
        return self._consumers[name].server

    async def owners(self) -> tuple[Owner, ...]:
        """Give how the processes of each consumer are known."""
        drivers = list(self._drivers.items())
        ids = {
            server: await driver.container_id()
            for server, driver in drivers
            if isinstance(driver, ContainerDriver)
        }
        return tuple(
            owner_of(one, self._made_from[one.server], ids.get(one.server))
            for one in self._consumers.values()
        )

    async def follow(self, consumer: ConsumerSettings, job: Job, identity: JobId) -> Outcome:
        """Wait until a job is over; by the settings that its request was served with."""
        return await follow(self._session, consumer, job, identity)

    async def result_path(self, consumer: ConsumerSettings, identity: JobId) -> str | None:
        return await result_path(self._session, consumer, identity)

    async def close(self) -> None:
        """End every process that nobody else looks after."""
        drivers = [driver for driver in self._drivers.values() if driver is not None]
        await asyncio.gather(*(driver.close() for driver in drivers))

    def _say_once(self, consumer: ConsumerSettings, problems: Sequence[str]) -> None:
        """The next probe would say it again; new settings may have mended it."""
        settings, said = self._said.get(consumer.name, (consumer, frozenset[str]()))
        said = said if settings is consumer else frozenset()
        if news := [problem for problem in problems if problem not in said]:
            told = ", ".join(news)
            _log.warning(
                "%s answers, but cannot tell all that it is asked: %s", consumer.name, told
            )
        self._said[consumer.name] = consumer, said.union(news)

    async def _current_driver(self, consumer: ConsumerSettings) -> Driver | None:
        """Give its driver; new settings take over where nothing runs by the old ones."""
        driver = self._drivers[consumer.server]
        if self._made_from[consumer.server] != _as_server(consumer):
            if driver is not None:
                if await driver.running():
                    return driver
                await driver.close()
            self._make_driver(consumer)
        return self._drivers[consumer.server]

    def _make_driver(self, consumer: ConsumerSettings) -> None:
        server = consumer.server
        self._made_from[server] = made_from = _as_server(consumer)
        self._drivers[server] = make_driver(
            made_from, self._session, lambda: self._has_exited(server)
        )

    def _has_exited(self, server: str) -> None:
        for name, consumer in self._consumers.items():
            if consumer.server == server:
                self._on_exit(name)


def _as_server(consumer: ConsumerSettings) -> ConsumerSettings:
    """Give what is the same for all models of a server, of what a driver is made from."""
    return ConsumerSettings(
        name=consumer.server,
        url=consumer.url,
        health=consumer.health,
        headers=consumer.headers,
        driver=consumer.driver,
    )

"""The services behind the consumers: settings, drivers, and the orders to load and unload."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection

from aiohttp import ClientSession

from mgpu_core.config import Config
from mgpu_core.effects import How
from mgpu_core.events import Outcome
from mgpu_effects.drivers import Driver, make_driver
from mgpu_effects.following import JobId, follow
from mgpu_effects.jobs import Job
from mgpu_effects.probes import ProbeFacts, probe
from mgpu_effects.settings import KILLED_S, ConsumerSettings, SchedulerSettings, Settings
from mgpu_effects.steps import run_steps


class Services:
    """Keeps a consumer that left the configuration until the core forgets it.

    Orders to one server are carried out one after the other, as they came. `on_exit` is told the
    consumer whose process ended by itself.
    """

    def __init__(self, session: ClientSession, on_exit: Callable[[str], None]) -> None:
        self._session = session
        self._on_exit = on_exit
        self._limits = SchedulerSettings()
        self._consumers: dict[str, ConsumerSettings] = {}
        self._servers: dict[str, str] = {}
        self._drivers: dict[str, Driver | None] = {}
        # The settings that each driver was made from.
        self._made_from: dict[str, ConsumerSettings] = {}
        self._orders: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def __getitem__(self, name: str) -> ConsumerSettings:
        return self._consumers[name]

    def configure(self, settings: Settings, config: Config) -> None:
        """Take over checked settings and the core's configuration that was made from them."""
        self._limits = settings.scheduler
        self._consumers.update(settings.consumers)
        self._servers.update({name: c.server for name, c in config.consumers.items()})
        for name in settings.consumers:
            if name not in self._drivers:
                self._make_driver(name)

    async def forget_all_but(self, names: Collection[str]) -> None:
        """Let go of those whom the core knows no more; what their drivers run is ended."""
        gone = [name for name in self._consumers if name not in names]
        drivers = [self._drivers.pop(name) for name in gone]
        for name in gone:
            del self._consumers[name], self._made_from[name], self._servers[name]
        for driver in drivers:
            if driver is not None:
                await driver.close()

    async def load(self, name: str) -> str | None:
        """Bring it up and in. None, or the code of what failed."""
        consumer = self._consumers[name]
        async with self._orders[self._servers[name]]:
            try:
                async with asyncio.timeout(self._limits.load_timeout_s):
                    driver = await self._current_driver(name)
                    if driver and (not consumer.load or await driver.running() is False):
                        error = await driver.start()
                        if error is not None:
                            return error
                    return await run_steps(self._session, consumer, consumer.load)
            except TimeoutError:
                return "timeout"

    async def unload(self, name: str, how: How) -> str | None:
        """Have it give its memory back. None (which means accepted), or the code of what failed."""
        consumer, driver = self._consumers[name], self._drivers[name]
        async with self._orders[self._servers[name]]:
            try:
                async with asyncio.timeout(self._limits.unload_timeout_s):
                    if driver and (how == "driver" or not consumer.unload):
                        return await self._stop(driver)
                    if driver and await driver.running() is False:
                        return None  # nobody is there to be called, and nothing is held
                    return await run_steps(self._session, consumer, consumer.unload)
            except TimeoutError:
                return "timeout"

    async def _stop(self, driver: Driver) -> str | None:
        """Stop it, and kill what is still there while there is time to see that work."""
        limit_s = self._limits.unload_timeout_s
        try:
            async with asyncio.timeout(max(limit_s - KILLED_S, limit_s / 2)):
                error = await driver.stop()
        except TimeoutError:
            error = "timeout"
        return await driver.kill() if error == "timeout" else error

    async def probe(self, name: str, timeout_s: float) -> ProbeFacts:
        return await probe(self._session, self._consumers[name], timeout_s, self._drivers[name])

    async def follow(self, consumer: ConsumerSettings, job: Job, identity: JobId) -> Outcome:
        """Wait until a job is over; by the settings that its request was served with."""
        return await follow(self._session, consumer, job, identity)

    async def close(self) -> None:
        """End every process that nobody else looks after."""
        drivers = [driver for driver in self._drivers.values() if driver is not None]
        await asyncio.gather(*(driver.close() for driver in drivers))

    async def _current_driver(self, name: str) -> Driver | None:
        """Give its driver; new settings take over where nothing runs by the old ones."""
        driver = self._drivers[name]
        if self._made_from[name] != self._consumers[name]:
            if driver is not None:
                if await driver.running():
                    return driver
                await driver.close()
            self._make_driver(name)
        return self._drivers[name]

    def _make_driver(self, name: str) -> None:
        consumer = self._consumers[name]
        self._made_from[name] = consumer
        self._drivers[name] = make_driver(consumer, self._session, lambda: self._on_exit(name))

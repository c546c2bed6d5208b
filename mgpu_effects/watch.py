"""Looking at the cards and the services: every so often and when asked, one look at a time."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping

import attrs

from mgpu_core.config import SECOND_US
from mgpu_core.events import Event, GpuReading, GpuSample, ProbeResult
from mgpu_effects.clock import Clock
from mgpu_effects.footprints import Footprints
from mgpu_effects.gpu import SampleError, Sampler, make_sampler
from mgpu_effects.gpu_processes import HolderReader, Holders
from mgpu_effects.probes import ProbeFacts
from mgpu_effects.services import Services
from mgpu_effects.settings import Settings

# What samplers and drivers take at most, beside the time that is set for a probe.
PATIENCE_S = 10

_log = logging.getLogger(__name__)


class Repeater:
    """Does it every `interval_s` after the last time, and as soon as it can when asked."""

    def __init__(self, action: Callable[[], Awaitable[None]], interval_s: float) -> None:
        self.interval_s = interval_s
        self._action = action
        self._asked = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def ask(self) -> None:
        self._asked.set()

    def stop(self) -> None:
        self._task.cancel()

    async def ended(self) -> None:
        """Wait until what was under way when it was stopped is over: a command may be killed."""
        await asyncio.wait((self._task,), timeout=PATIENCE_S)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.interval_s):
                    await self._asked.wait()
            self._asked.clear()
            await self._action()


class Watch:
    """Posts a `GpuSample` or a `ProbeResult` for each look, whatever happens to it."""

    def __init__(
        self,
        services: Services,
        clock: Clock,
        post: Callable[[Callable[[int], Event]], None],
        footprints: Footprints,
    ) -> None:
        self._services = services
        self._clock = clock
        self._post = post
        self._settings = Settings()
        self._sampler: Sampler | None = None
        self._footprints = footprints
        # One asks the cards what is free, one whose the rest is, which takes longer.
        self._sampling: Repeater | None = None
        self._measuring: Repeater | None = None
        # The server of each consumer that is followed, and who asks each server.
        self._servers: dict[str, str] = {}
        self._probing: dict[str, Repeater] = {}
        self._holders = HolderReader(clock, lambda: self._sampler, services.owners)

    async def configure(self, settings: Settings) -> None:
        old, self._settings = self._settings, settings
        if self._sampler is None or old.gpus != settings.gpus:
            await self._replace_sampler(make_sampler(settings.gpus))
        if self._sampling is None or self._measuring is None:
            self._sampling = Repeater(self._sample, settings.poll_interval_s)
            self._measuring = Repeater(self._measure, settings.poll_interval_s)
        self._sampling.interval_s = self._measuring.interval_s = settings.poll_interval_s
        for repeater in self._probing.values():
            repeater.interval_s = settings.probe.interval_s

    def follow(self, names: Collection[str]) -> None:
        """Probe these consumers from now on, and no others; those of one server together."""
        self._servers = {name: self._services.server_of(name) for name in names}
        servers = set(self._servers.values())
        for server in self._probing.keys() - servers:
            self._probing.pop(server).stop()
        for server in sorted(servers - self._probing.keys()):
            interval_s = self._settings.probe.interval_s
            self._probing[server] = Repeater(self._prober(server), interval_s)

    def sample(self) -> None:
        if self._sampling is not None:
            self._sampling.ask()

    def probe(self, name: str) -> None:
        if name in self._servers:
            self._probing[self._servers[name]].ask()

    async def holders(self) -> Holders | None:
        """Say who held the memory of the cards not long ago; None: nobody looked yet."""
        return await self._holders.recent(round(self._settings.poll_interval_s * SECOND_US))

    async def used_mib(self, cards: Collection[int]) -> int | None:
        """Read what is in use on these cards together; None: it can't be read now."""
        if self._sampler is None:
            return None
        try:
            async with asyncio.timeout(PATIENCE_S):
                readings = await self._sampler.read()
        except (SampleError, TimeoutError):
            return None
        used = {reading.index: reading.used_mib for reading in readings}
        return sum(used[card] for card in cards) if used.keys() >= set(cards) else None

    async def close(self) -> None:
        looking = (*self._probing.values(), self._sampling, self._measuring)
        repeaters = [repeater for repeater in looking if repeater is not None]
        for repeater in repeaters:
            repeater.stop()
        await asyncio.gather(*(repeater.ended() for repeater in repeaters))
        await self._replace_sampler(None)

    async def _replace_sampler(self, sampler: Sampler | None) -> None:
        old, self._sampler = self._sampler, sampler
        if old is not None:
            await old.close()

    async def _sample(self) -> None:
        taken = self._clock.now()
        gpus: tuple[GpuReading, ...] = ()
        error: str | None = None
        try:
            assert self._sampler is not None
            async with asyncio.timeout(PATIENCE_S):
                gpus = await self._sampler.read()
        except SampleError as failed:
            error = failed.code
        except TimeoutError:
            error = "timeout"
        except Exception:  # noqa: BLE001 - whatever it is, it is an event
            _log.exception("a defect in reading the GPUs")
            error = "internal_error"
        self._post(lambda at: GpuSample(at=at, taken=taken, gpus=gpus, error=error))

    async def _measure(self) -> None:
        self._footprints.measure(await self._holders.read(since=self._clock.now()))
        await self._footprints.save()

    def _prober(self, server: str) -> Callable[[], Awaitable[None]]:
        async def look() -> None:
            taken = self._clock.now()
            for name, facts in (await self._facts(server, taken)).items():
                if name in self._servers:
                    self._post_result(name, taken, facts)

        return look

    def _post_result(self, name: str, taken: int, facts: ProbeFacts) -> None:
        facts = self._footprints.probed(self._services[name], facts)
        told = attrs.asdict(facts, recurse=False)
        self._post(lambda at: ProbeResult(at=at, consumer=name, taken=taken, **told))

    async def _facts(self, server: str, taken: int) -> Mapping[str, ProbeFacts]:
        timeout_s = self._settings.probe.timeout_s
        try:
            async with asyncio.timeout(timeout_s + PATIENCE_S):
                return await self._services.probe(
                    server, timeout_s, lambda: self._holders.read(since=taken)
                )
        except TimeoutError:
            nothing = ProbeFacts(healthy=False, failure="timeout", error="timeout")
        except Exception:  # noqa: BLE001 - whatever it is, it is an event
            _log.exception("a defect in probing %s", server)
            nothing = ProbeFacts(healthy=False, failure="answer", error="internal_error")
        return {name: nothing for name, its in self._servers.items() if its == server}

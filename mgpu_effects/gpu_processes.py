"""Whose the processes are that hold memory on the cards.

A process belongs to a consumer if it, or one that it descends from, carries the mark of the
consumer's process driver, runs in the consumer's control group (a systemd unit's, a container's),
or listens on the consumer's port. What may not be looked at (other users' processes, other
namespaces) is not known, and nothing is concluded from it.
"""

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from attrs import field, frozen

from mgpu_core.events import GpuReading
from mgpu_effects.blocking import Blocking
from mgpu_effects.clock import Clock
from mgpu_effects.drivers import mark_of
from mgpu_effects.gpu import GpuProcess, SampleError, Sampler
from mgpu_effects.proc import PROC, Process, lineage, listeners
from mgpu_effects.settings import ConsumerSettings

_PROC_TIMEOUT_S = 2.0
# Less than that on a card is no model: what a process needs to work with a card at all.
_CONTEXT_MIB = 256
_RECENT_S = 1.0  # who only wants to see it waits so long for a new reading
_UNITS = (".service", ".scope", ".slice")

_log = logging.getLogger(__name__)


@frozen(kw_only=True)
class Owner:
    """How the processes of a consumer are known: by what there is of these.

    A control group goes by the name of a systemd unit, or by a container's id.
    """

    consumer: str
    mark: str | None = None
    cgroup: str | None = None
    port: int | None = None

    @property
    def certain(self) -> bool:
        """Say whether none of its processes can be missed.

        Who listens on a port may be a proxy in front of the process that holds the memory.
        """
        return self.mark is not None or self.cgroup is not None

    def owns(self, line: Iterable[Process], listening: Mapping[int, frozenset[int]]) -> bool:
        """Say whether a process of this lineage is the consumer's."""
        sockets = listening.get(self.port, frozenset()) if self.port is not None else frozenset()
        return any(
            (self.mark is not None and one.mark == self.mark)
            or (self.cgroup is not None and any(_is(part, self.cgroup) for part in one.cgroups))
            or not one.sockets.isdisjoint(sockets)
            for one in line
        )


def owner_of(
    consumer: ConsumerSettings, started_by: ConsumerSettings, container_id: str | None = None
) -> Owner:
    """Give how its processes are known, where `started_by` are the settings that they run by."""
    driver = started_by.driver
    unit = driver.systemd.unit if driver and driver.systemd else None
    if unit is not None and not unit.endswith(_UNITS):
        unit += ".service"  # as systemctl completes it
    return Owner(
        consumer=consumer.name,
        mark=mark_of(started_by) if driver and driver.process else None,
        cgroup=unit or container_id,
        port=local_port(consumer.url),
    )


def local_port(url: str) -> int | None:
    """Give the port of a URL on this host's loopback; None: it is elsewhere, or might be."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host != "localhost":
        try:
            ip = ipaddress.ip_address(host)
        except ValueError:
            return None
        if not (ip.is_loopback or ip.is_unspecified):
            return None
    return parts.port or {"http": 80, "https": 443}[parts.scheme]


def _is(part: str, cgroup: str) -> bool:
    """Compare a part of a control group's path; engines wrap a container's id into a scope."""
    return part == cgroup or part.endswith(f"-{cgroup}.scope")


@frozen(kw_only=True)
class Holding:
    """What one process holds on one card. `name` is None where it is not to be seen from here."""

    index: int
    pid: int
    name: str | None
    mib: int | None
    owners: frozenset[str] = frozenset()


@frozen(kw_only=True)
class Holders:
    """Who held the memory of the cards at some time after `taken`; `error` why nobody can tell."""

    taken: int
    used_mib: Mapping[int, int] = field(factory=dict)  # by card
    holdings: tuple[Holding, ...] = ()
    certain: frozenset[str] = frozenset()  # the consumers of whose processes none can be missed
    error: str | None = None

    def held_mib(self, consumer: str, cards: Iterable[int]) -> int | None:
        """What its processes hold on these cards; None where that can't be told."""
        mine = [each.mib for each in self._on(cards) if consumer in each.owners]
        return None if None in mine else sum(mib for mib in mine if mib is not None)

    def hidden_mib(self, consumer: str, cards: Iterable[int]) -> int:
        """What else of these cards is in use and might be the consumer's, as far as can be told."""
        known = sum(
            each.mib or 0
            for each in self._on(cards)
            if each.owners or (consumer in self.certain and each.name is not None)
        )
        return sum(self.used_mib.get(card, 0) for card in cards) - known

    def may_hide(self, consumer: str, cards: Iterable[int], least_mib: int) -> bool:
        """Say whether what else is in use of these cards is enough to be the consumer's."""
        return self.hidden_mib(consumer, cards) >= max(least_mib, _CONTEXT_MIB)

    def sharers(self, consumer: str, cards: Iterable[int]) -> frozenset[str]:
        """Give the other consumers that some process of this one is a process of, too."""
        mine = (each.owners for each in self._on(cards) if consumer in each.owners)
        return frozenset().union(*mine) - {consumer}

    def foreign(self, card: int) -> tuple[Holding, ...]:
        """Give what belongs to no consumer, the most first."""
        strangers = (each for each in self._on((card,)) if not each.owners)
        return tuple(sorted(strangers, key=lambda each: (-(each.mib or 0), each.pid)))

    def _on(self, cards: Iterable[int]) -> Iterator[Holding]:
        cards = frozenset(cards)
        return (each for each in self.holdings if each.index in cards)


def attribute(
    taken: int,
    readings: Iterable[GpuReading],
    processes: Iterable[GpuProcess],
    owners: Iterable[Owner],
    proc: Path = PROC,
) -> Holders:
    """Find out whose the processes are. It reads files, and may block."""
    processes, owners = tuple(processes), tuple(owners)
    listening = listeners(proc) if processes else {}
    holdings = []
    for process in processes:
        line = lineage(process.pid, proc)
        holding = Holding(
            index=process.index,
            pid=process.pid,
            name=line[0].name if line else None,
            mib=process.mib,
            owners=frozenset(each.consumer for each in owners if each.owns(line, listening)),
        )
        holdings.append(holding)
    return Holders(
        taken=taken,
        used_mib={reading.index: reading.used_mib for reading in readings},
        holdings=tuple(holdings),
        certain=frozenset(owner.consumer for owner in owners if owner.certain),
    )


class HolderReader:
    """Finds out who holds the memory of the cards, when somebody wants to know."""

    def __init__(
        self,
        clock: Clock,
        sampler: Callable[[], Sampler | None],
        owners: Callable[[], Awaitable[tuple[Owner, ...]]],
    ) -> None:
        self._clock = clock
        self._sampler = sampler
        self._owners = owners
        self._proc = Blocking("proc", _PROC_TIMEOUT_S)
        self._lock = asyncio.Lock()
        self._last: Holders | None = None

    async def read(self, since: int) -> Holders:
        """Give a reading that began at `since` (as events' `at`) or later; many may share one."""
        async with self._lock:
            if self._last is None or self._last.taken < since:
                self._last = await self._read()
            return self._last

    async def recent(self, age_us: int) -> Holders | None:
        """Give one that is no older than that if it is there soon, else the last one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RECENT_S):
                return await self.read(self._clock.now() - age_us)
        return self._last

    async def _read(self) -> Holders:
        taken, sampler = self._clock.now(), self._sampler()
        if sampler is None:
            return Holders(taken=taken, error="no_gpu")
        try:
            readings = await sampler.read()
            processes = await sampler.processes()
            owners = await self._owners()
            return await self._proc.run(lambda: attribute(taken, readings, processes, owners))
        except SampleError as failed:
            error = failed.code
        except TimeoutError:
            error = "timeout"
        except Exception:  # noqa: BLE001 - whatever it is, the probe goes on without
            _log.exception("a defect in reading who holds the memory of the GPUs")
            error = "internal_error"
        return Holders(taken=taken, error=error)

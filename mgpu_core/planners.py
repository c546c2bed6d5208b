"""Who has to go when memory is short. The scheduler decides when, a planner decides who.

A planner of your own is any object with `victims(target, view)`: pure, without side effects, as
it is asked speculatively. Its answer is the whole set before anything is unloaded; it is believed
about what fits. `Lru` and `Gdsf` are built in.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

from attrs import frozen

from mgpu_core.config import Eviction
from mgpu_core.state import Residency

OrderKey: TypeAlias = tuple[int, int, str]


@frozen(kw_only=True)
class Holder:
    """One consumer as a planner sees it. MiB by card, times in microseconds."""

    name: str
    residency: Residency
    # What an unload of it should give back: as measured, else as declared, less its residue.
    gain_mib: Mapping[int, int]
    need_mib: Mapping[int, int]
    measured_mib: int | None
    # The end of its last successful work; None: never used.
    last_used: int | None
    uses: int
    # Frequency times cost by size, aged: what gdsf orders by.
    credit: int
    load_us: int | None
    serving: int
    busy: bool
    owed: bool
    pinned: bool
    # Who goes with it: the others of its server, where only a stop of that helps.
    stops_with: tuple[str, ...]
    # It may be named at all: there is a way to unload it, and nothing forbids that now.
    evictable: bool
    # It could be unloaded at once: it does not serve, load or unload, is not busy and not owed.
    idle: bool

    def gives_any(self, gpus: Iterable[int]) -> bool:
        """Say whether an unload of it should give something back on one of these cards."""
        return any(self.gain_mib.get(gpu, 0) > 0 for gpu in gpus)


@frozen(kw_only=True)
class View:
    """What a planner may know, made for one target."""

    # Resident, loading, unloading, and targets of swaps, sorted.
    running: tuple[str, ...]
    # Everybody who may hold memory: the running ones, and those of whom nobody knows.
    holders: Mapping[str, Holder]
    # The target is in already.
    resident: bool
    # What the target needs by card, cushion included; empty: nothing has to go for it.
    need_mib: Mapping[int, int]
    # What it could have now, less what is promised to others; None: no limit is known.
    free_mib: Mapping[int, int | None]
    # Who may stay beside it.
    protected: tuple[str, ...]
    max_evictions: int

    def candidates(self, target: str) -> tuple[Holder, ...]:
        """Give all that may be named for the target and hold memory where it needs some."""
        spared = frozenset(self.protected)
        return tuple(
            holder
            for name, holder in self.holders.items()
            if name != target
            and holder.evictable
            and name not in spared
            and (not holder.stops_with or spared.isdisjoint(holder.stops_with))
            and holder.gives_any(self.need_mib)
        )

    def missing_mib(self, victims: Iterable[Holder] = ()) -> dict[int, int]:
        """Say how much is missing by card once these have gone; empty: the target fits."""
        return _left(
            {
                gpu: need - free
                for gpu, need in self.need_mib.items()
                if (free := self.free_mib.get(gpu)) is not None
            },
            tuple(victims),
        )


class Planner(Protocol):
    def victims(self, target: str, view: View) -> tuple[str, ...] | None:
        """Name who has to go so that the target fits; None: no set would do."""


class Lru:
    """Oldest end of successful work first; who was never used goes before all others."""

    def order(self, holder: Holder) -> OrderKey:
        return (-1 if holder.last_used is None else holder.last_used, 0, holder.name)

    def victims(self, target: str, view: View) -> tuple[str, ...] | None:
        missing = {} if view.resident else view.missing_mib()
        if not missing:
            return ()
        candidates = sorted(view.candidates(target), key=self.order)
        idle = [holder for holder in candidates if holder.idle]
        at_work = [holder for holder in candidates if not holder.idle]
        # A set of idle ones can go at once; any other has to be waited for.
        for pool in (idle, idle + at_work) if at_work else (idle,):
            chosen = _smallest(pool, missing, view.max_evictions)
            if chosen is not None:
                return tuple(holder.name for holder in chosen)
        return None


class Gdsf(Lru):
    """Greedy dual size frequency: what is cheap to bring back for the room it takes goes first."""

    def order(self, holder: Holder) -> OrderKey:
        return (holder.credit, -1 if holder.last_used is None else holder.last_used, holder.name)


PLANNERS: Mapping[Eviction, Planner] = {"lru": Lru(), "gdsf": Gdsf()}


def _smallest(
    pool: Sequence[Holder], missing: Mapping[int, int], max_evictions: int
) -> list[Holder] | None:
    """Take from the front until nothing is missing, and leave out whom that does not need."""
    chosen = _enough(pool, missing)
    if chosen is not None and len(chosen) > max_evictions:
        large_first = sorted(
            pool,
            key=lambda holder: (
                -sum(min(holder.gain_mib.get(gpu, 0), mib) for gpu, mib in missing.items())
            ),
        )
        chosen = _enough(large_first, missing)
    if chosen is None or len(chosen) > max_evictions:
        return None
    return chosen


def _enough(pool: Iterable[Holder], missing: Mapping[int, int]) -> list[Holder] | None:
    chosen: list[Holder] = []
    left = missing
    for holder in pool:
        if not left:
            break
        if holder.gives_any(left):
            chosen.append(holder)
            left = _left(left, [holder])
    return None if left else _without_needless(chosen, missing)


def _without_needless(chosen: list[Holder], missing: Mapping[int, int]) -> list[Holder]:
    """Spare the ones chosen last first: they are the ones that should rather stay."""
    if len(chosen) == 1:
        return chosen
    for holder in reversed(chosen):
        rest = [other for other in chosen if other is not holder]
        if not _left(missing, rest):
            chosen = rest
    return chosen


def _left(missing: Mapping[int, int], victims: Sequence[Holder]) -> dict[int, int]:
    """Say what is still missing by card once these have gone."""
    left = {}
    for gpu, short_mib in missing.items():
        rest_mib = short_mib
        for victim in victims:
            rest_mib -= victim.gain_mib.get(gpu, 0)
        if rest_mib > 0:
            left[gpu] = rest_mib
    return left

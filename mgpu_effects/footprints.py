"""What each consumer really takes of the cards, as its processes show it.

Observations, and nothing that the scheduler decides by: only of a consumer whose size is `auto` its
probes report what is measured here. They are kept in a file beside the event log, because no event
holds what single processes hold.
"""

import asyncio
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from attrs import asdict, evolve, frozen

from mgpu_core.events import Event, UnloadDone
from mgpu_core.state import ConsumerState, Residency, State
from mgpu_effects.blocking import Blocking
from mgpu_effects.gpu_processes import Holders
from mgpu_effects.probes import ProbeFacts
from mgpu_effects.settings import ConsumerSettings, ResidencySettings

FILE = "footprints.json"
# A peak is the highest of so many loads, or stays in memory: a smaller model is noticed in the end.
RECENT = 8
MOST_KEPT = 256
_SAVE_EVERY_S = 10.0
_SAVE_TIMEOUT_S = 5.0
# The highest reading of each load or stay, by the time at which that began; the last one last.
Peaks: TypeAlias = tuple[tuple[int, int], ...]
Doing: TypeAlias = Literal["gone", "load", "rest", "work"]

_log = logging.getLogger(__name__)


@frozen(kw_only=True)
class Footprint:
    """What a consumer was seen to hold, in MiB on all its cards together; None: not seen yet."""

    residue_mib: int | None = None
    steady_mib: int | None = None
    load_peaks: Peaks = ()
    work_peaks: Peaks = ()
    unload_us: int | None = None

    @property
    def load_peak_mib(self) -> int | None:
        return max((mib for _, mib in self.load_peaks), default=None)

    @property
    def work_peak_mib(self) -> int | None:
        return max((mib for _, mib in self.work_peaks), default=None)

    def with_reading(self, doing: Doing, one: ConsumerState, mib: int) -> "Footprint":
        if doing == "gone":
            return evolve(self, residue_mib=mib)
        if doing == "load":
            return evolve(self, load_peaks=_raised(self.load_peaks, one.moved, mib))
        if doing == "work":
            return evolve(self, work_peaks=_raised(self.work_peaks, one.moved, mib))
        # Many take more with their first work, and keep it: until then it may only be more.
        worked = one.last_done > one.moved
        return evolve(self, steady_mib=mib if worked else max(mib, self.steady_mib or 0))


def _raised(peaks: Peaks, began: int, mib: int) -> Peaks:
    if peaks and peaks[-1][0] == began:
        return (*peaks[:-1], (began, max(mib, peaks[-1][1])))
    return (*peaks[-(RECENT - 1) :], (began, mib))


class Footprints:
    """Keeps them by consumer; fed with the steps of the scheduler, readings and probes."""

    def __init__(self, directory: Path, state: Callable[[], State]) -> None:
        self._path = directory / FILE
        self._state = state
        self._kept: dict[str, Footprint] = {}
        self._holders: Holders | None = None
        self._said_mib: dict[str, int | None] = {}
        self._disk = Blocking("footprints", _SAVE_TIMEOUT_S)
        self._dirty = self._failed = False
        self._save_from = -math.inf

    def __getitem__(self, name: str) -> Footprint:
        return self._kept.get(name, Footprint())

    def said_mib(self, name: str) -> int | None:
        """What the service itself said at its last probe."""
        return self._said_mib.get(name)

    def held_mib(self, name: str, card: int | None = None) -> int | None:
        """What its processes held at the last reading, of one card or all; None: can't be told.

        A process of several consumers (the models of one server) tells only of one that is alone.
        """
        state, holders = self._state(), self._holders
        consumer = state.config.consumers[name]
        if holders is None or holders.error is not None or not consumer.vram_mib:
            return None
        cards = tuple(consumer.vram_mib) if card is None else (card,)
        sharers = (state.consumers.get(one) for one in holders.sharers(name, cards))
        if any(one is not None and one.residency is not Residency.ABSENT for one in sharers):
            return None
        held_mib = holders.held_mib(name, cards)
        declared_mib = sum(consumer.vram_mib[one] for one in cards)
        if held_mib == 0 and holders.may_hide(name, cards, declared_mib):
            return None
        return held_mib

    # -------------------------------------------------------------------------- what it is fed

    def see(self, event: Event, before: State, after: State) -> None:
        """Take the time of an unload that ended with this event."""
        if not isinstance(event, UnloadDone) or event.error is not None:
            return
        one = before.consumers.get(event.consumer)
        if one is not None and one.operation is not None and one.operation.epoch == event.epoch:
            taken_us = after.at - one.operation.since
            self._keep(event.consumer, evolve(self[event.consumer], unload_us=taken_us))

    def probed(self, unit: ConsumerSettings, facts: ProbeFacts) -> ProbeFacts:
        """Note what a service says of itself; of an `auto` one give what was measured instead."""
        if isinstance(unit.residency, ResidencySettings):
            self._said_mib[unit.name] = facts.vram_mib
        steady_mib = self[unit.name].steady_mib
        if unit.vram_resident_mib != "auto" or not facts.healthy or steady_mib is None:
            return facts
        return evolve(facts, vram_mib=steady_mib)

    def measure(self, holders: Holders) -> None:
        """Take a reading of who holds the memory of the cards."""
        self._holders, state = holders, self._state()
        for name in self._said_mib.keys() - state.consumers.keys():
            del self._said_mib[name]
        for name, one in state.consumers.items():
            doing, held_mib = _doing(state, name, holders.taken), self.held_mib(name)
            if doing is None or held_mib is None or (held_mib == 0 and doing != "gone"):
                continue
            self._keep(name, self[name].with_reading(doing, one, held_mib))

    def _keep(self, name: str, footprint: Footprint) -> None:
        if footprint != self[name]:
            self._kept.pop(name, None)  # whose figures changed last is forgotten last
            self._kept[name] = footprint
            self._dirty = True
        while len(self._kept) > MOST_KEPT:
            del self._kept[next(iter(self._kept))]

    # ---------------------------------------------------------------------------- over a restart

    def recall(self) -> None:
        """Begin with what the last run kept."""
        try:
            told = json.loads(self._path.read_bytes())["consumers"]
            self._kept = {name: _decoded(figures) for name, figures in told.items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning("%s is not read, what it measured is forgotten: %s", self._path, error)

    async def save(self, *, now: bool = False) -> None:
        """Write it where something has changed, and not too often but for `now`. Never raises."""
        time_s = asyncio.get_running_loop().time()
        if not self._dirty or (time_s < self._save_from and not now):
            return
        self._save_from, self._dirty = time_s + _SAVE_EVERY_S, False
        figures = {name: asdict(footprint) for name, footprint in self._kept.items()}
        try:
            await self._disk.run(lambda: self._write({"footprints": 1, "consumers": figures}))
            self._failed = False
        except OSError as error:  # TimeoutError is one
            self._dirty = True
            if not self._failed:
                _log.error("%s is not written: %s", self._path, error or "timeout")
            self._failed = True

    def _write(self, content: object) -> None:
        new = self._path.with_suffix(".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(os.open(new, flags, 0o600), "w") as file:
            json.dump(content, file)
        new.replace(self._path)


def _decoded(figures: dict[str, Any]) -> Footprint:
    """Raises TypeError or ValueError where it is none."""
    peaks = {
        key: tuple((int(began), int(mib)) for began, mib in figures[key])
        for key in ("load_peaks", "work_peaks")
    }
    footprint = Footprint(**{**figures, **peaks})
    rest = (footprint.residue_mib, footprint.steady_mib, footprint.unload_us)
    if not all(isinstance(figure, int | None) for figure in rest):
        raise TypeError("a figure is no number")
    return footprint


def _doing(state: State, name: str, since: int) -> Doing | None:
    """Say what it did from `since` till now; None: not one thing, or nothing to be measured."""
    one, consumer = state.consumers[name], state.config.consumers[name]
    if since <= one.moved:
        return None
    if one.residency is Residency.LOADING:
        return "load"
    if one.residency is Residency.ABSENT:
        # Memory comes free a while after an unload; and a crash shows nothing of what that leaves.
        settled = since - one.moved >= state.config.poll_interval_us
        return "gone" if settled and not (one.refused and consumer.unload_route) else None
    if one.residency is not Residency.RESIDENT:
        return None
    if name in state.serving or (one.busy_seen is not None and one.busy_seen > one.last_done):
        return "work"
    return "rest" if one.last_done < since else None

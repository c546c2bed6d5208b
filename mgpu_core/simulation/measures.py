"""What a run was like for those who asked: waits, loads, what was refused.

A `Meter` sees each event with what the scheduler made of it, from a simulated host or from a log.
"""

from collections.abc import Iterable, Mapping

from attrs import frozen

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.config import SECOND_US
from mgpu_core.scheduler import Transition

HOUR_US = 3600 * SECOND_US
NOT_TOLD: Mapping[str, int] = {}


@frozen(kw_only=True)
class Measures:
    """Waits are those of the requests that were served: from the arrival until work on it began."""

    requests: int
    mean_wait_ms: float
    p95_wait_ms: float
    max_wait_ms: float
    loads: int
    evictions: int
    rejected: int
    load_hours: float
    # The share of the time, from the first arrival on, in which something was at work.
    utilisation: float


class Meter:
    """It counts as a run goes on; `measures` says what has come together so far."""

    def __init__(self) -> None:
        self.ended = 0
        # How long each request that was served had waited, and with which code others were refused.
        self.waits_us: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self._arrived: dict[str, int] = {}
        self._loads = self._evictions = self._requests = 0
        self._loading: dict[str, int] = {}
        self._load_us = self._busy_us = 0
        self._first: int | None = None
        self._last = 0
        self._at_work = False

    def see(
        self, event: ev.Event, transition: Transition, began: Mapping[str, int] = NOT_TOLD
    ) -> None:
        """Take a step in; `began` has when work began on requests that were granted before."""
        at = transition.state.at
        self._pass(at, at_work=bool(transition.state.serving))
        self.take(at, event, transition.effects, began)

    def take(
        self,
        at: int,
        event: ev.Event,
        effects: Iterable[fx.Effect],
        began: Mapping[str, int] = NOT_TOLD,
    ) -> None:
        """Take an event and its effects in; without the states nobody knows what was at work."""
        match event:
            case ev.Request():
                self._first = at if self._first is None else self._first
                self._requests += 1
                self._arrived[event.request] = at
            case ev.ServeDone():
                self.ended += 1
            case ev.Cancel():
                self.ended += self._arrived.pop(event.request, None) is not None
            case ev.SwapDone() if event.consumer in self._loading:
                self._load_us += at - self._loading.pop(event.consumer)
        for effect in effects:
            self._note(effect, at, began)

    @property
    def waiting(self) -> int:
        """How many have come and wait still."""
        return len(self._arrived)

    def _pass(self, at: int, *, at_work: bool) -> None:
        if self._at_work:
            self._busy_us += at - self._last
        self._last, self._at_work = at, at_work

    def _note(self, effect: fx.Effect, at: int, began: Mapping[str, int]) -> None:
        match effect:
            case fx.Serve() if effect.request in self._arrived:
                since = self._arrived.pop(effect.request)
                self.waits_us[effect.request] = began.get(effect.request, at) - since
            case fx.Reject() if self._arrived.pop(effect.request, None) is not None:
                self.refused[effect.request] = effect.code
                self.ended += 1
            case fx.StartLoad():
                self._loads += 1
                self._loading[effect.consumer] = at
            case fx.StartUnload():
                self._evictions += 1

    def measures(self) -> Measures:
        waits_us = sorted(self.waits_us.values()) or [0]
        span_us = max(1, self._last - (self._first or 0))
        return Measures(
            requests=self._requests,
            mean_wait_ms=round(sum(waits_us) / len(waits_us) / 1000, 1),
            p95_wait_ms=round(waits_us[-(-len(waits_us) * 95 // 100) - 1] / 1000, 1),
            max_wait_ms=round(waits_us[-1] / 1000, 1),
            loads=self._loads,
            evictions=self._evictions,
            rejected=len(self.refused),
            load_hours=round(self._load_us / HOUR_US, 3),
            utilisation=round(self._busy_us / span_us, 4),
        )

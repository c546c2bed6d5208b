"""Drive the scheduler core by hand: this keeps the time, the epochs and what was decided.

Each helper sends one event, one millisecond after the one before it, and returns the decisions as
short strings: `serve r1`, `reject r1 overloaded`, `unload a`, `unload a by driver`, `load a`.
Requests for a tick, a sample or a probe are kept apart: they decide nothing. Ticks are sent when
the core asked for them and at no other time, so that a forgotten `WakeAt` shows.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Config, Consumer, Gpu, config_of
from mgpu_core.effects import Effect
from mgpu_core.invariants import violations
from mgpu_core.notes import Note
from mgpu_core.scheduler import Scheduler
from mgpu_core.state import Phase, State

START_US = 1_780_000_000_000_000
STEP_US = 1_000
# More ticks than any history here needs: a core that wakes itself for ever fails, not hangs.
MAX_TICKS = 1_000

CARD = Gpu(total_mib=24_000)


def service(name: str, mib: int = 0, **settings: Any) -> Consumer:
    """A service that is told to load and to unload; resident at the start."""
    return Consumer(
        name=name, **{"vram_mib": {0: mib}, "load_route": True, "unload_route": True, **settings}
    )


def lazy(name: str, mib: int = 0, **settings: Any) -> Consumer:
    """A service that loads with its first request and can only be emptied (ComfyUI)."""
    return service(name, mib, **{"load_route": False, **settings})


class Table:
    """A planner that answers from a table, as a user's own may."""

    def __init__(self, table: Mapping[str, Iterable[str]]) -> None:
        self.table = {target: tuple(names) for target, names in table.items()}

    def victims(self, target: str, view: Any) -> tuple[str, ...] | None:
        return self.table.get(target, ())


def decision(effect: Effect) -> str | None:
    """Give the effect as a short string, None for what decides nothing."""
    match effect:
        case fx.Serve():
            return f"serve {effect.request}"
        case fx.Reject():
            return f"reject {effect.request} {effect.code}"
        case fx.StartUnload():
            by = " by driver" if effect.how == "driver" else ""
            return f"unload {effect.consumer}{by}"
        case fx.StartLoad():
            return f"load {effect.consumer}"
    return None


def decisions(effects: Iterable[Effect]) -> list[str]:
    return [text for effect in effects if (text := decision(effect)) is not None]


class Core:
    """A scheduler, its state and the clock. `absent` names are probed away at the start."""

    def __init__(
        self,
        *consumers: Consumer,
        gpus: tuple[Gpu, ...] = (CARD,),
        planner: object = None,
        absent: Iterable[str] = (),
        **settings: Any,
    ) -> None:
        self.config: Config = config_of(*consumers, gpus=gpus, **settings)
        self.scheduler = Scheduler(self.config, planner)
        self.state: State = self.scheduler.initial()
        self.at = START_US
        self.wake: int | None = None
        self.effects: list[Effect] = []
        self.notes: list[Note] = []
        self.last: tuple[Effect, ...] = ()
        self.last_notes: tuple[Note, ...] = ()
        self.open: dict[tuple[str, str], int] = {}
        self.epochs: list[int] = []
        self.feed(ev.Started(at=self.at, run="run-1"))
        for name in absent:
            self.probe(name, resident=False)

    # ---------------------------------------------------------------- events and time

    def feed(self, event: ev.Event) -> list[str]:
        """Send this very event, whatever its `at`; keep what came of it."""
        transition = self.scheduler.step(self.state, event)
        self.state = transition.state
        assert violations(self.state) == ()
        self.last, self.last_notes = tuple(transition.effects), tuple(transition.notes)
        self.effects += self.last
        self.notes += self.last_notes
        for effect in self.last:
            match effect:
                case fx.WakeAt():
                    self.wake = effect.time
                case fx.StartUnload():
                    self._opened("unload", effect.consumer, effect.epoch)
                case fx.StartLoad():
                    self._opened("load", effect.consumer, effect.epoch)
        return decisions(self.last)

    def wait(self, seconds: float) -> list[str]:
        """Let time pass, with the ticks that the core asked for."""
        until = self.at + round(seconds * SECOND_US)
        decided: list[str] = []
        for _ in range(MAX_TICKS):
            if self.wake is None or self.wake > until:
                break
            self.at = max(self.at, self.wake)
            self.wake = None
            decided += self.feed(ev.Tick(at=self.at))
        else:
            raise AssertionError("the core asks to be woken again and again")
        self.at = until
        return decided

    def send(self, kind: type, **fields: Any) -> list[str]:
        decided = self.wait(STEP_US / SECOND_US)
        return decided + self.feed(kind(at=self.at, **fields))

    def request(self, request: str, consumer: str, **fields: Any) -> list[str]:
        return self.send(ev.Request, request=request, consumer=consumer, **fields)

    def cancel(self, request: str) -> list[str]:
        return self.send(ev.Cancel, request=request)

    def finish(self, request: str, outcome: ev.Outcome = "ok") -> list[str]:
        return self.send(ev.ServeDone, request=request, outcome=outcome)

    def unloaded(self, consumer: str, error: str | None = None) -> list[str]:
        """Answer the open unload of that consumer."""
        epoch = self.open.pop(("unload", consumer))
        return self.send(ev.UnloadDone, consumer=consumer, epoch=epoch, error=error)

    def loaded(self, consumer: str, error: str | None = None) -> list[str]:
        """Answer the open load of that consumer."""
        epoch = self.open.pop(("load", consumer))
        return self.send(ev.SwapDone, consumer=consumer, epoch=epoch, error=error)

    def sample(self, *, age_s: float = 0, **free_mib: int) -> list[str]:
        """Report a reading: `free` on card 0, `free1` on card 1; the rest of a card is used."""
        decided = self.wait(STEP_US / SECOND_US)
        cards = {int(key[4:] or 0): mib for key, mib in free_mib.items()}
        readings = tuple(
            ev.GpuReading(
                index=index, total_mib=total, used_mib=total - cards[index], free_mib=cards[index]
            )
            for index, gpu in sorted(self.state.config.gpus.items())
            if index in cards and (total := gpu.total_mib) is not None
        )
        taken = self.at - round(age_s * SECOND_US)
        return decided + self.feed(ev.GpuSample(at=self.at, taken=taken, gpus=readings))

    def sample_fails(self) -> list[str]:
        return self.send(ev.GpuSample, taken=self.at, gpus=(), error="sampler_failed")

    def probe(
        self, consumer: str, *, taken: int | None = None, age_s: float = 0, **fields: Any
    ) -> list[str]:
        """Report a probe, taken just now unless told otherwise."""
        decided = self.wait(STEP_US / SECOND_US)
        taken = self.at - round(age_s * SECOND_US) if taken is None else taken
        healthy = "failure" not in fields
        event = ev.ProbeResult(
            at=self.at, consumer=consumer, taken=taken, **{"healthy": healthy, **fields}
        )
        return decided + self.feed(event)

    def unload(self, *consumers: str, force: bool = False) -> list[str]:
        return self.send(ev.Unload, consumers=consumers, force=force)

    def load(self, consumer: str, *, only_if_free: bool = False) -> list[str]:
        return self.send(ev.Load, consumer=consumer, only_if_free=only_if_free)

    def pin(self, consumer: str, *, pinned: bool = True) -> list[str]:
        return self.send(ev.Pin, consumer=consumer, pinned=pinned)

    def reconfigure(
        self, *consumers: Consumer, gpus: tuple[Gpu, ...] = (CARD,), **settings: Any
    ) -> list[str]:
        return self.send(ev.Reconfigured, config=config_of(*consumers, gpus=gpus, **settings))

    # ---------------------------------------------------------------- what it believes

    def residency(self, consumer: str) -> str:
        return self.state.consumers[consumer].residency.value

    @property
    def queue(self) -> list[str]:
        return list(self.state.queue)

    @property
    def serving(self) -> list[str]:
        return self._in_phase(Phase.SERVING)

    def waiters(self, consumer: str) -> list[str]:
        """Who waits for the swap of that consumer, in order of arrival."""
        joined = self._in_phase(Phase.JOINED)
        return [name for name in joined if self.state.requests[name].consumer == consumer]

    def asked_to_probe(self, consumer: str) -> bool:
        return fx.Probe(consumer=consumer) in self.last

    def asked_to_sample(self) -> bool:
        return fx.SampleGpu() in self.last

    def rejection(self, request: str) -> fx.Reject:
        """Give the one rejection of that request."""
        (found,) = [e for e in self.effects if isinstance(e, fx.Reject) and e.request == request]
        return found

    def history(self, *words: str) -> list[str]:
        """Give all decisions so far that begin with one of these words."""
        return [text for text in decisions(self.effects) if text.split()[0] in words]

    # ---------------------------------------------------------------- shortcuts

    def answer_all(self) -> list[str]:
        """Answer every open unload and load well, and those that follow, until none is open."""
        decided: list[str] = []
        while self.open:
            kind, consumer = next(iter(self.open))
            decided += self.unloaded(consumer) if kind == "unload" else self.loaded(consumer)
        return decided

    def use(self, request: str, consumer: str) -> None:
        """One short job on a consumer that can serve at once."""
        assert self.request(request, consumer) == [f"serve {request}"]
        self.finish(request)

    # ---------------------------------------------------------------- private

    def _opened(self, kind: str, consumer: str, epoch: int) -> None:
        self.open[kind, consumer] = epoch
        self.epochs.append(epoch)

    def _in_phase(self, phase: Phase) -> list[str]:
        found = [r for r in self.state.requests.values() if r.phase is phase]
        return [r.request for r in sorted(found, key=lambda r: r.arrival)]

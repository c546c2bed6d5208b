"""A toy world around the core, and what must hold after every event in it.

Services do as they are told, when the history says so; cards show what the services hold. Every
step is made twice and the old state compared, so that purity is checked everywhere.
"""

from collections import Counter, defaultdict
from typing import Any

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.codec import encode_effect, encode_note, encode_state
from mgpu_core.config import SECOND_US, Consumer
from mgpu_core.state import Phase, RequestState, State
from tests.core.driver import Core, service

TOTAL_MIB = 24_000
OUTCOMES: tuple[ev.Outcome, ...] = ("ok", "ok", "ok", "upstream_error", "disconnected", "timeout")
ANSWERED = (ev.UnloadDone, ev.SwapDone, ev.ServeDone, ev.Cancel)


class World(Core):
    def __init__(self, *consumers: Consumer, **fields: Any) -> None:
        self.held: set[str] = set()
        self.asked: list[str] = []
        self.ends: dict[str, list[str]] = defaultdict(list)
        self.past: list[ev.Event] = []
        self.told: list[list[dict[str, Any]]] = []
        self.before: State | None = None
        # Who has left the configuration goes on holding its memory.
        self.services = {c.name: c for c in consumers}
        super().__init__(*consumers, **fields)
        self.held = {n for n, c in self.state.consumers.items() if c.residency == "resident"}

    def __repr__(self) -> str:
        """What Hypothesis prints: the configuration and all that happened, for a test."""
        return "\n".join([type(self).__name__, str(self.config), *map(str, self.past)])

    def feed(self, event: ev.Event) -> list[str]:
        before = self.before = self.state
        self.past.append(event)
        encoded = encode_state(before)
        told = super().feed(event)
        again = self.scheduler.step(before, event)
        assert encode_state(before) == encoded
        assert again.state == self.state
        self.told.append([encode_effect(e) for e in self.last])
        assert [encode_effect(e) for e in again.effects] == self.told[-1]
        assert [encode_note(n) for n in again.notes] == [encode_note(n) for n in self.last_notes]
        for effect in self.last:
            if isinstance(effect, fx.Serve | fx.Reject):
                self.ends[effect.request].append(type(effect).__name__)
            if isinstance(effect, fx.Serve):
                self.held.add(effect.consumer)
        check_step(event, before, self)
        return told

    # -------------------------------------------------------------- what may happen

    def act(self, what: str, which: int, how: int) -> None:
        names = sorted(self.state.config.consumers)
        getattr(self, f"do_{what}")(names[which % len(names)], which, how)

    def do_ask(self, name: str, which: int, how: int) -> None:
        request = f"r{len(self.asked)}"
        self.asked.append(request)
        deadline = self.at + how * SECOND_US if how % 6 == 5 else None
        self.request(request, name, priority=(None, 0, 2, 4)[how % 4], deadline=deadline)

    def do_end(self, name: str, which: int, how: int) -> None:
        if serving := self.serving:
            self.finish(serving[which % len(serving)], OUTCOMES[how % len(OUTCOMES)])

    def do_answer(self, name: str, which: int, how: int) -> None:
        if self.open:
            kind, consumer = sorted(self.open)[which % len(self.open)]
            self.complete(kind, consumer, error="failed" if how % 6 == 5 else None)

    def complete(self, kind: str, consumer: str, error: str | None = None) -> None:
        if error is None:
            (self.held.add if kind == "load" else self.held.discard)(consumer)
        (self.loaded if kind == "load" else self.unloaded)(consumer, error)

    def do_repeat(self, name: str, which: int, how: int) -> None:
        if past := [event for event in self.past if isinstance(event, ANSWERED)]:
            event = past[which % len(past)]
            names = [key for key in event.__slots__ if key not in {"at", "__weakref__"}]
            self.send(type(event), **{key: getattr(event, key) for key in names})

    def do_leave(self, name: str, which: int, how: int) -> None:
        if self.asked:
            self.cancel(self.asked[-1 - which % len(self.asked)])

    def do_measure(self, name: str, which: int, how: int) -> None:
        if how % 4 == 3:
            self.sample_fails()
        else:
            self.measure(foreign_mib=(0, 0, 3_000)[how % 4])

    def measure(self, foreign_mib: int = 0) -> None:
        free = {
            f"free{index}": max(0, TOTAL_MIB - foreign_mib - self.used_mib(index))
            for index in self.state.config.gpus
        }
        self.sample(**free)

    def used_mib(self, index: int) -> int:
        """What is held on that card, and what loads under way will hold."""
        return sum(self.services[name].vram_mib.get(index, 0) for name in self.in_memory())

    def in_memory(self) -> set[str]:
        return self.held | {name for kind, name in self.open if kind == "load"}

    def do_look(self, name: str, which: int, how: int) -> None:
        answers: tuple[dict[str, Any], ...] = (
            {"resident": name in self.held},
            {"resident": None},
            {"resident": how % 2 == 0},
            {"busy": how % 2 == 0},
            {"failure": "timeout"},
            {"failure": "status"},
            {"failure": "refused"},
        )
        self.probe(name, **answers[how % len(answers)])

    def do_pass(self, name: str, which: int, how: int) -> None:
        self.wait((0.5, 2, 7, 30, 90)[how % 5])

    def do_operate(self, name: str, which: int, how: int) -> None:
        match how % 7:
            case 0:
                self.unload(name)
            case 1:
                self.unload(name, force=True)
            case 2:
                self.unload()
            case 3 | 4:
                self.load(name, only_if_free=how % 7 == 4)
            case 5 | 6:
                self.pin(name, pinned=how % 7 == 5)

    def do_govern(self, name: str, which: int, how: int) -> None:
        """Rare: drain, resume, a restart, a configuration in which somebody is new or gone."""
        config = self.state.config
        match how % 4:
            case 0:
                self.send(ev.Drain)
                self.request("late", name)
                self.send(ev.Resume)
            case 1:
                self.send(ev.Started, run=f"run {self.at}")
            case _:
                rest = [c for c in config.consumers.values() if c.name != name]
                newcomer = [service("new", 4_000)] if how % 4 == 2 else []
                kept = [c for c in rest if c.name != "new"] + newcomer
                if kept:
                    self.held |= {c.name for c in newcomer}
                    self.services |= {c.name: c for c in newcomer}
                    self.reconfigure(*kept, gpus=tuple(config.gpus.values()))

    # -------------------------------------------------------------- a fair end

    def make_peace(self) -> None:
        """Everything answers from now on, and nobody but our consumers uses the cards."""
        for name in sorted(self.state.config.consumers):
            self.pin(name, pinned=False)
            self.probe(name, resident=name in self.held, busy=False)

    def end_all(self, limit_s: int) -> None:
        """Finish and answer one of whatever is open each second, until nobody waits."""
        for _ in range(limit_s):
            if not self.state.requests and not self.open:
                return
            for kind, consumer in sorted(self.open)[:1]:
                self.complete(kind, consumer)
            for request in self.serving[:1]:
                self.finish(request)
            self.measure()
            self.wait(1)
        raise AssertionError(f"still waiting: {self.state.requests}, {self.state.reasons}")


# ------------------------------------------------------------------ what must hold


def check_step(event: ev.Event, before: State, world: World) -> None:
    for effect in world.last:
        match effect:
            case fx.StartUnload():
                check_unload(effect, event, before, world.state)
            case fx.StartLoad():
                check_load(effect, event, before, world.state)
            case fx.Serve():
                check_grant(effect, world.state)
            case fx.Reject():
                assert effect.request not in world.state.requests
            case fx.WakeAt():
                assert effect.time > world.state.at
    for request, ends in world.ends.items():
        assert len(ends) == 1 or request == "late", (request, ends)


def check_grant(effect: fx.Serve, state: State) -> None:
    assert state.consumers[effect.consumer].residency == "resident"
    serving = Counter(serving_consumers(state))
    consumer = state.config.consumers[effect.consumer]
    assert serving[effect.consumer] <= consumer.max_concurrency
    for index, gpu in state.config.gpus.items():
        if consumer.gpu_slot and index in consumer.vram_mib and gpu.max_parallel is not None:
            assert len(at_work(state, index)) <= gpu.max_parallel


def serving_consumers(state: State) -> list[str]:
    return [r.consumer for r in state.requests.values() if r.phase is Phase.SERVING]


def at_work(state: State, index: int) -> set[str]:
    """Who holds a slot of that card."""
    consumers = state.config.consumers
    names = set(serving_consumers(state))
    return {n for n in names if consumers[n].gpu_slot and index in consumers[n].vram_mib}


def check_load(effect: fx.StartLoad, event: ev.Event, before: State, after: State) -> None:
    """At most one load of a consumer at a time."""
    old = before.consumers.get(effect.consumer)
    loading = old is not None and old.operation is not None and old.operation.kind == "load"
    ended = isinstance(event, ev.Started) or (
        isinstance(event, ev.SwapDone) and event.consumer == effect.consumer
    )
    assert not loading or ended
    assert after.consumers[effect.consumer].residency == "loading"


def check_unload(effect: fx.StartUnload, event: ev.Event, before: State, after: State) -> None:
    """Never what serves or is protected, unless an operator names or forces it."""
    name, consumers = effect.consumer, after.config.consumers
    if isinstance(event, ev.Unload) and event.force:
        return
    server = consumers[name].server
    gone = (
        {name}
        if effect.how == "routes"
        else {n for n in consumers if consumers[n].server == server}
    )
    assert not gone.intersection(serving_consumers(after))
    named = isinstance(event, ev.Unload) and name in event.consumers
    if not named and not (name in before.consumers and before.consumers[name].leaving):
        assert after.consumers[name].pinned is not True
        assert not consumers[name].vram_managed


# ------------------------------------------------------------------ what holds in calm weather


class CalmWorld(World):
    """Everything succeeds and nobody meddles: so the strict accounts can be kept from outside."""

    def __init__(self, *consumers: Consumer, **fields: Any) -> None:
        self.overtaken: dict[str, set[str]] = defaultdict(set)
        self.overtaken_high: dict[str, set[str]] = defaultdict(set)
        self.owed: dict[str, set[str]] = defaultdict(set)
        super().__init__(*consumers, **fields)

    def feed(self, event: ev.Event) -> list[str]:
        told = super().feed(event)
        assert self.before is not None
        self.count_overtakes(self.before, self.state)
        self.check_memory()
        self.check_plans(self.before, self.state)
        self.check_owed(self.before, self.state)
        self.check_work_conservation()
        return told

    def do_end(self, name: str, which: int, how: int) -> None:
        super().do_end(name, which, how=0)

    def do_answer(self, name: str, which: int, how: int) -> None:
        super().do_answer(name, which, how=0)

    def do_measure(self, name: str, which: int, how: int) -> None:
        self.measure()

    def do_ask(self, name: str, which: int, how: int) -> None:
        super().do_ask(name, which, how % 4)

    def count_overtakes(self, before: State, after: State) -> None:
        """Count grants and joins of later arrivals on a card that a queued request needs."""
        bound = after.config.overtake_bound
        moved = [r for r in after.requests.values() if _moved(r, before)]
        for name in set(before.queue) & set(after.queue):
            waiting = after.requests[name]
            for other in moved:
                if other.arrival > waiting.arrival and _competes(other, waiting, after):
                    higher = other.priority > waiting.priority
                    counts = self.overtaken_high if higher else self.overtaken
                    counts[name].add(other.request)
            if bound is not None:
                assert len(self.overtaken[name]) <= bound
                assert len(self.overtaken_high[name]) <= 2 * bound

    def check_memory(self) -> None:
        for index, gpu in self.state.config.gpus.items():
            assert self.used_mib(index) + gpu.cushion_mib <= TOTAL_MIB or not self.used_mib(index)

    def check_plans(self, before: State, after: State) -> None:
        """With the whole set gone the target fits, before anybody is told to go."""
        for target, swap in after.swaps.items():
            if target in before.swaps:
                continue
            need = self.services[target].vram_mib
            for index, mib in need.items():
                gone = {*swap.victims, target}
                rest = self.used_mib(index) - sum(
                    self.services[name].vram_mib.get(index, 0) for name in gone & self.in_memory()
                )
                assert not mib or rest + mib + after.config.gpus[index].cushion_mib <= TOTAL_MIB

    def check_owed(self, before: State, after: State) -> None:
        """Who was loaded for a waiter serves it before it is evicted."""
        for request in before.requests.values():
            now = after.requests.get(request.request)
            if now is not None and now.phase is Phase.QUEUED and request.phase is Phase.JOINED:
                self.owed[request.consumer].add(request.request)
        for effect in self.last:
            if isinstance(effect, fx.StartUnload):
                waiting = {n for n, r in before.requests.items() if r.phase is not Phase.SERVING}
                served = {n for n, r in after.requests.items() if r.phase is Phase.SERVING}
                assert not (self.owed[effect.consumer] & waiting & set(after.requests)) - served

    def check_work_conservation(self) -> None:
        """Unless somebody is promoted, nobody waits who could be served."""
        state = self.state
        bound = state.config.overtake_bound
        if bound is not None and (
            any(count >= bound for count in state.overtaken.values())
            or any(count >= 2 * bound for count in state.overtaken_high.values())
        ):
            return
        victims = {name for swap in state.swaps.values() for name in swap.victims}
        serving = Counter(serving_consumers(state))
        for name in state.queue:
            consumer = state.config.consumers[state.requests[name].consumer]
            assert (
                state.consumers[consumer.name].residency != "resident"
                or consumer.name in victims
                or serving[consumer.name] >= consumer.max_concurrency
                or not _has_slots(consumer, state)
            ), f"{name} could be served"


def _moved(request: RequestState, before: State) -> bool:
    if request.phase is Phase.QUEUED or request.operator is not None:
        return False
    old = before.requests.get(request.request)
    return old is None or old.phase is Phase.QUEUED


def _competes(other: RequestState, waiting: RequestState, state: State) -> bool:
    """Whether they need a card in common, and it does not only wait for a turn at its own."""
    consumers = state.config.consumers
    if other.consumer != waiting.consumer and waiting.consumer in serving_consumers(state):
        return False
    return bool(set(consumers[waiting.consumer].vram_mib) & set(consumers[other.consumer].vram_mib))


def _has_slots(consumer: Consumer, state: State) -> bool:
    for index in consumer.vram_mib:
        most = state.config.gpus[index].max_parallel
        holders = at_work(state, index) | {consumer.name}
        if consumer.gpu_slot and most is not None and len(holders) > most:
            return False
    return True

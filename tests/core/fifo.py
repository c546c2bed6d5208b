"""Run a recording of llama-swap's FIFO against the core.

A recording is a list of steps of that scheduler with the effects it had; its words are translated
to our events and our effects back to its words. Differences come out as readable lines.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Consumer, Gpu
from mgpu_core.effects import Effect
from mgpu_core.state import Phase, State
from tests.core.driver import Core

# More than the longest cool-down passes between two steps; nothing else may run out of time.
BETWEEN_STEPS_S = 400
FOREVER_US = 10**9 * SECOND_US
DEFAULT_LIMIT = 10


class TablePlanner:
    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.table: Mapping[str, list[str]] = setup.get("table", {})

    def victims(self, target: str, view: Any) -> tuple[str, ...]:
        return tuple(self.table.get(target, ()))


class GroupPlanner:
    """A group that swaps has one member in; an exclusive one drives out all but persistent ones."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.groups: Mapping[str, Any] = setup["groups"]
        self.group_of = {m: name for name, g in self.groups.items() for m in g["members"]}

    def victims(self, target: str, view: Any) -> tuple[str, ...]:
        return tuple(m for m in view.running if m != target and self._in_the_way(target, m))

    def _in_the_way(self, target: str, model: str) -> bool:
        own, other = self.group_of[target], self.group_of[model]
        if own == other:
            return bool(self.groups[own]["swap"])
        return bool(self.groups[own]["exclusive"] and not self.groups[other]["persistent"])


class MatrixPlanner:
    """The set with the target in it that costs least to get to; without one it runs alone."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.sets = [chosen for entry in setup["sets"] for chosen in expand(entry["DSL"])]
        self.costs: Mapping[str, int] = setup.get("evict_costs", {})

    def victims(self, target: str, view: Any) -> tuple[str, ...]:
        if target in view.running:
            return ()
        choices = [
            tuple(m for m in view.running if m not in chosen)
            for chosen in self.sets
            if target in chosen
        ]
        return min(choices, key=self._cost, default=tuple(view.running))

    def _cost(self, victims: tuple[str, ...]) -> int:
        return sum(self.costs.get(model, 1) for model in victims)


PLANNERS = {"table": TablePlanner, "group": GroupPlanner, "matrix": MatrixPlanner}


def expand(expression: str) -> list[frozenset[str]]:
    """Expand `a & (b | c)` to the sets it stands for, in order: {a, b} and {a, c}."""
    tokens = iter([*re.findall(r"[&|()]|[^\s&|()]+", expression), ""])
    current = next(tokens)

    def advance() -> str:
        nonlocal current
        taken, current = current, next(tokens, "")
        return taken

    def alternatives() -> list[frozenset[str]]:
        found = together()
        while current == "|":
            advance()
            found += together()
        return found

    def together() -> list[frozenset[str]]:
        found = single()
        while current == "&":
            advance()
            found = [one | other for one, other in itertools.product(found, single())]
        return found

    def single() -> list[frozenset[str]]:
        token = advance()
        if token != "(":
            return [frozenset({token})]
        found = alternatives()
        advance()
        return found

    return alternatives()


class Recording:
    """One scenario under way. `differences` are what the core did otherwise."""

    def __init__(self, scenario: Mapping[str, Any]) -> None:
        setup = scenario["setup"]
        limits = setup.get("limits", {})
        self.steps: list[Mapping[str, Any]] = scenario["steps"]
        self.gone: set[str] = set()
        self.granted: list[str] = []
        self.differences: list[str] = []
        self.core = Core(
            *(
                _consumer(model, limits.get(model) or DEFAULT_LIMIT, setup.get("priority", {}))
                for model in setup["models"]
            ),
            gpus=(Gpu(max_parallel=None),),
            planner=PLANNERS[setup["planner"]](setup),
            overtake_bound=None,
            queue_timeout_us=FOREVER_US,
            load_timeout_us=FOREVER_US,
            unload_timeout_us=FOREVER_US,
        )
        for model, state in sorted(setup["models"].items()):
            self.core.probe(model, resident=state == "ready")

    def run(self) -> list[str]:
        stopped = False
        for number, step in enumerate(self.steps):
            self.core.wait(BETWEEN_STEPS_S)
            absent = {m for m, c in self.core.state.consumers.items() if c.residency == "absent"}
            actual = self._do(step["do"])
            expected = list(_without_stops_of(step["effects"], absent))
            if step.get("unordered"):
                actual, expected = sorted(actual), sorted(expected)
            self._compare(number, "effects", actual, expected)
            stopped = stopped or step["do"]["op"] == "shutdown"
            if not stopped:
                self._compare_state(number, step)
        return self.differences

    # ---------------------------------------------------------------- their steps, our events

    def _do(self, do: Mapping[str, Any]) -> list[str]:
        told: list[str] = getattr(self, f"_{do['op']}")(do)
        while self.gone.intersection(self.core.serving):  # granted to a caller that has gone
            name = min(self.gone.intersection(self.core.serving))
            told += self._send(ev.ServeDone, request=name, outcome="disconnected")
        return told

    def _request(self, do: Mapping[str, Any]) -> list[str]:
        name = str(do["id"])
        if do.get("dead"):
            return self._send(ev.Cancel, request=name)
        if do.get("gone"):
            self.gone.add(name)
        told = self._send(ev.Request, request=name, consumer=do["model"])
        refused = bool(told) and told[0].startswith("reject:")
        return told if refused else [f"admit:{name}", *told]

    def _cancel(self, do: Mapping[str, Any]) -> list[str]:
        return self._send(ev.Cancel, request=str(do["id"]))

    def _serve_done(self, do: Mapping[str, Any]) -> list[str]:
        requests = self.core.state.requests
        serving = [n for n in self.core.serving if requests[n].consumer == do["model"]]
        first = min(serving, key=self.granted.index)
        return self._send(ev.ServeDone, request=first, outcome="ok")

    def _swap_done(self, do: Mapping[str, Any]) -> list[str]:
        core, target = self.core, do["model"]
        error = "load_failed" if do.get("err") else None
        told: list[str] = []
        swap = core.state.swaps.get(target)
        for victim in swap.evicted if swap else ():
            epoch = core.open.pop(("unload", victim))
            told += self._send(ev.UnloadDone, consumer=victim, epoch=epoch)
        epoch = do.get("epoch") or core.open.get(("load", target), 0)
        if epoch:
            told += self._send(ev.SwapDone, consumer=target, epoch=epoch, error=error)
        return told

    def _unload(self, do: Mapping[str, Any]) -> list[str]:
        told = self._send(ev.Unload, consumers=tuple(do["models"]), force=True)
        for model in do["models"]:
            if ("unload", model) in self.core.open:
                epoch = self.core.open.pop(("unload", model))
                told += self._send(ev.UnloadDone, consumer=model, epoch=epoch)
        return told

    def _shutdown(self, do: Mapping[str, Any]) -> list[str]:
        return self._send(ev.Shutdown)

    def _state(self, do: Mapping[str, Any]) -> list[str]:
        """What a swap does to its members is told by `swap_done`; all else a probe sees."""
        model, swaps = do["model"], self.core.state.swaps
        if model in swaps or any(model in swap.victims for swap in swaps.values()):
            return []
        return self._send(
            ev.ProbeResult,
            consumer=model,
            taken=self.core.at,
            healthy=True,
            resident=do["state"] == "ready",
        )

    def _send(self, kind: type, **fields: Any) -> list[str]:
        before = self.core.state
        self.core.send(kind, **fields)
        return list(self._translate(self.core.last, before))

    # ---------------------------------------------------------------- our effects, their words

    def _translate(self, effects: Iterable[Effect], before: State) -> Iterator[str]:
        swaps = {swap.epoch: swap for swap in self.core.state.swaps.values()}
        known = {swap.epoch for swap in before.swaps.values()}
        stops: list[str] = []
        for effect in effects:
            match effect:
                case fx.Serve():
                    self.granted.append(effect.request)
                    word = "serve_failed" if effect.request in self.gone else "serve"
                    yield f"{word}:{effect.request}:{effect.consumer}"
                case fx.Reject():
                    yield _rejection(effect, before)
                case fx.StartUnload() | fx.StartLoad() if effect.epoch in known:
                    pass  # a later step of a swap that was told when it began
                case fx.StartUnload() | fx.StartLoad() if effect.epoch in swaps:
                    known.add(effect.epoch)
                    swap = swaps[effect.epoch]
                    yield f"start:{swap.target}:[{','.join(sorted(swap.victims))}]"
                case fx.StartUnload():
                    stops.append(effect.consumer)
        if stops:
            yield f"stop:[{','.join(sorted(stops))}]"

    # ---------------------------------------------------------------- comparing

    def _compare_state(self, number: int, step: Mapping[str, Any]) -> None:
        state = self.core.state
        queue = [int(name) for name in state.queue]
        active = {
            swap.target: (sorted(swap.victims), [int(n) for n in self.core.waiters(swap.target)])
            for swap in state.swaps.values()
        }
        requests = list(state.requests.values())
        self._compare(number, "queue", queue, step["queue"])
        self._compare(
            number,
            "active",
            active,
            {a["model"]: (sorted(a["evict"]), a["waiters"]) for a in step["active"]},
        )
        serving = [r.consumer for r in requests if r.phase is Phase.SERVING]
        self._compare(number, "in_flight", _counts(serving), step["in_flight"])
        self._compare(number, "reserved", _counts(r.consumer for r in requests), step["reserved"])
        told = {int(name): place for name, place in step.get("positions", {}).items()}
        places = {name: place for place, name in enumerate(queue, start=1)}
        self._compare(number, "positions", {n: places.get(n) for n in told}, told)

    def _compare(self, number: int, what: str, actual: object, expected: object) -> None:
        if actual != expected:
            do = json.dumps(self.steps[number]["do"])
            line = f"step {number} {do}: {what} are {actual}, recorded {expected}"
            self.differences.append(line)


def _consumer(model: str, limit: int, priority: Mapping[str, int]) -> Consumer:
    return Consumer(
        name=model,
        load_route=True,
        unload_route=True,
        priority=priority.get(model, 0),
        max_concurrency=limit,
        max_pending=limit,
    )


def _rejection(effect: fx.Reject, before: State) -> str:
    """Tell a refusal at the door from an error for somebody who was let in."""
    status = {"overloaded": 429, "no_consumer": 404}.get(effect.code)
    if effect.request in before.requests or status is None:
        return f"error:{effect.request}:{effect.consumer}"
    return f"reject:{status}:{effect.request}"


def _counts(names: Iterable[str]) -> dict[str, int]:
    listed = list(names)
    return {name: listed.count(name) for name in sorted(set(listed))}


def _without_stops_of(recorded: Iterable[str], absent: set[str]) -> Iterator[str]:
    """To stop what is absent has no counterpart here."""
    for effect in recorded:
        if effect.startswith("stop:"):
            names = [n for n in effect[len("stop:[") : -1].split(",") if n and n not in absent]
            if names:
                yield f"stop:[{','.join(sorted(names))}]"
        elif effect.startswith("start:"):
            _, target, victims = effect.split(":", 2)
            names = sorted(n for n in victims[1:-1].split(",") if n)
            yield f"start:{target}:[{','.join(names)}]"
        else:
            yield effect

"""Each oracle can fail: a small change of the core that breaks its property is found by it."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from random import Random
from typing import Any
from unittest import mock

import pytest
from attrs import evolve

from mgpu_core import events as ev
from mgpu_core import scheduler as core
from mgpu_core.completions import unloaded
from mgpu_core.draft import Draft
from mgpu_core.memory import free_mib, good_card
from mgpu_core.notes import Reason, Why
from mgpu_core.requests import on_cancel
from mgpu_core.simulation import ORACLES, campaign, first_violation, judged, smallest
from mgpu_core.state import Phase, RequestState, Source
from mgpu_core.swaps import forget
from mgpu_core.transitions import Cause

SEEDS = range(300)
Change = Callable[[], AbstractContextManager[Any]]


def patched(target: str, new: object) -> Change:
    return lambda: mock.patch(target, new)


def handled(kind: type, handler: Callable[[Draft, Any], None]) -> Change:
    return lambda: mock.patch.dict(core.HANDLERS, {kind: handler})


def cancel_ends_the_load(d: Draft, event: ev.Cancel) -> None:
    request = d.requests.get(event.request)
    on_cancel(d, event)
    if request is None or request.phase is not Phase.JOINED or d.joined(request.consumer):
        return
    swap = d.swaps[request.consumer]
    if d.consumers[request.consumer].operation is not None:
        forget(d, swap)
        d.give_up_promise(request.consumer)
        d.move(request.consumer, Cause.LOAD_FAILED, Source.COMMAND)


def any_epoch_will_do(d: Draft, event: ev.UnloadDone) -> None:
    operation = d.consumers[event.consumer].operation
    if operation is not None and operation.kind == "unload":
        unloaded(d, event.consumer, event.error)


def no_loads_beside_work(d: Draft, _consumer: object) -> Reason | None:
    return Reason(why=Why.NO_OVERLAP) if d.serving else None


def promises_forgotten(d: Draft, target: str, gpu: int) -> int | None:
    card = good_card(d, gpu)
    return card.free_mib if card else free_mib(d, target, gpu)


def nobody_is_owed() -> AbstractContextManager[Any]:
    put_back = Draft.enqueue_again
    return mock.patch.object(Draft, "enqueue_again", lambda d, n, owed: put_back(d, n, owed=False))


def waits_stay(d: Draft, request: RequestState) -> int:
    return sum(d._own(counts).pop(request.request) for counts in ("overtaken", "overtaken_high"))


def epochs_of_the_process() -> AbstractContextManager[Any]:
    numbers = itertools.count(1)

    def next_epoch(d: Draft) -> int:
        d.epoch = next(numbers)
        return d.epoch

    return mock.patch.object(Draft, "next_epoch", next_epoch)


CHANGES: dict[str, Change] = {
    "P1": patched("mgpu_core.walk.expire", mock.Mock()),
    "P2": patched("mgpu_core.walk._held_back", lambda *_: None),
    "P3": patched("mgpu_core.planners._smallest", lambda pool, *_: list(pool[:1]) or None),
    "P4": lambda: mock.patch("mgpu_core.memory.is_protected", return_value=False),
    "P5": handled(ev.Cancel, cancel_ends_the_load),
    "P6": handled(ev.UnloadDone, any_epoch_will_do),
    "P7": patched("mgpu_core.memory.free_mib", promises_forgotten),
    "P8": patched("mgpu_core.draft.Draft._count_overtakes", lambda *_: None),
    "P9": patched("mgpu_core.draft.Draft._forget_wait", waits_stay),
    "P10": patched("mgpu_core.walk.no_room", lambda *_: None),
    "P11": epochs_of_the_process,
    "P12": patched(
        "mgpu_core.state.ConsumerState.over_a_restart",
        lambda old, fresh, back=0: evolve(fresh, residency=old.residency, operation=old.operation),
    ),
    "P13": patched("mgpu_core.scheduler.in_order", lambda config: config),
    "P14": patched("mgpu_core.walk._no_overlap", no_loads_beside_work),
    "P15": nobody_is_owed,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CHANGES)
def test_the_oracle_finds_what_breaks_its_property(name: str) -> None:
    alone = {name: ORACLES[name]} if name in ORACLES else {}
    with mock.patch.dict(ORACLES, alone, clear=True), CHANGES[name]():
        found = (report.violation for report in campaign(SEEDS, Random))
        assert any(violation and violation.property == name for violation in found)


@pytest.mark.timeout(300)
def test_what_is_found_is_made_small() -> None:
    with mock.patch("mgpu_core.walk.no_room", return_value=None):
        report = first_violation(SEEDS, Random)
        assert report is not None
        small = smallest(report, Random)
        assert small.violation == judged(small.setting.config, small.history)
        assert len(small.history) < 6

    assert judged(small.setting.config, small.history) is None

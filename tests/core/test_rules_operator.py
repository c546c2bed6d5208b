"""Operators and odd input: unload, load, pin, drain, shutdown, epochs."""

from typing import Any

import pytest

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.codec import encode_state
from mgpu_core.config import SECOND_US, Consumer, Gpu
from tests.core.driver import Core, lazy, service

CARD_16 = (Gpu(total_mib=16_000),)
ANY_SLOTS = (Gpu(total_mib=24_000, max_parallel=None),)

# ------------------------------------------------------------------ unload


def test_unload_fails_who_waits_lets_work_end_and_takes_it_out_when_drained() -> None:
    core = Core(service("a"))
    core.request("work", "a")
    core.request("r1", "a")
    assert core.unload("a") == ["reject r1 unloaded"]
    assert core.request("later", "a") == []
    assert core.finish("work") == ["unload a"]
    assert core.unloaded("a") == ["load a"]
    assert core.loaded("a") == ["serve later"]


def test_an_idle_one_goes_at_once() -> None:
    core = Core(service("a"))
    assert core.unload("a") == ["unload a"]
    core.unloaded("a")
    assert core.residency("a") == "absent"
    assert core.unload("a") == []


def test_while_it_drains_it_is_granted_nothing_more() -> None:
    core = Core(service("a", max_concurrency=2))
    core.request("work", "a")
    core.unload("a")
    assert core.request("r1", "a") == []
    assert core.queue == ["r1"]


def test_by_force_it_goes_though_it_serves() -> None:
    core = Core(service("a"))
    core.request("work", "a")
    assert core.unload("a", force=True) == ["unload a"]
    assert core.serving == ["work"]
    core.unloaded("a")
    core.finish("work")
    assert core.serving == []


def test_a_load_under_way_ends_before_it_is_unloaded_without_force() -> None:
    core = Core(service("a"), absent=["a"])
    core.request("r1", "a")
    assert core.unload("a") == ["reject r1 unloaded"]
    assert core.loaded("a") == ["unload a"]


def test_by_force_a_load_under_way_is_abandoned_and_its_late_end_asks_for_a_probe() -> None:
    core = Core(service("a"), absent=["a"])
    core.request("r1", "a")
    assert core.unload("a", force=True) == ["reject r1 unloaded", "unload a"]
    before = core.state.consumers["a"]
    assert core.loaded("a") == []
    assert core.state.consumers["a"] == before
    assert core.asked_to_probe("a")
    core.unloaded("a")
    assert core.residency("a") == "absent"


def test_without_names_all_go_that_may() -> None:
    core = Core(
        service("a"),
        service("pinned", pinned=True),
        service("managed", vram_managed=True),
        Consumer(name="fixed"),
        service("gone"),
        absent=["gone"],
    )
    assert core.unload() == ["unload a"]


@pytest.mark.parametrize("settings", [{"pinned": True}, {"vram_managed": True}])
def test_a_pinned_or_managed_one_goes_if_it_is_named(settings: dict[str, Any]) -> None:
    core = Core(service("a", **settings))
    assert core.unload("a") == ["unload a"]


def test_what_cannot_be_unloaded_stays_with_a_note() -> None:
    core = Core(Consumer(name="fixed"))
    assert core.unload("fixed", force=True) == []
    assert core.last_notes
    assert core.request("r1", "fixed") == ["serve r1"]


def test_other_consumers_go_on_while_one_unloads() -> None:
    core = Core(service("a"), service("b"))
    core.unload("a")
    assert core.request("r1", "b") == ["serve r1"]


def test_a_unit_that_goes_by_driver_waits_until_its_whole_server_has_drained() -> None:
    core = Core(*(Consumer(name=f"s/{n}", server="s", driver="systemd") for n in "ab"))
    core.request("work", "s/b")
    assert core.unload("s/a") == []
    told = core.finish("work")
    assert told == ["unload s/a by driver"]
    core.unloaded("s/a")
    assert core.residency("s/b") == "absent"


def test_an_unload_that_fails_is_not_tried_again_at_once() -> None:
    core = Core(service("a"))
    core.unload("a")
    assert core.unloaded("a", error="unload_failed") == []
    assert core.wait(4.9) == []


# ------------------------------------------------------------------ load, pin


def test_load_brings_it_in_and_evicts_for_it() -> None:
    core = Core(service("a", 20_000), service("b", 20_000), absent=["b"])
    assert core.load("b") == ["unload a"]
    assert core.unloaded("a") == ["load b"]
    assert core.loaded("b") == []
    assert core.residency("b") == "resident"
    assert core.state.requests == {}
    assert core.load("b") == []


def test_a_load_is_admitted_like_a_request() -> None:
    core = Core(service("a"), service("c"), lazy("lazy"), absent=["a", "c"])
    assert core.load("lazy") == []  # nobody can be told to load it
    core.probe("c", failure="refused")
    assert core.load("c") == []
    core.send(ev.Drain)
    assert core.load("a") == []
    core.send(ev.Resume)
    assert core.load("a") == ["load a"]
    assert core.load("a") == []
    core.loaded("a", error="load_failed")
    assert core.load("a") == []
    assert core.wait(60) == []


def test_a_load_only_into_free_memory_evicts_nobody() -> None:
    core = Core(service("a", 20_000), service("b", 20_000), service("c", 3_000), absent="bc")
    assert core.load("b", only_if_free=True) == []
    assert core.load("c", only_if_free=True) == ["load c"]
    core.loaded("c")
    core.unload("a")
    core.unloaded("a")
    assert core.history("unload") == ["unload a"]


def test_requests_join_a_load_by_an_operator() -> None:
    core = Core(service("a"), absent=["a"])
    core.load("a")
    assert core.request("r1", "a") == []
    assert core.loaded("a") == ["serve r1"]


def test_a_pin_protects_and_an_unpin_lets_go_at_once() -> None:
    core = Core(service("a", 10_000), service("b", 10_000), gpus=CARD_16, absent=["b"])
    core.pin("a")
    assert core.request("r1", "b") == ["reject r1 insufficient_vram"]
    core.pin("a", pinned=False)
    assert core.request("r2", "b") == ["unload a"]


def test_unpinning_lets_what_waits_for_it_start() -> None:
    core = Core(service("a", 10_000), service("x", 2_000), service("b", 12_000), absent=["b"])
    core.sample(free=11_900)
    core.pin("a")
    core.sample(free=11_900)
    assert core.request("r1", "b") == ["unload x"]
    core.cancel("r1")
    core.unloaded("x")
    core.sample(free=11_900)  # 2,100 MiB are nobody's here
    assert core.request("r2", "b") == []
    assert core.pin("a", pinned=False) == ["unload a"]


# ------------------------------------------------------------------ drain, shutdown


def test_drain_lets_what_was_admitted_go_on_and_resume_ends_it() -> None:
    core = Core(service("a"), service("b"), absent=["b"])
    core.request("r1", "a")
    core.request("r2", "b")
    core.send(ev.Drain)
    assert core.request("r3", "a") == ["reject r3 shutting_down"]
    core.loaded("b")
    assert core.finish("r1") == ["serve r2"]
    core.finish("r2")
    core.send(ev.Resume)
    assert core.request("r4", "a") == ["serve r4"]


def test_shutdown_rejects_all_that_waits_and_lets_work_end() -> None:
    core = Core(service("a"), service("b"), absent=["b"])
    core.request("r1", "a")
    core.request("r2", "a")
    core.request("r3", "b")
    told = core.send(ev.Shutdown)
    assert sorted(told) == ["reject r2 shutting_down", "reject r3 shutting_down"]
    assert core.serving == ["r1"]
    assert core.request("r4", "a") == ["reject r4 shutting_down"]
    assert core.finish("r1") == []


# ------------------------------------------------------------------ epochs, odd input


def test_epochs_are_never_used_twice() -> None:
    core = Core(*(service(n, 10_000) for n in "abc"), gpus=CARD_16, absent="abc")
    for number in range(6):
        core.request(f"r{number}", "abc"[number % 3])
        core.answer_all()
        core.finish(f"r{number}")
    core.send(ev.Started, run="run-2")
    core.probe("a", resident=False)
    core.unload(force=True)
    swaps = sorted(set(core.epochs))
    pairs = [
        (e.epoch, e.consumer, type(e).__name__)
        for e in core.effects
        if isinstance(e, fx.StartUnload | fx.StartLoad)
    ]
    assert len(pairs) == len(set(pairs))
    assert core.epochs == sorted(core.epochs)
    assert len(swaps) >= 7


@pytest.mark.parametrize("kind", [ev.UnloadDone, ev.SwapDone])
@pytest.mark.parametrize("error", [None, "failed"])
def test_a_completion_with_an_old_epoch_changes_no_belief(kind: type, error: str | None) -> None:
    core = Core(service("a", 10_000), service("b", 10_000), gpus=CARD_16, absent=["b"])
    core.request("r1", "b")
    core.answer_all()
    core.finish("r1")
    core.request("r2", "a")
    before = core.state
    epoch = before.swaps["a"].epoch - 1
    for name in "ab":
        assert core.send(kind, consumer=name, epoch=epoch, error=error) == []
    assert core.state.consumers == before.consumers
    assert core.state.swaps == before.swaps
    assert core.state.promises == before.promises


def test_a_completion_arrives_once() -> None:
    core = Core(service("a"), absent=["a"])
    core.request("r1", "a")
    epoch = core.open["load", "a"]
    core.loaded("a")
    before = core.state.consumers
    assert core.send(ev.SwapDone, consumer="a", epoch=epoch, error="load_failed") == []
    assert core.state.consumers == before
    assert core.serving == ["r1"]


ODD_INPUT = [
    (ev.Cancel, {"request": "ghost"}),
    (ev.ServeDone, {"request": "ghost"}),
    (ev.ServeDone, {"request": "waiting"}),
    (ev.UnloadDone, {"consumer": "ghost", "epoch": 1}),
    (ev.UnloadDone, {"consumer": "a", "epoch": 999}),
    (ev.SwapDone, {"consumer": "ghost", "epoch": 1}),
    (ev.SwapDone, {"consumer": "a", "epoch": -1, "error": "load_failed"}),
    (ev.Unload, {"consumers": ("ghost",)}),
    (ev.Load, {"consumer": "ghost"}),
    (ev.Pin, {"consumer": "ghost", "pinned": True}),
    (ev.ProbeResult, {"consumer": "ghost", "taken": 1, "healthy": True}),
    (ev.Request, {"request": "working", "consumer": "a"}),
    (ev.Resume, {}),
]


@pytest.mark.parametrize(("kind", "fields"), ODD_INPUT, ids=lambda value: str(value)[:60])
def test_odd_input_leaves_a_note_and_changes_nothing_else(
    kind: type, fields: dict[str, Any]
) -> None:
    core = Core(service("a"), service("b"))
    core.request("working", "a")
    core.request("waiting", "b")
    before = encode_state(core.state)
    assert core.send(kind, **fields) == []
    assert core.last_notes or kind is ev.Resume
    after = encode_state(core.state)
    assert {k: v for k, v in after.items() if k != "at"} == {
        k: v for k, v in before.items() if k != "at"
    }


def test_time_does_not_go_back() -> None:
    core = Core(service("a"))
    last = core.state.at
    core.feed(ev.Tick(at=last - 5 * SECOND_US))
    assert core.state.at == last
    core.feed(ev.Request(at=0, request="r1", consumer="a"))
    assert core.state.at == last
    assert core.serving == ["r1"]


def test_a_reading_of_an_unknown_card_is_left_aside() -> None:
    core = Core(service("a", 10_000), service("b", 10_000), gpus=CARD_16, absent=["b"])
    reading = ev.GpuReading(index=7, total_mib=80_000, used_mib=0, free_mib=80_000)
    core.send(ev.GpuSample, taken=core.at, gpus=(reading,))
    assert core.request("r1", "b") == ["unload a"]

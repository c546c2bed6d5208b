"""What a reviewer's fuzzing found in the core, each on the shortest history that showed it."""

from typing import Any

from mgpu_core import events as ev
from mgpu_core.config import Consumer, Gpu
from mgpu_core.notes import Reason, Why
from tests.core.driver import Core, Table, lazy, service

CARD = (Gpu(total_mib=10_000, cushion_mib=0),)
ANY_SLOTS = (Gpu(total_mib=10_000, cushion_mib=0, max_parallel=None),)


def core_of(*consumers: Consumer, **settings: Any) -> Core:
    return Core(*consumers, **{"gpus": CARD, **settings})


def process(name: str, mib: int, **settings: Any) -> Consumer:
    routes = {"load_route": False, "unload_route": False}
    return service(name, mib, **{**routes, "driver": "process", **settings})


def test_a_victim_that_goes_with_another_ones_server_is_told_once() -> None:
    core = core_of(
        service("a", 4_000, server="s", driver="process"),
        process("b", 4_000, server="s"),
        service("t", 9_000),
        absent=["t"],
    )
    core.probe("a", resident=True)
    core.probe("b", resident=True)
    core.sample(free=2_000)
    assert core.request("r", "t") == ["unload b by driver"]
    core.unloaded("b")
    assert (core.residency("a"), core.residency("b")) == ("absent", "absent")


def test_a_planner_that_names_an_absent_one_for_a_full_resident_does_no_harm() -> None:
    core = core_of(service("a", 100), service("b", 100), planner=Table({"a": ["b"]}), absent=["b"])
    assert core.request("r1", "a") == ["serve r1"]
    assert core.request("r2", "a") == []
    assert core.finish("r1") == ["serve r2"]


def test_a_planner_that_names_nobody_known_does_no_harm() -> None:
    core = core_of(service("a", 100), planner=Table({"a": ["ghost"]}), absent=["a"])
    assert core.request("r1", "a") == ["load a"]


def test_whom_a_swap_counts_out_is_not_served_even_if_it_was_configured_only_now() -> None:
    a, ghost = service("a", 100), service("ghost", 100)
    core = core_of(a, planner=Table({"a": ["ghost"]}), absent=["a"])
    core.request("r1", "a")
    core.reconfigure(a, ghost, gpus=tuple(core.state.config.gpus.values()))
    assert core.residency("ghost") == "resident"
    assert core.request("r2", "ghost") == []
    assert core.state.reasons["r2"] == Reason(why=Why.COLLISION, who=("a",))
    assert core.loaded("a") == ["serve r1"]


def test_a_probe_that_is_refused_before_the_load_leaves_the_promise() -> None:
    core = core_of(service("v", 8_000), process("t", 6_000), service("x", 6_000), absent=["x"])
    core.sample(free=2_000)
    core.request("r1", "t")
    core.probe("t", failure="refused")
    core.unloaded("v")
    assert core.sample(free=10_000) == ["load t"]
    assert core.request("r2", "x") == []


def test_what_another_load_takes_does_not_end_a_cold_starts_promise() -> None:
    core = core_of(
        lazy("l", 4_000),
        service("y", 4_000),
        service("x", 4_000),
        absent=["y", "x"],
        gpus=ANY_SLOTS,
    )
    core.sample(free=10_000)
    core.request("r1", "l")
    core.request("r2", "y")
    core.loaded("y")
    core.sample(free=6_000)
    assert core.request("r3", "x") == []


def test_a_forced_unload_in_mid_load_keeps_the_promise_until_a_sample() -> None:
    core = core_of(service("a", 6_000), service("b", 6_000), absent=["a", "b"])
    core.sample(free=10_000)
    core.request("r1", "a")
    core.unload("a", force=True)
    assert core.request("r2", "b") == []
    assert core.unloaded("a") == []
    assert core.sample(free=10_000) == ["load b"]


def test_a_probe_during_the_swap_does_not_bring_its_victim_back() -> None:
    core = core_of(service("v", 8_000), service("t", 6_000), absent=["t"])
    core.sample(free=2_000)
    core.request("r1", "t")
    core.unloaded("v")
    core.probe("v", resident=True)
    assert core.residency("v") == "absent"


def test_what_a_cold_start_holds_half_way_is_not_its_footprint() -> None:
    core = core_of(lazy("comfy", 8_000), service("m", 4_000), absent=["m"])
    core.request("r1", "comfy")
    core.probe("comfy", vram_mib=500)
    assert core.state.consumers["comfy"].measured_mib is None
    assert core.request("r2", "m") == []


def test_nobody_behind_a_promoted_request_evicts_its_consumer() -> None:
    core = core_of(
        service("p", 5_000),
        service("s", 1_000, max_concurrency=9),
        service("q", 5_000, gpu_slot=False),
        absent=["q"],
        overtake_bound=1,
    )
    core.request("s1", "s")
    core.request("p1", "p")
    core.request("s2", "s")  # overtakes p1, which is promoted by that
    assert core.request("q1", "q") == []
    assert core.residency("p") == "resident"


def test_memory_set_aside_for_a_cold_start_is_given_up_with_the_last_who_is_owed_it() -> None:
    core = core_of(
        lazy("l", 6_000),
        service("s", 1_000, unload_route=False, max_concurrency=9),
        service("p", 5_000),
        absent=["p"],
        overtake_bound=1,
    )
    core.request("s1", "s")
    core.request("l1", "l")
    core.request("p1", "p")
    core.request("l2", "l")
    core.cancel("l1")
    core.request("s2", "s")
    core.finish("s1")
    core.finish("s2")
    assert core.history("load") == ["load p"]


def test_a_cold_start_that_nobody_wants_any_more_keeps_nothing_promised() -> None:
    core = core_of(lazy("l", 6_000, driver="process"), service("x", 9_000), absent=["l", "x"])
    core.sample(free=10_000)
    core.request("r1", "l")
    core.cancel("r1")
    core.loaded("l")
    core.sample(free=4_000)
    assert core.request("r2", "x") == ["unload l"]


def test_an_unload_that_a_pinned_sibling_forbids_locks_nobody_out() -> None:
    core = core_of(process("a", 1_000, server="s"), process("b", 1_000, server="s", pinned=True))
    core.probe("a", resident=True)
    core.probe("b", resident=True)
    core.unload()
    assert core.request("r1", "a") == ["serve r1"]


def test_memory_that_is_coming_free_turns_nobody_away() -> None:
    core = core_of(service("v", 8_000), service("t", 6_000), absent=["t"], when_unfit="reject")
    core.sample(free=2_000)
    core.unload("v")
    assert core.request("r1", "t") == []
    assert core.unloaded("v") == []
    assert core.asked_to_sample()
    assert core.sample(free=10_000) == ["load t"]


def test_the_few_that_make_room_are_found_by_what_they_give_on_the_short_card() -> None:
    big = [
        Consumer(name=f"a{n}", vram_mib={0: 1_000, 1: 9_000}, load_route=True, unload_route=True)
        for n in range(5)
    ]
    core = Core(
        *big,
        service("b1", 4_000),
        service("b2", 4_000),
        service("t", 8_000),
        absent=["t"],
        gpus=(Gpu(total_mib=13_000, cushion_mib=0), Gpu(index=1, total_mib=48_000)),
        max_evictions=2,
    )
    assert sorted(core.request("r1", "t")) == ["unload b1", "unload b2"]


def test_a_probe_that_times_out_while_its_servers_other_model_works_says_nothing() -> None:
    core = core_of(
        service("m1", 1_000, server="o"), service("m2", 1_000, server="o"), probe_failures=1
    )
    core.request("r1", "m1")
    core.probe("m2", failure="timeout")
    assert core.state.consumers["m2"].healthy is not False


def test_a_probe_from_the_future_is_taken_as_one_of_now() -> None:
    core = core_of(service("v", 1_000))
    core.probe("v", taken=core.at + 10**12, busy=True)
    core.wait(60)
    core.probe("v", resident=False)
    assert core.residency("v") == "absent"


def test_a_restart_sets_its_alarm_anew() -> None:
    core = core_of(service("a", 1_000, idle_unload_us=5_000_000))
    core.use("r1", "a")
    before = core.state.wake
    assert before is not None
    core.effects.clear()
    core.feed(ev.Started(at=core.at, run="again"))
    assert core.state.wake in [getattr(effect, "time", None) for effect in core.effects]

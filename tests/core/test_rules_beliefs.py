"""What is believed and done without being asked: probes, idleness, restores, restarts."""

from typing import Any

import pytest

from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Consumer, Gpu
from tests.core.driver import Core, lazy, service

CARD_16 = (Gpu(total_mib=16_000),)
ANY_SLOTS = (Gpu(total_mib=24_000, max_parallel=None),)

# ------------------------------------------------------------------ restart, new configuration


def test_a_restart_forgets_work_and_waits_but_not_what_it_learnt() -> None:
    core = Core(*(service(n, 8_000) for n in "abc"), gpus=(Gpu(total_mib=16_300),), absent="c")
    core.request("r1", "a")
    core.request("r2", "a")
    core.request("r3", "c")
    assert core.open.keys() == {("unload", "b")}
    old = max(core.epochs)
    core.send(ev.Started, run="run-2")
    assert core.state.requests == {}
    assert core.state.queue == ()
    assert core.state.swaps == {}
    assert core.state.promises == {}
    assert core.finish("r1") == []
    assert core.unloaded("b") == []
    assert core.residency("b") == "resident"
    assert core.unload("a") == []  # its work of before may go on, until it says otherwise
    assert core.probe("a") == ["unload a"]
    assert core.open["unload", "a"] > old


def test_a_restart_remembers_who_was_used_longest_ago() -> None:
    core = Core(*(service(n, 8_000) for n in "abc"), gpus=(Gpu(total_mib=16_300),), absent="c")
    core.use("r1", "b")
    core.use("r2", "a")
    core.send(ev.Started, run="run-2")
    core.probe("c", resident=False)
    assert core.request("r3", "c") == ["unload b"]


def test_a_restart_keeps_a_cool_down() -> None:
    core = Core(service("a"), absent=["a"])
    for number in range(4):
        core.request(f"r{number}", "a")
        core.loaded("a", error="load_failed")
        core.wait(41)
    core.request("last", "a")
    core.loaded("a", error="load_failed")
    core.send(ev.Started, run="run-2")
    core.probe("a", resident=False)
    assert core.request("r9", "a") == ["reject r9 load_failed"]


def test_after_a_restart_residency_is_assumed_anew() -> None:
    core = Core(lazy("c", 8_000), service("a", 8_000), absent=["a"])
    core.use("r1", "c")
    core.send(ev.Started, run="run-2")
    assert (core.residency("c"), core.residency("a")) == ("absent", "resident")


def test_a_new_configuration_keeps_what_is_resident_and_admitted() -> None:
    core = Core(service("a", 7_000), service("b", 7_000), service("c", 7_000), absent=["b"])
    core.request("work", "a")
    core.request("r1", "c")
    core.request("r2", "b")
    told = core.reconfigure(
        service("a", 7_000), service("b", 7_000), service("c", 7_000), lazy("new", 9_000)
    )
    assert told == []
    assert core.residency("new") == "absent"
    assert core.serving == ["work"]
    assert core.loaded("b") == []
    assert core.finish("work") == ["serve r1"]
    assert core.finish("r1") == ["serve r2"]


def test_a_new_configuration_takes_effect_at_once() -> None:
    core = Core(service("a"))
    core.request("r1", "a")
    core.request("r2", "a")
    assert core.reconfigure(service("a", max_concurrency=2)) == ["serve r2"]
    assert core.reconfigure(service("a")) == []
    core.request("r3", "a")
    assert core.finish("r1") == []
    assert core.finish("r2") == ["serve r3"]


def test_who_left_the_configuration_ends_its_work_and_takes_no_more() -> None:
    core = Core(service("a", 8_000), service("b", 8_000))
    core.request("work", "a")
    core.request("r1", "a")
    assert core.reconfigure(service("b", 8_000)) == []
    assert core.request("r2", "a") == ["reject r2 no_consumer"]
    assert core.finish("work") == ["serve r1"]
    core.finish("r1")
    assert core.request("r3", "b") == ["serve r3"]


# ------------------------------------------------------------------ who can be started


def test_a_process_does_not_run_yet_and_a_container_may() -> None:
    core = Core(Consumer(name="p", driver="process"), Consumer(name="c", driver="container"))
    assert (core.residency("p"), core.residency("c")) == ("absent", "unknown")
    core.send(ev.Started, run="run-2")
    assert (core.residency("p"), core.residency("c")) == ("absent", "unknown")


def test_before_its_first_probe_a_container_is_started_though_it_may_run() -> None:
    core = Core(Consumer(name="c", driver="container", vram_mib={0: 8_000}), gpus=CARD_16)
    assert core.request("r1", "c") == ["load c"]
    assert core.loaded("c") == ["serve r1"]


def test_before_its_first_probe_a_container_may_hold_its_memory() -> None:
    container = Consumer(name="c", driver="container", vram_mib={0: 12_000})
    core = Core(container, service("a", 12_000), gpus=CARD_16, absent=["a"])
    assert core.request("r1", "a") == ["unload c by driver"]
    assert core.unloaded("c") == ["load a"]
    assert core.residency("c") == "absent"


@pytest.mark.parametrize(
    ("routes", "seen", "told"),
    [
        ({}, {"resident": True}, "resident"),
        ({}, {"failure": "refused"}, "absent"),
        ({"load_route": True, "unload_route": True}, {}, "resident"),
        ({"unload_route": True}, {}, "absent"),
    ],
)
def test_the_first_probe_tells_what_a_container_holds(
    routes: dict[str, bool], seen: dict[str, Any], told: str
) -> None:
    core = Core(Consumer(name="c", driver="container", vram_mib={0: 12_000}, **routes))
    core.wait(1)
    core.probe("c", **seen)
    assert core.residency("c") == told


# ------------------------------------------------------------------ probes


def test_a_probe_wins_over_an_assumption_and_over_an_older_command() -> None:
    core = Core(service("a"))
    core.probe("a", resident=False)
    assert core.residency("a") == "absent"
    core.load("a")
    core.loaded("a")
    core.probe("a", resident=False)
    assert core.residency("a") == "absent"
    assert core.state.consumers["a"].source.value == "probe"
    core.probe("a", resident=None)
    assert core.residency("a") == "absent"


def test_of_two_probes_the_later_one_counts_whenever_it_arrives() -> None:
    core = Core(service("a"))
    core.wait(1)
    earlier = core.at
    core.wait(1)
    core.probe("a", resident=False)
    core.probe("a", taken=earlier, resident=True)
    assert core.residency("a") == "absent"


def test_refused_means_absent_and_healthy_again_the_start_assumption() -> None:
    core = Core(service("a", 8_000), lazy("c", 8_000))
    core.use("r1", "c")
    for name in ("a", "c"):
        core.probe(name, failure="refused")
        assert core.residency(name) == "absent"
        core.probe(name)
    assert (core.residency("a"), core.residency("c")) == ("resident", "absent")


def test_refused_drops_its_promise() -> None:
    core = Core(service("a", 12_000), service("b", 12_000), gpus=CARD_16, absent="ab")
    core.sample(free=15_900)
    core.request("r1", "a")
    core.loaded("a")
    core.finish("r1")
    assert core.state.promises.keys() == {"a"}
    core.probe("a", failure="refused")
    assert core.state.promises == {}
    assert core.request("r2", "b") == ["load b"]


def test_a_flapping_service_changes_no_belief_about_residency() -> None:
    core = Core(service("a"))
    for _ in range(5):
        core.probe("a", failure="status")
        core.probe("a")
    assert core.residency("a") == "resident"
    assert core.request("r1", "a") == ["serve r1"]


def busy_victim() -> Core:
    core = Core(service("a", 10_000), service("b", 10_000), gpus=CARD_16, absent=["b"])
    core.probe("a", busy=True)
    assert core.request("r1", "b") == []
    return core


def test_busy_protects_for_two_probe_intervals() -> None:
    core = busy_victim()
    assert core.wait(9.9) == []
    assert core.wait(0.2) == ["unload a"]


def test_busy_ends_when_a_probe_says_so() -> None:
    core = busy_victim()
    assert core.probe("a", busy=False) == ["unload a"]


def test_busy_with_our_own_work_is_not_busy_for_someone_else() -> None:
    core = Core(service("a", 10_000), service("b", 10_000), gpus=CARD_16, absent=["b"])
    core.request("work", "a")
    core.wait(1)
    during = core.at
    core.finish("work")
    core.probe("a", taken=during, busy=True)
    assert core.request("r1", "b") == ["unload a"]


def test_busy_for_someone_else_does_not_keep_our_requests_out() -> None:
    core = Core(service("a"))
    core.probe("a", busy=True)
    assert core.request("r1", "a") == ["serve r1"]


# ------------------------------------------------------------------ by itself


def test_an_idle_one_is_unloaded_after_its_time() -> None:
    core = Core(service("a", idle_unload_us=60 * SECOND_US))
    core.wait(30)
    core.use("r1", "a")
    assert core.wait(59) == []
    assert core.wait(2) == ["unload a"]
    core.unloaded("a")
    assert core.wait(300) == []


def test_idle_time_begins_anew_with_each_work() -> None:
    core = Core(service("a", idle_unload_us=60 * SECOND_US))
    core.use("r1", "a")
    core.wait(40)
    core.request("r2", "a")
    core.wait(100)
    core.finish("r2")
    assert core.wait(59) == []
    assert core.wait(2) == ["unload a"]


@pytest.mark.parametrize("settings", [{"pinned": True}, {"vram_managed": True}])
def test_a_pinned_or_managed_one_is_never_unloaded_for_idleness(settings: dict[str, Any]) -> None:
    core = Core(service("a", idle_unload_us=60 * SECOND_US, **settings))
    core.use("r1", "a")
    assert core.wait(600) == []


def test_an_idle_unit_stays_while_its_server_works_if_only_a_driver_can_stop_it() -> None:
    core = Core(
        Consumer(name="s/a", server="s", driver="systemd", idle_unload_us=60 * SECOND_US),
        Consumer(name="s/b", server="s", driver="systemd"),
    )
    core.use("r0", "s/a")
    core.request("long", "s/b")
    assert core.wait(100) == []


def test_an_idle_unload_that_fails_is_not_tried_again_at_once() -> None:
    core = Core(service("a", idle_unload_us=60 * SECOND_US))
    core.use("r1", "a")
    assert core.wait(61) == ["unload a"]
    assert core.unloaded("a", error="unload_failed") == []
    assert core.wait(4.9) == []


def test_it_stays_while_something_waits_for_it() -> None:
    core = Core(service("x"), service("a", idle_unload_us=60 * SECOND_US))
    core.use("r0", "a")
    core.request("long", "x")
    core.request("r1", "a")
    assert core.wait(100) == []
    assert core.finish("long") == ["serve r1"]


def restoring(**settings: Any) -> Core:
    """a, to be preloaded, was evicted for b, which is idle now."""
    core = Core(
        service("a", 10_000, preload=True, **settings),
        service("b", 10_000),
        gpus=CARD_16,
        absent=["b"],
        restore_after_us=60 * SECOND_US,
    )
    core.use("r0", "a")
    core.request("r1", "b")
    core.answer_all()
    core.finish("r1")
    return core


def test_the_preload_set_comes_back_only_into_free_memory() -> None:
    core = restoring()
    assert core.wait(300) == []
    assert core.residency("a") == "absent"


def test_a_restore_comes_after_its_time_and_once_per_idle_period() -> None:
    core = restoring()
    core.probe("b", resident=False)
    assert core.wait(55) == []
    assert core.wait(6) == ["load a"]
    core.loaded("a", error="load_failed")
    assert core.wait(1_000) == []
    assert core.request("r2", "b") == ["unload a"]  # nobody knows what the failed load left
    core.answer_all()
    core.finish("r2")
    core.probe("b", resident=False)
    assert core.wait(61) == ["load a"]


def test_a_restored_one_starts_no_idle_clock() -> None:
    core = restoring(idle_unload_us=30 * SECOND_US)
    core.probe("b", resident=False)
    assert core.wait(61) == ["load a"]
    core.loaded("a")
    assert core.wait(600) == []
    assert core.residency("a") == "resident"


def test_work_puts_a_restore_off() -> None:
    core = restoring()
    core.probe("b", resident=False)
    core.wait(50)
    core.reconfigure(
        service("a", 10_000, preload=True),
        service("b", 10_000),
        service("cpu", vram_mib={}),
        gpus=CARD_16,
        restore_after_us=60 * SECOND_US,
    )
    core.use("r2", "cpu")
    assert core.wait(55) == []
    assert core.wait(6) == ["load a"]


def test_the_card_of_a_laptop_may_be_none_at_all() -> None:
    core = Core(service("a", vram_mib={}), service("b", vram_mib={}), gpus=(), absent=["b"])
    assert core.request("r1", "a") == ["serve r1"]
    assert core.request("r2", "b") == ["load b"]
    assert core.loaded("b") == ["serve r2"]


def test_the_total_of_a_sample_stands_in_for_one_that_is_not_configured() -> None:
    cards = (Gpu(index=0),)
    core = Core(service("a", 10_000), service("b", 10_000), gpus=cards, absent=["b"])
    reading = ev.GpuReading(index=0, total_mib=16_000, used_mib=10_000, free_mib=6_000)
    core.send(ev.GpuSample, taken=core.at, gpus=(reading,))
    assert core.request("r1", "b") == ["unload a"]


def test_who_left_the_configuration_keeps_its_memory_until_a_sample_shows_it_free() -> None:
    core = Core(service("a", 13_000), service("b", 13_000), absent=["a", "b"])
    core.sample(free=24_000)
    core.request("r1", "a")
    core.loaded("a")
    core.finish("r1")
    core.reconfigure(service("b", 13_000))
    core.unload("a", force=True)
    core.request("r2", "b")
    assert core.unloaded("a") == []
    assert core.request("r3", "b") == []  # the last sample is from before the load of a
    assert core.sample(free=24_000) == ["load b"]
    assert "a" not in core.state.consumers

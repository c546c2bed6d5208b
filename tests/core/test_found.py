"""Defects that tests over HTTP found in the core, each on the shortest history that showed it."""

from attrs import evolve

from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Gpu
from mgpu_core.draft import Draft
from mgpu_core.memory import view_for
from tests.core.driver import Core, lazy, service

CARD = (Gpu(total_mib=15_000),)


def test_what_a_victim_took_since_the_last_sample_is_not_free_when_it_accepts_to_unload() -> None:
    core = Core(
        lazy("a", 11_000), service("b", 2_800), service("c", 8_000), gpus=CARD, absent=["b", "c"]
    )
    core.sample(free=12_000)
    core.use("r1", "a")
    assert core.request("r2", "b") == ["unload a"]
    assert core.request("r3", "c") == []
    assert core.unloaded("a") == []
    assert core.sample(free=6_900) == ["load b"]


def test_what_a_failed_first_request_took_is_promised_until_the_next_sample() -> None:
    core = Core(lazy("a", 11_000), service("c", 8_000), gpus=CARD, absent=["c"])
    core.sample(free=12_000)
    assert core.request("r1", "a") == ["serve r1"]
    assert core.request("r2", "c") == []
    assert core.finish("r1", outcome="disconnected") == []
    assert core.sample(free=12_000) == ["load c"]


def test_a_first_request_whose_client_left_leaves_a_service_that_can_be_unloaded() -> None:
    """The card showed its memory taken: it is in, however that request ended."""
    core = Core(lazy("a", 11_000), service("c", 8_000), gpus=CARD, absent=["c"])
    core.sample(free=15_000)
    core.request("r1", "a")
    core.sample(free=4_000)
    core.finish("r1", outcome="disconnected")
    assert core.residency("a") == "resident"
    assert core.request("r2", "c") == ["unload a"]


def test_the_same_where_the_card_is_read_only_after_the_client_left() -> None:
    core = Core(lazy("a", 11_000), service("c", 8_000), gpus=CARD, absent=["c"])
    core.sample(free=15_000)
    core.request("r1", "a")
    core.finish("r1", outcome="disconnected")
    assert core.residency("a") == "unknown"
    core.sample(free=4_000)
    assert core.residency("a") == "resident"


def test_a_leaky_victim_is_stopped_by_its_driver_where_nobody_else_can_make_room() -> None:
    core = Core(
        service("a", 11_000, driver="systemd"), service("b", 8_000), gpus=CARD, absent=["b"]
    )
    core.sample(free=4_000)
    assert core.request("r1", "b") == ["unload a"]
    core.unloaded("a")
    for _ in range(11):
        core.wait(1)
        core.sample(free=4_000)
    assert core.history("unload") == ["unload a", "unload a by driver"]
    core.unloaded("a")
    assert core.sample(free=15_000) == ["load b"]


def test_a_leaky_service_without_a_driver_can_still_be_served_and_told_to_go() -> None:
    core = Core(service("a", 11_000), service("b", 8_000), gpus=CARD, absent=["b"])
    core.sample(free=4_000)
    core.request("r1", "b")
    core.unloaded("a")
    for _ in range(11):
        core.wait(1)
        core.sample(free=4_000)
    assert core.state.consumers["a"].leaky_mib == 0
    assert core.request("r2", "a") == ["load a"]  # the memory that it holds counts for itself


def test_a_footprint_on_auto_is_what_the_card_showed_more_after_a_lone_load() -> None:
    core = Core(service("a", vram_auto=True), service("b", 8_000), gpus=CARD, absent=["a", "b"])
    core.sample(free=14_000)
    assert core.request("r1", "a") == ["load a"]
    core.loaded("a")
    core.sample(free=5_000)
    assert core.state.consumers["a"].measured_mib == 9_000
    core.finish("r1")
    assert core.request("r2", "b") == ["unload a"]


def test_a_footprint_on_auto_is_not_taken_while_others_move() -> None:
    core = Core(service("a", vram_auto=True), service("b", 3_000), gpus=CARD, absent=["a", "b"])
    core.sample(free=14_000)
    core.request("r1", "a")
    core.request("r2", "b")
    core.loaded("a")
    core.loaded("b")
    core.sample(free=2_000)
    assert core.state.consumers["a"].measured_mib is None


# The simulated world of tests/sim found these.


def test_a_lazy_service_at_work_for_somebody_else_is_not_told_to_let_go() -> None:
    core = Core(lazy("a", 11_000), gpus=CARD)
    core.sample(free=4_000)
    core.probe("a", busy=True)
    assert core.request("r1", "a") == []
    assert core.probe("a", busy=False) == ["unload a"]


def test_a_lazy_service_is_not_told_to_let_go_while_it_serves() -> None:
    """Its first request failed, and a second one is served still."""
    core = Core(lazy("a", 11_000, max_concurrency=2), gpus=CARD)
    core.sample(free=15_000)
    core.request("r1", "a")
    core.request("r2", "a")
    core.sample(free=10_500)
    core.finish("r1", outcome="upstream_error")
    core.sample(free=10_500)
    assert core.request("r3", "a") == []
    assert core.finish("r2", outcome="upstream_error") == ["unload a"]


def test_who_came_in_while_a_swap_unloaded_is_not_forgotten_where_no_sample_tells() -> None:
    core = Core(
        service("a", 11_000), service("b", 8_000), service("c", 9_000), gpus=CARD, absent=["b", "c"]
    )
    assert core.request("r1", "b") == ["unload a"]
    core.probe("c", resident=True)
    assert core.unloaded("a") == ["unload c"]
    assert core.unloaded("c") == ["load b"]


def test_what_refused_once_while_it_served_is_taken_for_loaded_when_it_has_served() -> None:
    """It answered again in the middle of its work, and was held for empty ever after."""
    core = Core(service("a", 11_000), gpus=CARD)
    assert core.request("r1", "a") == ["serve r1"]
    core.probe("a", failure="refused")
    core.probe("a")
    assert core.residency("a") == "absent"
    core.finish("r1")
    core.probe("a")
    assert core.residency("a") == "resident"


def test_memory_cleared_for_a_cold_start_is_not_there_when_another_came_back_unsampled() -> None:
    core = Core(service("x"), service("a", 11_000), lazy("f", 8_000), gpus=CARD, absent=["a"])
    assert core.request("r1", "x") == ["serve r1"]
    assert core.request("r2", "f") == []  # its memory is set aside, the slot is not free
    core.probe("a", resident=True)
    assert core.finish("r1") == ["unload a"]
    assert core.unloaded("a") == ["serve r2"]


def test_a_load_that_fails_after_an_unload_that_failed_leaves_a_victim() -> None:
    """It was never unloaded, so it holds its memory still; no probe tells. Others wait for ever."""
    core = Core(service("a", 11_000), service("b", 8_000), gpus=CARD, absent=["b"])
    core.sample(free=4_000)
    core.request("r1", "b")
    core.unloaded("a", error="unload_failed")
    core.cancel("r1")
    core.sample(free=4_000)
    assert core.request("r2", "a") == ["load a"]
    core.loaded("a", error="load_failed")
    core.wait(20)
    core.sample(free=4_000)
    assert core.request("r3", "b") == ["unload a"]


def test_what_a_failed_load_left_makes_room_for_others() -> None:
    """It came in after all, when its time was over: its probe doesn't tell, but the card shows it.

    It gains nothing as a victim, so no plan counts on it. But it need not stay for ever either.
    """
    core = Core(service("a", 11_000), service("b", 8_000), gpus=CARD, absent=["a", "b"])
    core.sample(free=15_000)
    assert core.request("r1", "a") == ["load a"]
    core.loaded("a", error="timeout")
    core.sample(free=4_000)
    assert core.request("r2", "b") == []
    assert [core.wait(5) + core.sample(free=4_000) for _ in range(2)] == [[], ["unload a"]]
    assert core.unloaded("a") == []
    assert core.sample(free=15_000) == ["load b"]


def test_what_a_failed_load_left_is_asked_to_go_only_once() -> None:
    core = Core(service("a", 11_000), service("b", 8_000), gpus=CARD, absent=["a", "b"])
    core.sample(free=15_000)
    core.request("r1", "a")
    core.loaded("a", error="timeout")
    core.sample(free=4_000)
    core.request("r2", "b")
    assert [core.wait(5) + core.sample(free=4_000) for _ in range(2)] == [[], ["unload a"]]
    core.unloaded("a")
    assert not any(core.wait(5) + core.sample(free=4_000) for _ in range(8))


def test_who_was_brought_up_for_nobody_gives_back_what_is_set_aside_for_it() -> None:
    """Its driver has started it, so it holds nothing yet. Its load takes more than it keeps."""
    a = lazy("a", 4_000, vram_load_mib=11_000, driver="systemd")
    core = Core(a, service("b", 10_000), gpus=CARD, absent=["a", "b"])
    core.sample(free=15_000)
    core.load("a")
    core.loaded("a")
    core.sample(free=15_000)
    assert core.request("r1", "b") == ["unload a"]
    assert core.unloaded("a") == []
    assert core.sample(free=15_000) == ["load b"]
    assert core.state.consumers["a"].leaky_mib is None


def test_an_unload_is_not_believed_where_another_load_has_taken_its_room() -> None:
    """No reading is newer than the unload, so it is believed. But there is no room for two."""
    core = Core(
        service("a", 11_000),
        service("b", 11_000),
        lazy("c", 8_000),
        gpus=CARD,
        absent=["b", "c"],
        poll_interval_us=10 * SECOND_US,
    )
    core.sample(free=14_000)  # it does not show yet what a holds
    assert core.request("r1", "b") == ["load b"]
    assert core.request("r2", "c") == ["unload a"]
    core.unloaded("a")
    assert core.wait(20) == []
    assert core.loaded("b") == ["serve r1"]
    core.sample(free=4_000)
    assert core.finish("r1") == ["unload b"]


def test_who_refused_connections_for_a_moment_may_hold_its_memory_still() -> None:
    """A lazy one counts as empty when it is back; where it was never gone, the card shows it."""
    core = Core(lazy("a", 11_000), service("b", 8_000), gpus=CARD, absent=["b"])
    core.sample(free=15_000)
    core.use("r1", "a")
    core.sample(free=4_000)
    core.probe("a", failure="refused")
    core.probe("a")
    assert core.request("r2", "b") == []
    assert [core.wait(5) + core.sample(free=4_000) for _ in range(2)] == [[], ["unload a"]]


def test_who_left_the_configuration_is_held_to_the_new_limit_of_its_server() -> None:
    """a is gone from the file and works on; then its server may do as much as it likes."""
    a, b = (service(name, 2_000, server="s", server_concurrency=2) for name in "ab")
    wide = (Gpu(total_mib=15_000, max_parallel=None),)
    core = Core(a, b, gpus=wide)
    core.sample(free=10_000)
    core.request("r1", "a")
    core.reconfigure(b, gpus=wide)
    assert core.request("r2", "b") == ["serve r2"]
    core.reconfigure(evolve(b, server_concurrency=None), gpus=wide)
    assert core.state.config.consumers["a"].server_concurrency is None


def test_who_was_seen_out_and_is_in_again_is_no_longer_leaky() -> None:
    """Its next load clears the mark, also one that we gave up, or never asked for."""
    core = Core(service("a", 11_000), service("b", 8_000), gpus=CARD, absent=["b"])
    core.sample(free=4_000)
    core.request("r1", "b")
    core.unloaded("a")
    for _ in range(4):
        core.wait(3)
        core.sample(free=4_000)
    assert core.state.consumers["a"].leaky_mib == 0
    core.probe("a", resident=False)
    assert core.state.consumers["a"].leaky_mib == 0
    assert core.probe("a", resident=True) == ["unload a"]
    assert core.state.consumers["a"].leaky_mib is None


def test_a_lazy_one_of_unknown_size_is_measured_once_its_first_request_is_over() -> None:
    """A reading during its cold start shows nothing of it yet, or half."""
    core = Core(lazy("a", 0, vram_auto=True), gpus=CARD)
    core.sample(free=15_000)
    core.request("r1", "a")
    core.sample(free=15_000)
    core.sample(free=12_000)
    core.finish("r1")
    core.sample(free=8_000)
    assert core.state.consumers["a"].measured_mib == 7_000


def test_who_may_have_been_in_use_before_a_restart_is_told_to_unload_where_it_is_in_the_way() -> (
    None
):
    """It does not tell whether it is loaded, so it is taken for empty; the card shows otherwise."""
    core = Core(lazy("a", 11_000), service("b", 8_000), gpus=CARD, absent=["b"])
    core.sample(free=4_000)
    assert core.request("r1", "b") == []
    assert core.sample(free=4_000) == []  # its first probe may still say more
    assert core.wait(10) + core.sample(free=4_000) == ["unload a"]
    core.unloaded("a")
    assert core.sample(free=15_000) == ["load b"]


def test_a_leaky_service_is_told_once_more_where_nobody_else_can_make_room() -> None:
    """It was only taken for loaded when its unload gave nothing; since then it really is."""
    core = Core(service("a", 11_000), service("b", 8_000), gpus=CARD, absent=["b"])
    core.sample(free=4_000)
    core.request("r1", "b")
    core.unloaded("a")
    for _ in range(4):
        core.wait(3)
        core.sample(free=4_000)
    core.probe("a")
    core.probe("a", resident=True)
    assert core.state.consumers["a"].leaky_mib == 0
    assert core.wait(9) + core.sample(free=4_000) == []
    assert core.wait(2) + core.sample(free=4_000) == ["unload a"]
    core.unloaded("a")
    assert core.sample(free=15_000) == ["load b"]


def test_who_is_back_and_tells_nothing_has_not_shown_that_it_holds_nothing() -> None:
    """The load that force broke off may have taken memory that no reading shows yet."""
    a = lazy("a", 8_000, driver="systemd")
    core = Core(a, service("b", 11_000), gpus=CARD, absent=["b"])
    core.probe("a", failure="refused")
    core.sample(free=15_000)
    assert core.request("r1", "a") == ["load a"]
    core.unload("a", force=True)
    assert core.request("r2", "b") == []
    assert core.unloaded("a") == []
    assert core.probe("a") == []
    assert core.sample(free=15_000) == ["load b"]


def test_a_server_that_was_started_for_one_model_holds_no_other() -> None:
    """Both are loaded by route; the unit was down, and is started to load b."""
    unit = {"server": "s", "driver": "systemd"}
    core = Core(service("a", 8_000, **unit), service("b", 8_000, **unit), gpus=CARD)
    core.sample(free=15_000)
    core.probe("a", failure="refused")
    core.probe("b", failure="refused")
    assert core.request("r1", "b") == ["load b"]
    assert core.request("r2", "a") == []
    assert core.probe("a") == []  # it answers, and does not tell what is loaded
    assert core.loaded("b") == ["serve r1"]


def test_what_the_last_run_left_at_work_is_not_cut_before_the_first_look_at_it() -> None:
    """A render goes on when the broker dies; the next run's first request would have evicted it."""
    core = Core(service("a", 11_000), service("b", 8_000), gpus=CARD, absent=["b"])
    core.sample(free=4_000)
    core.request("r1", "a")
    core.send(ev.Started, run="run-2")
    core.sample(free=4_000)
    core.probe("b", resident=False)
    assert core.request("r2", "b") == []
    assert core.probe("a", resident=True, busy=True) == []
    assert core.wait(5) + core.probe("a", resident=True, busy=False) == ["unload a"]


def test_but_one_that_tells_nothing_of_its_work_is_not_waited_for() -> None:
    core = Core(service("a", 11_000), service("b", 8_000), gpus=CARD, absent=["b"])
    core.sample(free=4_000)
    core.request("r1", "a")
    core.send(ev.Started, run="run-2")
    core.sample(free=4_000)
    core.probe("b", resident=False)
    assert core.request("r2", "b") == []
    assert core.probe("a", resident=True) == ["unload a"]


def test_nor_one_that_answers_no_probe_for_longer_than_two_of_them() -> None:
    core = Core(service("a", 11_000), service("b", 8_000), gpus=CARD, absent=["b"])
    core.sample(free=4_000)
    core.request("r1", "a")
    core.send(ev.Started, run="run-2")
    core.sample(free=4_000)
    core.probe("b", resident=False)
    assert core.request("r2", "b") == []
    assert core.wait(9) + core.sample(free=4_000) == []
    assert core.wait(2) + core.sample(free=4_000) == ["unload a"]


def test_a_model_that_waits_for_a_place_at_its_server_is_not_brought_in_again_and_again() -> None:
    """Its process runs, it loads with its first request, and each probe says that it is not in."""
    unit = {"server": "s", "driver": "process", "server_concurrency": 1}
    core = Core(lazy("a", 4_000, **unit), lazy("b", 4_000, **unit), gpus=CARD)
    core.sample(free=15_000)
    for name in ("a", "b"):
        core.probe(name, failure="refused")
    assert core.request("r1", "a") == ["load a"]
    assert core.loaded("a") == ["serve r1"]
    assert core.request("r2", "b") == ["load b"]
    assert core.loaded("b") == []
    assert core.wait(2) + core.probe("b", resident=False) == []
    assert core.finish("r1") == ["serve r2"]
    core.finish("r2")
    core.probe("b", resident=False)
    assert core.residency("b") == "absent"


def test_the_stop_of_a_leaky_one_that_was_declared_smaller_takes_no_memory() -> None:
    """It leaked more than it is said to hold since the configuration was read anew."""
    core = Core(service("a", 8_000, driver="systemd"), service("b", 8_000))
    consumers = core.state.consumers
    leaky = evolve(consumers["a"], leaky_mib=9_000)
    draft = Draft(evolve(core.state, consumers={**consumers, "a": leaky}), 1, None)
    seen = view_for(draft, "b", max_evictions=5, by_driver=True)
    assert seen.holders["a"].gain_mib == {0: 0}

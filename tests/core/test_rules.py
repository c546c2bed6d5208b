"""A request's way: it is served, joins, queues, starts a swap, and how its wait ends."""

import pytest

from mgpu_core.config import SECOND_US, Consumer, Gpu
from mgpu_core.events import Request
from mgpu_core.state import Counters
from tests.core.driver import CARD, STEP_US, Core, Table, lazy, service

TWO_CARDS = (Gpu(index=0, total_mib=24_000), Gpu(index=1, total_mib=24_000))
TWO_SLOTS = (Gpu(total_mib=24_000, max_parallel=2),)
ANY_SLOTS = (Gpu(total_mib=24_000, max_parallel=None),)

# ------------------------------------------------------------------ served, joined, queued


def test_one_consumer_at_work_takes_one_slot_and_serves_up_to_its_max_concurrency_in_it() -> None:
    core = Core(service("a", max_concurrency=2), service("b"))
    assert core.request("a1", "a") == ["serve a1"]
    assert core.request("a2", "a") == ["serve a2"]
    assert core.request("a3", "a") == []
    assert core.request("b1", "b") == []
    assert core.finish("a1") == ["serve a3"]
    assert core.finish("a2") == []
    assert core.finish("a3") == ["serve b1"]


@pytest.mark.parametrize(("slots", "served"), [(1, 1), (2, 2), (None, 3)])
def test_max_parallel_is_the_number_of_consumers_at_work(slots: int | None, served: int) -> None:
    core = Core(*(service(n) for n in "abc"), gpus=(Gpu(total_mib=24_000, max_parallel=slots),))
    for name in "abc":
        core.request(name, name)
    assert len(core.serving) == served


@pytest.mark.parametrize(
    "free", [service("free", gpu_slot=False), service("free", vram_mib={})], ids=["slot", "cpu"]
)
def test_who_needs_no_slot_is_served_beside_everything(free: Consumer) -> None:
    core = Core(service("x"), free)
    core.request("long", "x")
    assert core.request("r1", "free") == ["serve r1"]
    assert core.request("r2", "free") == []  # its own max_concurrency counts all the same


def test_a_consumer_on_two_cards_takes_a_slot_of_each_or_none() -> None:
    core = Core(
        service("a"),
        service("b", vram_mib={1: 0}),
        service("both", vram_mib={0: 0, 1: 0}),
        gpus=TWO_CARDS,
    )
    core.request("a1", "a")
    assert core.request("wide", "both") == []
    assert core.request("b1", "b") == ["serve b1"]
    assert core.finish("a1") == []
    assert core.finish("b1") == ["serve wide"]
    assert core.request("a2", "a") == []
    assert core.request("b2", "b") == []


def test_one_load_serves_all_who_wait_as_far_as_they_may() -> None:
    core = Core(service("a", max_concurrency=2), absent=["a"])
    assert core.request("r1", "a") == ["load a"]
    assert core.request("r2", "a") == []
    assert core.request("r3", "a") == []
    assert core.waiters("a") == ["r1", "r2", "r3"]
    assert core.loaded("a") == ["serve r1", "serve r2"]
    assert core.queue == ["r3"]


def test_a_b_c_a_b_c_becomes_a_a_b_b_c_c() -> None:
    core = Core(*(service(n, 20_000) for n in "abc"), absent="abc")
    for name in ("a1", "b1", "c1", "a2", "b2", "c2"):
        core.request(name, name[0])
    served = []
    for _ in range(6):
        core.answer_all()
        served += core.serving
        core.finish(core.serving[0])
    assert served == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert len(core.history("load")) == 3


@pytest.mark.parametrize(
    ("a", "b", "absent", "collides"),
    [
        ("x", "x", "ab", True),
        ("b", "", "a", True),
        ("", "a", "ab", True),
        ("x", "y", "ab", False),
        ("", "", "ab", False),
    ],
    ids=["same victim", "it evicts me", "I evict its target", "other victims", "no victims"],
)
def test_swaps_that_collide_wait_and_others_run_in_parallel(
    a: str, b: str, absent: str, collides: bool
) -> None:
    consumers = [service(name) for name in "abxy"]
    core = Core(*consumers, planner=Table({"a": a, "b": b}), gpus=ANY_SLOTS, absent=absent)
    core.request("ra", "a")
    core.request("rb", "b")
    assert ("b" in core.state.swaps) is not collides
    core.answer_all()
    core.finish("ra")
    core.answer_all()
    assert core.serving == ["rb"]


def test_a_swap_runs_beside_what_is_served_as_soon_as_its_victims_are_idle() -> None:
    core = Core(service("x", 10_000), service("old", 10_000), service("b", 10_000), absent=["b"])
    core.request("long", "x")
    assert core.request("rb", "b") == ["unload old"]
    assert core.unloaded("old") == ["load b"]
    assert core.loaded("b") == []
    assert core.finish("long") == ["serve rb"]


def test_cards_that_cannot_overlap_load_only_while_nothing_is_served() -> None:
    core = Core(service("x", max_concurrency=2), service("b"), absent=["b"], overlap_loads=False)
    core.request("long", "x")
    assert core.request("rb", "b") == []
    assert core.finish("long") == ["load b"]
    assert core.request("rx", "x") == []
    assert core.loaded("b") == ["serve rb"]


def test_overlap_is_forbidden_for_each_card_by_itself() -> None:
    far = service("far", vram_mib={1: 0})
    core = Core(service("x"), far, gpus=TWO_CARDS, absent=["far"], overlap_loads=False)
    core.request("long", "x")
    assert core.request("r1", "far") == ["load far"]


def test_the_queue_goes_by_priority_then_arrival() -> None:
    core = Core(*(service(n) for n in "xabcd"))
    core.request("long", "x")
    for name, priority in {"a": 0, "b": 2, "c": 4, "d": None}.items():
        core.request(name, name, priority=priority)
    assert core.queue == ["c", "b", "d", "a"]
    assert [core.finish(name) for name in ("long", "c", "b", "d")] == [
        ["serve c"],
        ["serve b"],
        ["serve d"],
        ["serve a"],
    ]


def test_what_was_done_is_counted() -> None:
    core = Core(service("a", 20_000), service("b", 20_000), absent=["b"])
    core.use("r1", "a")
    core.request("r2", "b")
    asked = core.at
    core.answer_all()
    core.wait(2)
    core.finish("r2")
    assert core.state.consumers["b"].total_requests == 1
    assert core.state.counters == Counters(
        jobs=2,
        loads=1,
        evictions=1,
        last_wait_us=core.state.consumers["b"].moved - asked,
        last_run_us=2 * SECOND_US + STEP_US,
    )


def test_who_comes_in_the_very_moment_for_which_others_waited_is_not_before_them() -> None:
    core = Core(service("v", 24_000), service("b", 8_000), service("c", 8_000), absent=["b", "c"])
    core.request("older", "b")
    core.unloaded("v", error="unload_failed")
    assert core.queue == ["older"]
    core.at = core.state.consumers["v"].unload_cooldown.until
    assert core.feed(Request(at=core.at, request="new", consumer="c")) == ["unload v"]
    assert core.waiters("b") == ["older"]


def test_a_consumers_own_priority_is_taken_where_the_request_names_none() -> None:
    core = Core(service("x"), service("low", priority=0), service("high", priority=4))
    core.request("long", "x")
    core.request("r1", "low")
    core.request("r2", "high")
    assert core.queue == ["r2", "r1"]


def test_units_of_one_server_share_its_concurrency() -> None:
    core = Core(
        *(service(f"s/{n}", server="s", server_concurrency=1) for n in "ab"), gpus=ANY_SLOTS
    )
    core.request("r1", "s/a")
    assert core.request("r2", "s/b") == []
    assert core.finish("r1") == ["serve r2"]


# ------------------------------------------------------------------ the end of a wait


def test_queue_timeout_names_for_whom_it_waited() -> None:
    core = Core(service("painter"), service("voice"), queue_timeout_us=30 * SECOND_US)
    core.request("long", "painter")
    core.request("r1", "voice")
    assert core.wait(29) == []
    assert core.wait(1.1) == ["reject r1 queue_timeout"]
    assert "painter" in core.rejection("r1").message
    assert core.finish("long") == []


def test_a_deadline_of_its_own_comes_earlier() -> None:
    core = Core(service("x"), service("y"))
    core.request("long", "x")
    core.request("r1", "y", deadline=core.at + 5 * SECOND_US)
    assert core.wait(4.9) == []
    assert core.wait(0.2) == ["reject r1 queue_timeout"]


def test_a_deadline_of_now_is_served_at_once_or_not_at_all() -> None:
    core = Core(service("x"), service("y"))
    assert core.request("now", "x", deadline=core.at + STEP_US) == ["serve now"]
    told = core.request("r1", "y", deadline=core.at + STEP_US)
    assert told + core.wait(0.001) == ["reject r1 queue_timeout"]


def test_who_gives_up_during_a_load_leaves_the_load_to_the_others() -> None:
    core = Core(service("a", max_concurrency=2), absent=["a"])
    core.request("hasty", "a", deadline=core.at + 2 * SECOND_US)
    core.request("patient", "a")
    assert core.wait(3) == ["reject hasty queue_timeout"]
    assert core.loaded("a") == ["serve patient"]


def test_serving_has_no_deadline() -> None:
    core = Core(service("x"), queue_timeout_us=10 * SECOND_US)
    core.request("r1", "x")
    assert core.wait(100) == []
    assert core.serving == ["r1"]


def test_cancel_takes_it_out_of_the_queue_and_the_others_move_up() -> None:
    core = Core(service("x"), service("y"))
    core.request("long", "x")
    for name in ("r1", "r2", "r3"):
        core.request(name, "y")
    assert core.cancel("r2") == []
    assert core.queue == ["r1", "r3"]
    assert "r2" not in core.state.requests
    assert "r2" not in core.state.overtaken
    assert "r2" not in core.state.reasons


def test_a_load_once_begun_goes_on_for_nobody() -> None:
    core = Core(service("a"), absent=["a"])
    core.request("r1", "a")
    assert core.cancel("r1") == []
    assert core.residency("a") == "loading"
    assert core.loaded("a") == []
    assert core.request("r2", "a") == ["serve r2"]


def test_a_swap_whose_last_waiter_left_before_its_load_ends_with_its_unloads() -> None:
    core = Core(service("a", 20_000), service("b", 20_000), absent=["b"])
    core.request("r1", "b")
    core.cancel("r1")
    assert core.unloaded("a") == []
    assert core.state.swaps == {}
    assert core.state.promises == {}
    assert core.residency("b") == "absent"


def test_cancel_while_serving_changes_nothing_by_itself() -> None:
    core = Core(service("x"))
    core.request("r1", "x")
    core.request("r2", "x")
    assert core.cancel("r1") == []
    assert core.serving == ["r1"]
    assert core.finish("r1", outcome="disconnected") == ["serve r2"]


def test_a_failed_load_fails_all_who_wait_and_cools_down_twice_as_long_each_time() -> None:
    core = Core(service("a"), absent=["a"])
    core.request("r", "a")
    core.request("s", "a")
    told = core.loaded("a", error="load_failed")
    assert told == ["reject r load_failed", "reject s load_failed"]
    assert core.residency("a") == "unknown"
    for number, seconds in enumerate((5, 10, 20, 40, 80, 160, 300, 300)):
        core.wait(seconds - 0.5)
        assert core.request(f"early{number}", "a") == [f"reject early{number} load_failed"]
        core.wait(0.6)
        assert core.request(f"retry{number}", "a") == ["load a"]
        core.loaded("a", error="load_failed")


def test_a_successful_load_clears_the_cool_down() -> None:
    core = Core(service("a"), absent=["a"])
    for number in range(3):
        core.request(f"r{number}", "a")
        core.loaded("a", error="load_failed")
        core.wait(60)
    core.request("good", "a")
    assert core.loaded("a") == ["serve good"]
    core.finish("good")
    core.probe("a", resident=False)
    core.request("bad", "a")
    core.loaded("a", error="load_failed")
    core.wait(5.1)
    assert core.request("again", "a") == ["load a"]


def test_a_first_lazy_request_that_does_not_end_well_leaves_it_unknown() -> None:
    core = Core(lazy("c", 13_000), gpus=(CARD,))
    core.request("r1", "c")
    core.finish("r1", outcome="upstream_error")
    assert core.residency("c") == "unknown"
    assert core.request("r2", "c") == ["serve r2"]
    core.finish("r2")
    assert core.residency("c") == "resident"


def test_lazy_work_that_ends_well_shows_that_it_is_loaded_whatever_the_first_one_did() -> None:
    core = Core(lazy("c", 20_000, max_concurrency=2), service("a", 20_000), absent=["a"])
    core.sample(free=23_900)
    core.request("first", "c")
    core.request("second", "c")
    core.finish("first", outcome="upstream_error")
    core.finish("second")
    assert core.residency("c") == "resident"
    core.sample(free=3_900)
    assert core.request("r1", "a") == ["unload c"]


def test_who_joined_beside_it_counts_at_its_grant() -> None:
    """While both wait for the same load neither overtakes; whoever is served first does then."""
    core = Core(service("a"), absent=["a"], overtake_bound=1)
    core.request("u0", "a", priority=4)
    core.request("low", "a", priority=0)
    for number in range(1, 4):
        core.request(f"u{number}", "a", priority=4)
    assert core.loaded("a") == ["serve u0"]
    assert core.finish("u0") == ["serve u1"]
    assert core.finish("u1") == ["serve u2"]
    assert core.finish("u2") == ["serve low"]

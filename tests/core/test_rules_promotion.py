"""Overtaking is counted, bounded and made good: promotion, its fences and their exceptions."""

import pytest

from mgpu_core.config import Gpu
from tests.core.driver import Core, service

TWO_CARDS = (Gpu(index=0, total_mib=24_000), Gpu(index=1, total_mib=24_000))
TWO_SLOTS = (Gpu(total_mib=24_000, max_parallel=2),)
ANY_SLOTS = (Gpu(total_mib=24_000, max_parallel=None),)

# ------------------------------------------------------------------ overtaking and promotion


def overtaken_by(core: Core, count: int, **fields: object) -> None:
    """Overtake `count` times: x serves one request after the other and never lets its slot go."""
    for _ in range(count):
        number = len(core.history("serve"))
        before = core.serving
        assert core.request(f"x{number}", "x", **fields) == [f"serve x{number}"]
        core.finish(before[0])


def waiting_for_a_slot(**settings: object) -> Core:
    """p waits for y, which is resident, until x lets go of the slot."""
    core = Core(
        service("x", max_concurrency=2),
        service("y"),
        service("z"),
        service("w"),
        **settings,
    )
    core.request("x0", "x")
    assert core.request("p", "y") == []
    return core


@pytest.mark.parametrize("bound", [1, 3, 8])
@pytest.mark.parametrize(("priority", "factor"), [(0, 1), (2, 1), (3, 2), (4, 2)])
def test_a_request_is_overtaken_exactly_as_often_as_the_bound_says(
    bound: int, priority: int, factor: int
) -> None:
    core = waiting_for_a_slot(overtake_bound=bound)
    overtaken_by(core, bound * factor, priority=priority)
    assert core.request("next", "x", priority=priority) == []
    assert core.finish(core.serving[0]) == ["serve p"]
    assert core.finish("p") == ["serve next"]


def test_higher_priorities_are_counted_apart() -> None:
    core = waiting_for_a_slot(overtake_bound=2)
    overtaken_by(core, 1)
    overtaken_by(core, 3, priority=4)
    assert core.state.overtaken["p"] == 1
    assert core.state.overtaken_high["p"] == 3
    overtaken_by(core, 1)
    assert core.request("next", "x", priority=4) == []


def test_without_a_bound_nobody_is_promoted() -> None:
    core = waiting_for_a_slot(overtake_bound=None)
    overtaken_by(core, 40)
    assert core.queue == ["p"]


def test_earlier_arrivals_do_not_count() -> None:
    core = waiting_for_a_slot()
    core.request("q", "z")
    assert core.finish("x0") == ["serve p"]
    assert core.state.overtaken.get("q", 0) == 0


def test_grants_on_other_cards_do_not_count() -> None:
    core = Core(service("x"), service("y"), service("far", vram_mib={1: 0}), gpus=TWO_CARDS)
    core.request("long", "x")
    core.request("p", "y")
    core.use("r1", "far")
    assert core.state.overtaken.get("p", 0) == 0


def test_who_joins_and_is_granted_later_counts_once() -> None:
    core = Core(
        service("v", 10_000),
        service("b", 18_000),
        service("a", 4_000),
        gpus=TWO_SLOTS,
        absent=["a", "b"],
    )
    core.request("long", "v")
    assert core.request("p", "b") == []
    assert core.request("r1", "a") == ["load a"]
    assert core.state.overtaken["p"] == 1
    assert core.loaded("a") == ["serve r1"]
    assert core.state.overtaken["p"] == 1


def test_promoted_ones_go_first_and_the_oldest_of_them_before_all() -> None:
    core = Core(
        service("x", max_concurrency=2), service("y"), service("z"), service("w"), overtake_bound=1
    )
    core.request("x0", "x")
    core.request("p1", "y", priority=0)
    core.request("p2", "z", priority=2)
    overtaken_by(core, 1, priority=0)
    core.request("urgent", "w", priority=4)
    assert core.finish(core.serving[0]) == ["serve p1"]
    assert core.finish("p1") == ["serve p2"]
    assert core.finish("p2") == ["serve urgent"]


def test_a_load_by_an_operator_overtakes_nobody() -> None:
    core = Core(service("x"), service("y"), service("z"), absent=["z"], overtake_bound=1)
    core.request("long", "x")
    core.request("p", "y")
    assert core.load("z") == ["load z"]
    core.loaded("z")
    assert core.state.overtaken.get("p", 0) == 0


def waiting_for_memory(**settings: object) -> Core:
    """Promoted p waits for 20,000 MiB: x, at work, and v, idle, have to go."""
    core = Core(
        service("x", 4_000, max_concurrency=2),
        service("v", 4_000, max_concurrency=2, **settings),
        service("small", 100),
        service("far", vram_mib={1: 0}),
        service("cpu", vram_mib={}),
        service("b", 20_000),
        gpus=(Gpu(index=0, total_mib=24_000, max_parallel=None), TWO_CARDS[1]),
        absent=["b", "small"],
        overtake_bound=1,
    )
    core.request("x0", "x")
    assert core.request("p", "b") == []
    overtaken_by(core, 1)
    return core


def test_behind_a_promoted_request_nothing_starts_that_takes_memory_on_its_card() -> None:
    core = waiting_for_memory()
    assert core.request("r1", "small") == []
    assert core.request("r2", "x") == []
    assert core.request("r3", "v") == []


def test_behind_a_promoted_request_other_cards_and_the_processor_go_on() -> None:
    core = waiting_for_memory()
    assert core.request("r1", "far") == ["serve r1"]
    assert core.request("r2", "cpu") == ["serve r2"]


def test_behind_a_promoted_request_nobody_joins_a_swap_under_way() -> None:
    core = Core(
        service("x", 4_000), service("b", 20_000), service("a", 100), overtake_bound=1, absent="ab"
    )
    core.request("long", "x")
    core.request("p", "b")
    assert core.request("first", "a") == ["load a"]
    assert core.request("second", "a") == []
    assert core.waiters("a") == ["first"]
    assert core.queue == ["p", "second"]


def test_a_slotless_one_that_is_no_victim_passes_a_promoted_request() -> None:
    core = Core(
        service("x", max_concurrency=2),
        service("y"),
        service("s", gpu_slot=False),
        overtake_bound=1,
    )
    core.request("x0", "x")
    core.request("p", "y")
    overtaken_by(core, 1)
    assert core.request("r1", "s") == ["serve r1"]


def test_a_slotless_victim_passes_while_other_work_is_served_that_may_call_it() -> None:
    core = waiting_for_memory(gpu_slot=False)
    assert core.request("call", "v") == ["serve call"]
    core.finish(core.serving[0])
    assert core.serving == ["call"]
    assert core.request("late", "v") == []  # no other work is left that could have called
    assert sorted(core.finish("call")) == ["unload v", "unload x"]


def test_who_waits_for_memory_that_is_nobodys_here_holds_nobody_back() -> None:
    core = Core(
        service("x", 2_000, max_concurrency=2), service("b", 20_000), absent="b", overtake_bound=1
    )
    core.sample(free=12_000)
    core.request("x0", "x")
    assert core.request("p", "b") == []
    overtaken_by(core, 5)


def test_who_waits_for_a_cool_down_holds_nobody_back() -> None:
    core = Core(
        service("x", 2_000, max_concurrency=2, pinned=True),
        service("v", 10_000),
        service("b", 20_000),
        absent="b",
        overtake_bound=1,
    )
    core.request("x0", "x")
    assert core.request("p", "b") == ["unload v"]
    core.unloaded("v", error="unload_failed")
    overtaken_by(core, 5)


def test_who_waits_for_a_victim_busy_for_someone_else_holds_nobody_back() -> None:
    core = Core(
        service("x", 2_000, max_concurrency=2, pinned=True),
        service("v", 10_000),
        service("b", 20_000),
        absent="b",
        overtake_bound=1,
    )
    core.probe("v", busy=True)
    core.request("x0", "x")
    assert core.request("p", "b") == []
    overtaken_by(core, 5)

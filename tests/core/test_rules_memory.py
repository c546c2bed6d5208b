"""Does it fit, who is evicted for it, and what if nothing fits."""

import pytest

from mgpu_core.config import SECOND_US, Consumer, Gpu
from mgpu_core.events import GpuReading, GpuSample
from mgpu_core.notes import Reason, Why
from mgpu_core.planners import Holder, Lru, View
from mgpu_core.state import Residency
from tests.core.driver import Core, Table, service

CARD_16 = (Gpu(total_mib=16_000),)
CARD_20 = (Gpu(total_mib=20_000),)
CARD_22 = (Gpu(total_mib=22_000),)
ANY_SLOTS = (Gpu(total_mib=24_000, max_parallel=None),)
TWO_CARDS = (Gpu(index=0, total_mib=24_000), Gpu(index=1, total_mib=24_000))

# ------------------------------------------------------------------ does it fit


@pytest.mark.parametrize(("free", "expected"), [(10_256, ["load b"]), (10_255, ["unload a"])])
def test_measured_memory_must_hold_need_and_cushion(free: int, expected: list[str]) -> None:
    core = Core(service("a", 10_000), service("b", 10_000), absent=["b"])
    core.sample(free=free)
    assert core.request("r1", "b") == expected


@pytest.mark.parametrize(("mib", "expected"), [(13_244, ["load b"]), (13_245, ["unload a"])])
def test_the_static_budget_must_hold_need_and_cushion(mib: int, expected: list[str]) -> None:
    cards = (Gpu(total_mib=24_000, reserved_mib=500),)
    core = Core(service("a", 10_000), service("b", mib), gpus=cards, absent=["b"])
    assert core.request("r1", "b") == expected


@pytest.mark.parametrize("none", [0, None])
def test_what_has_no_declared_need_evicts_nobody(none: int | None) -> None:
    managed = none is None
    core = Core(
        service("a", 23_000),
        Consumer(name="b", vram_mib={0: 20_000 if managed else 0}, vram_managed=managed),
        absent=[] if managed else ["b"],
    )
    core.sample(free=100)
    core.request("r1", "b")
    core.answer_all()
    assert core.serving == ["r1"]
    assert core.history("unload") == []


def test_the_larger_of_resident_and_load_need_counts_while_it_loads() -> None:
    core = Core(service("a", 8_000), service("b", 10_000, vram_load_mib=16_000), absent=["b"])
    assert core.request("r1", "b") == ["unload a"]


@pytest.mark.parametrize(
    "beside", [{"vram_managed": True}, {"name": "friend"}], ids=["managed", "coexisting"]
)
def test_the_static_budget_leaves_out_managed_and_coexisting_residents(
    beside: dict[str, object],
) -> None:
    core = Core(
        service(**{"name": "other", "mib": 20_000, **beside}),
        service("b", 10_000, can_coexist_with=("friend",)),
        absent=["b"],
    )
    assert core.request("r1", "b") == ["load b"]


@pytest.mark.parametrize(("wait_s", "expected"), [(5, ["load b"]), (7, ["unload a"])])
def test_a_sample_is_good_for_three_poll_intervals(wait_s: float, expected: list[str]) -> None:
    """It showed more free than is declared; the budget, once it is stale, knows only that."""
    core = Core(service("a", 10_000), service("b", 10_000), gpus=CARD_16, absent=["b"])
    core.sample(free=15_000)
    core.wait(wait_s)
    core.sample_fails()
    assert core.request("r1", "b") == expected


def test_memory_counts_on_each_card_that_it_names() -> None:
    core = Core(
        service("a", 20_000),
        service("b", vram_mib={1: 20_000}),
        service("both", vram_mib={0: 8_000, 1: 2_000}),
        gpus=TWO_CARDS,
        absent=["both"],
    )
    assert core.request("r1", "both") == ["unload a"]


def test_victims_are_found_on_every_card_that_lacks_memory() -> None:
    core = Core(
        service("a", 20_000),
        service("b", vram_mib={1: 20_000}),
        service("both", vram_mib={0: 8_000, 1: 8_000}),
        gpus=TWO_CARDS,
        absent=["both"],
    )
    assert sorted(core.request("r1", "both")) == ["unload a", "unload b"]


def test_of_a_card_that_is_not_configured_a_reading_tells_the_size() -> None:
    core = Core(
        *(service(f"a{mib}", vram_mib={1: mib}) for mib in (9_000, 9_001, 10_000, 10_001)),
        absent=["a9000", "a9001", "a10000", "a10001"],
        gpus=(Gpu(),),
    )
    reading = GpuReading(index=1, total_mib=10_000, used_mib=1_000, free_mib=9_000)
    core.send(GpuSample, taken=core.at, gpus=(reading,))
    assert core.request("r1", "a9001") == []
    assert core.request("r2", "a9000") == ["load a9000"]
    assert core.request("r3", "a10000") == []
    assert core.request("r4", "a10001") == ["reject r4 insufficient_vram"]
    core.cancel("r1")
    core.cancel("r3")
    core.loaded("a9000")
    core.unload("a9000")
    core.wait(7)  # the reading is stale: its total and what was foreign in it still count
    core.finish("r2")
    core.unloaded("a9000")
    assert core.request("r5", "a9001") == []
    assert core.request("r6", "a9000") == ["load a9000"]


# ------------------------------------------------------------------ whom to evict


def idle_ones(*sizes_mib: int, free_mib: int = 0, **settings: object) -> Core:
    """v0, v1, ... resident and used in this order, and b, absent, that wants 8,000 MiB."""
    victims = [service(f"v{n}", mib) for n, mib in enumerate(sizes_mib)]
    total = sum(sizes_mib) + free_mib
    core = Core(
        *victims,
        service("b", 8_000),
        gpus=(Gpu(total_mib=total, cushion_mib=0),),
        absent=["b"],
        **settings,
    )
    for victim in victims:
        core.use(f"use {victim.name}", victim.name)
    return core


def test_lru_takes_the_one_used_longest_ago() -> None:
    core = idle_ones(8_000, 8_000, 8_000)
    core.use("again", "v0")
    assert core.request("r1", "b") == ["unload v1"]


def test_lru_takes_the_never_used_first_and_ties_by_name() -> None:
    cards = (Gpu(total_mib=24_300),)
    core = Core(*(service(n, 8_000) for n in "zyxb"), gpus=cards, absent=["b"])
    core.use("r0", "x")
    assert core.request("r1", "b") == ["unload y"]


def test_work_that_failed_is_no_use() -> None:
    core = idle_ones(8_000, 8_000)
    core.request("bad", "v0")
    core.finish("bad", outcome="upstream_error")
    assert core.request("r1", "b") == ["unload v0"]


def test_gdsf_keeps_what_is_used_often_where_lru_keeps_what_was_used_last() -> None:
    def history(eviction: str) -> list[str]:
        core = Core(
            *(service(n, 8_000) for n in ("often", "once", "b")),
            gpus=(Gpu(total_mib=16_300),),
            absent=["often", "once", "b"],
            eviction=eviction,
        )
        for name in ("often", "once"):
            core.load(name)
            core.wait(1)
            core.loaded(name)
        for number in range(5):
            core.use(f"o{number}", "often")
        core.use("last", "once")
        return core.request("r1", "b")

    assert history("lru") == ["unload often"]
    assert history("gdsf") == ["unload once"]


def test_the_whole_set_goes_at_once_and_nobody_that_is_not_needed() -> None:
    assert idle_ones(4_000, 4_000, 4_000).request("r1", "b") == ["unload v0", "unload v1"]
    assert idle_ones(1_000, 8_000).request("r1", "b") == ["unload v1"]


def test_nothing_is_unloaded_unless_the_set_makes_room() -> None:
    core = idle_ones(4_000, 3_000, free_mib=5_000)
    core.sample(free=500)  # 4,500 MiB are nobody's here
    assert core.request("r1", "b") == []
    assert core.history("unload") == []


@pytest.mark.parametrize(("most", "expected"), [(2, 0), (4, 4)])
def test_at_most_max_evictions(most: int, expected: int) -> None:
    core = idle_ones(2_000, 2_000, 2_000, 2_000, max_evictions=most)
    core.request("r1", "b")
    assert len(core.history("unload")) == expected


def test_sets_of_idle_ones_come_first() -> None:
    core = idle_ones(8_000, 8_000)
    core.request("work", "v0")
    assert core.request("r1", "b") == ["unload v1"]


@pytest.mark.parametrize(
    "spared",
    [
        service("s", 8_000, pinned=True),
        service("s", 8_000, vram_managed=True),
        Consumer(name="s", vram_mib={0: 8_000}),
        service("friend", 8_000),
    ],
    ids=["pinned", "vram_managed", "no way to unload", "coexisting"],
)
def test_who_is_no_victim(spared: Consumer) -> None:
    core = Core(
        spared,
        service("v", 8_000),
        service("b", 8_000, can_coexist_with=("friend",)),
        gpus=(Gpu(total_mib=16_300),),
        absent=["b"],
    )
    core.use("r0", "v")
    core.sample(free=300)
    assert core.request("r1", "b") == ["unload v"]


def test_a_victim_serving_is_waited_for() -> None:
    core = idle_ones(8_000)
    core.request("work", "v0")
    assert core.request("r1", "b") == []
    assert core.finish("work") == ["unload v0"]


def test_after_a_failed_unload_the_plan_is_made_anew() -> None:
    core = idle_ones(8_000, 8_000)
    assert core.request("r1", "b") == ["unload v0"]
    assert core.unloaded("v0", error="unload_failed") == ["unload v1"]
    assert core.unloaded("v1") == ["load b"]


def test_a_victim_is_granted_nothing_from_its_unload_on() -> None:
    core = idle_ones(8_000)
    core.request("r1", "b")
    assert core.request("r2", "v0") == []
    assert core.queue == ["r2"]
    assert core.unloaded("v0") == ["load b"]
    assert core.loaded("b") == ["serve r1"]
    assert core.finish("r1") == ["unload b"]


def test_what_stays_after_an_unload_is_no_gain() -> None:
    core = Core(
        service("v", 8_000, vram_residue_mib=500), service("b", 8_000), gpus=CARD_16, absent=["b"]
    )
    core.sample(free=400)
    assert core.request("r1", "b") == []
    core.sample(free=900)
    assert core.history("unload") == ["unload v"]


def test_a_server_goes_by_driver_only_when_all_its_units_may_and_takes_them_all() -> None:
    def unit(name: str) -> Consumer:
        return Consumer(name=name, server="s", vram_mib={0: 8_000}, driver="process")

    core = Core(unit("s/a"), unit("s/b"), service("b", 12_000), absent=["b"], gpus=CARD_22)
    for name in ("s/a", "s/b"):
        core.probe(name, resident=True)
    core.request("work", "s/b")
    assert core.request("r1", "b") == []
    told = core.finish("work")
    assert told
    assert set(told) <= {"unload s/a by driver", "unload s/b by driver"}
    core.answer_all()
    assert (core.residency("s/a"), core.residency("s/b")) == ("absent", "absent")
    assert core.serving == ["r1"]


def test_a_unit_with_routes_goes_alone_though_its_server_has_a_driver() -> None:
    def unit(name: str) -> Consumer:
        return service(name, 8_000, server="s", driver="process")

    core = Core(unit("s/a"), unit("s/b"), service("b", 12_000), absent=["b"], gpus=CARD_22)
    for name in ("s/a", "s/b"):
        core.probe(name, resident=True)
    core.request("work", "s/b")
    assert core.request("r1", "b") == ["unload s/a"]
    core.unloaded("s/a")
    assert core.residency("s/b") == "resident"


def test_a_driver_spares_a_server_with_a_pinned_unit() -> None:
    def unit(name: str, **settings: object) -> Consumer:
        return Consumer(name=name, server="s", vram_mib={0: 8_000}, driver="process", **settings)

    consumers = (unit("s/a"), unit("s/b", pinned=True), service("b", 12_000))
    core = Core(*consumers, absent=["b"], gpus=CARD_22)
    for name in ("s/a", "s/b"):
        core.probe(name, resident=True)
    assert core.request("r1", "b") == []
    assert core.pin("s/b", pinned=False) != []


@pytest.mark.parametrize(("measured", "expected"), [(False, ["unload a"]), (True, [])])
def test_after_a_failed_load_it_gains_nothing_where_samples_tell_and_all_where_they_do_not(
    measured: bool, expected: list[str]
) -> None:
    core = Core(service("a", 10_000), service("b", 10_000), gpus=CARD_16, absent=["a", "b"])
    core.load("a")
    core.loaded("a", error="load_failed")
    assert core.residency("a") == "unknown"
    if measured:
        core.sample(free=5_500)
    assert core.request("r1", "b") == expected


def test_a_planner_of_the_users_own_is_believed_about_fit() -> None:
    core = Core(
        service("a", 10_000), service("b", 20_000), absent=["b"], planner=Table({"b": ["a"]})
    )
    core.sample(free=100)
    assert core.request("r1", "b") == ["unload a"]


@pytest.mark.parametrize(
    "protected",
    [service("p", pinned=True), service("p", vram_managed=True), Consumer(name="p")],
    ids=["pinned", "vram_managed", "no way to unload"],
)
def test_even_a_planner_of_the_users_own_evicts_nobody_protected(protected: Consumer) -> None:
    core = Core(protected, service("b"), absent=["b"], planner=Table({"b": ["p"]}))
    assert core.request("r1", "b") == []
    assert core.queue == ["r1"]
    assert core.state.reasons["r1"] == Reason(why=Why.UNFIT, who=("p",))


def test_what_a_planner_of_the_users_own_names_goes_as_far_as_it_is_there_and_can() -> None:
    core = Core(
        *(service(name) for name in ("gone", "a", "b")),
        absent=["gone", "b"],
        planner=Table({"b": ["gone", "a"]}),
    )
    assert core.request("r1", "b") == ["unload a"]
    core.unloaded("a", error="unload_failed")
    assert core.state.reasons["r1"] == Reason(why=Why.COOLDOWN, who=("a",))
    assert core.wait(5) == ["unload a"]


def test_a_planner_that_knows_no_set_leaves_it_in_the_queue() -> None:
    class Never:
        def victims(self, target: str, view: object) -> None:
            return None

    core = Core(service("b", 10_000), absent=["b"], planner=Never())
    assert core.request("r1", "b") == []
    assert core.queue == ["r1"]
    core = Core(service("b", 10_000), absent=["b"], planner=Never(), when_unfit="reject")
    assert core.request("r1", "b") == ["reject r1 insufficient_vram"]
    assert core.rejection("r1").message == (
        "b needs 10000 MiB on GPU 0, 24000 MiB are free and cannot be made enough; "
        "held by: nobody known"
    )


def test_a_planner_of_the_users_own_may_be_a_built_in_one_which_names_nobody_for_a_resident() -> (
    None
):
    core = Core(service("a", 10_000), service("b", 10_000), planner=Lru())
    core.sample(free=0)
    assert core.request("r1", "b") == ["serve r1"]


def test_a_planner_of_the_users_own_is_asked_anew_after_every_event() -> None:
    class NeedsTwoUses:
        def victims(self, target: str, view: View) -> tuple[str, ...] | None:
            return () if target == "a" or view.holders["a"].uses > 1 else None

    core = Core(
        service("a", 4_000, max_concurrency=3),
        service("b", 4_000),
        absent=["b"],
        planner=NeedsTwoUses(),
        gpus=ANY_SLOTS,
    )
    for name in ("r1", "r2", "r3"):
        core.request(name, "a")
    core.request("r4", "b")
    assert core.finish("r1") == []
    assert core.finish("r2") == ["load b"]


def test_the_view_of_a_planner_names_who_runs_in_order() -> None:
    seen: list[tuple[str, ...]] = []

    class Watcher:
        def victims(self, target: str, view: object) -> tuple[str, ...]:
            seen.append(view.running)  # type: ignore[attr-defined]
            return ("c",) if target == "b" else ()

    core = Core(*(service(n) for n in "dcba"), absent="ab", planner=Watcher(), gpus=ANY_SLOTS)
    core.request("r1", "b")
    core.request("r2", "a")
    assert ("b", "c", "d") in seen  # b is the target of a swap that still unloads c


def test_a_planner_sees_of_each_holder_what_the_scheduler_goes_by() -> None:
    seen: list[View] = []

    class Watcher:
        def victims(self, target: str, view: View) -> tuple[str, ...] | None:
            seen.append(view)
            return () if view.resident else None

    core = Core(
        service("a", 8_000, vram_residue_mib=500, driver="process", server="s"),
        service("b", 4_000, vram_load_mib=5_000, pinned=True),
        service("t", 20_000, can_coexist_with=("b",)),
        absent=["t"],
        planner=Watcher(),
    )
    core.probe("a", resident=True, vram_mib=7_500)
    core.use("r1", "a")
    used = core.at
    core.request("r2", "a")
    core.probe("b", busy=True)
    core.request("r3", "t")
    view = seen[-1]
    assert (view.protected, view.need_mib, view.free_mib) == (("b",), {0: 20_256}, {0: 16_500})
    common = {"owed": False, "stops_with": (), "idle": False, "load_us": None}
    assert view.holders == {
        "a": Holder(
            name="a",
            residency=Residency.RESIDENT,
            gain_mib={0: 7_000},
            need_mib={0: 8_000},
            measured_mib=7_500,
            last_used=used,
            uses=1,
            credit=1_000_000 // 7_500,
            serving=1,
            busy=False,
            pinned=False,
            evictable=True,
            **common,
        ),
        "b": Holder(
            name="b",
            residency=Residency.RESIDENT,
            gain_mib={0: 4_000},
            need_mib={0: 5_000},
            measured_mib=None,
            last_used=None,
            uses=0,
            credit=0,
            serving=0,
            busy=True,
            pinned=True,
            evictable=False,
            **common,
        ),
    }


# ------------------------------------------------------------------ when nothing fits


def foreign_in_the_way(**settings: object) -> Core:
    core = Core(service("x", 500), service("b", 12_000), gpus=CARD_16, absent=["b"], **settings)
    core.sample(free=9_500)
    return core


def test_when_unfit_wait_plans_anew_with_every_sample() -> None:
    core = foreign_in_the_way()
    assert core.request("r1", "b") == []
    assert core.sample(free=9_500) == []
    assert core.sample(free=15_400) == ["load b"]


def test_when_unfit_reject_answers_at_once_and_it_may_be_tried_again() -> None:
    core = foreign_in_the_way(when_unfit="reject")
    assert core.request("r1", "b") == ["reject r1 insufficient_vram"]
    assert core.rejection("r1").retryable
    assert core.history("unload") == []


def test_when_unfit_admit_lets_it_through() -> None:
    core = foreign_in_the_way(when_unfit="admit")
    core.request("r1", "b")
    core.answer_all()
    assert core.serving == ["r1"]


def test_a_managed_one_in_the_way_is_named_when_the_wait_ends() -> None:
    core = Core(
        service("giant", 12_000, vram_managed=True),
        service("b", 12_000),
        gpus=CARD_16,
        absent=["b"],
        queue_timeout_us=4 * SECOND_US,
    )
    core.sample(free=3_900)
    assert core.request("r1", "b") == []
    assert core.wait(5) == ["reject r1 queue_timeout"]
    assert "giant" in core.rejection("r1").message


@pytest.mark.parametrize("when_unfit", ["wait", "reject", "admit"])
def test_only_promises_in_the_way_queue_it_whatever_when_unfit_says(when_unfit: str) -> None:
    core = Core(
        service("a", 12_000),
        service("b", 12_000),
        gpus=CARD_16,
        absent=["a", "b"],
        when_unfit=when_unfit,
    )
    core.sample(free=15_900)
    assert core.request("r1", "a") == ["load a"]
    assert core.request("r2", "b") == []
    assert core.queue == ["r2"]


@pytest.mark.parametrize("when_unfit", ["wait", "reject", "admit"])
def test_a_sample_in_the_middle_of_a_load_does_not_make_it_unfit(when_unfit: str) -> None:
    """Its memory is in use already and promised still: that alone turns nobody away."""
    core = Core(service("a", 4_000), service("b", 20_000), absent=["a", "b"], when_unfit=when_unfit)
    core.sample(free=24_000)
    assert core.request("r1", "a") == ["load a"]
    assert core.request("r2", "b") == []
    assert core.sample(free=20_000) == []
    assert core.queue == ["r2"]
    assert core.state.reasons["r2"].why != "unfit"


def test_who_manages_its_memory_itself_does_not_wait_for_room_beside_one_of_the_same_size() -> None:
    core = Core(
        service("x", 4_000),
        service("big", 13_000, priority=4),
        service("own", 13_000, vram_managed=True),
        absent=["big", "own"],
        overlap_loads=False,
    )
    core.sample(free=6_000)
    core.request("r1", "x")
    assert core.request("r2", "big") == []  # other processes hold what it needs
    assert core.request("r3", "own") == []  # nothing may load beside the work of x
    assert core.finish("r1") == ["load own"]

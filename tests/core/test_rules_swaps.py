"""Memory is promised, freed and taken: promises, settling, leaks, cold starts."""

from collections import Counter

import pytest

from mgpu_core import effects as fx
from mgpu_core.config import SECOND_US, Consumer, Gpu
from tests.core.driver import CARD, Core, Table, lazy, service

CARD_16 = (Gpu(total_mib=16_000),)
CARD_20 = (Gpu(total_mib=20_000),)
CARD_22 = (Gpu(total_mib=22_000),)
ANY_SLOTS = (Gpu(total_mib=24_000, max_parallel=None),)
TWO_CARDS = (Gpu(index=0, total_mib=24_000), Gpu(index=1, total_mib=24_000))

# ------------------------------------------------------------------ promises


def test_in_the_static_budget_a_consumer_counts_once() -> None:
    core = Core(*(service(n, 9_000) for n in "abc"), gpus=CARD_20, absent="abc")
    assert core.request("r1", "a") == ["load a"]
    assert core.request("r2", "b") == ["load b"]
    core.loaded("a")
    core.loaded("b")
    core.finish("r1")
    core.finish("r2")
    assert core.request("r3", "c") == ["unload a"]  # 2,000 are free: not less, not more


def test_a_failed_load_gives_its_promise_up() -> None:
    core = Core(service("a", 12_000), service("b", 12_000), gpus=CARD_16, absent=["a", "b"])
    core.sample(free=15_900)
    core.request("r1", "a")
    core.request("r2", "b")
    told = core.loaded("a", error="load_failed")
    told += core.sample(free=15_900)
    assert told == ["reject r1 load_failed", "load b"]


def test_a_lazy_promise_lasts_until_a_sample_shows_its_memory_taken() -> None:
    core = Core(lazy("c", 12_000), service("b", 6_000), gpus=ANY_SLOTS, absent=["b"])
    core.sample(free=17_000)
    assert core.request("r1", "c") == ["serve r1"]
    core.sample(free=17_000)
    assert core.request("r2", "b") == []
    core.sample(free=12_000)  # it has begun to take it
    assert core.queue == ["r2"]
    core.sample(free=5_000)  # all taken: what is free now is free
    assert core.state.promises == {}
    assert core.sample(free=6_300) == ["load b"]


def test_a_lazy_promise_does_not_end_before_the_first_grant() -> None:
    """What grew meanwhile is not its own."""
    core = Core(service("x", 1_000), lazy("c", 12_000), gpus=(CARD,))
    core.sample(free=22_900)
    core.request("long", "x")
    assert core.request("r1", "c") == []
    core.sample(free=10_900)
    assert core.state.promises.keys() == {"c"}


def test_a_cold_start_whose_memory_was_taken_meanwhile_is_planned_anew() -> None:
    """It waits for the slot, and who works there loads something that nobody tracks."""
    core = Core(
        Consumer(name="m", vram_managed=True), service("a", 4_000), lazy("c", 12_000), absent=["a"]
    )
    core.sample(free=16_500)
    core.request("r1", "m")
    assert core.request("r2", "a") == ["load a"]
    core.loaded("a")
    core.sample(free=12_500)
    core.request("r3", "c")
    core.sample(free=10_500)  # "m" has loaded
    assert core.finish("r1") == ["serve r2"]
    assert core.finish("r2") == ["unload a"]
    core.unloaded("a")
    assert core.sample(free=14_500) == ["serve r3"]


def test_a_lazy_promise_ends_at_the_latest_with_a_sample_after_its_first_request() -> None:
    core = Core(lazy("c", 12_000), service("b", 6_000), gpus=ANY_SLOTS, absent=["b"])
    core.sample(free=17_000)
    core.request("r1", "c")
    core.finish("r1")
    assert core.state.promises.keys() == {"c"}
    core.sample(free=17_000, age_s=0.0015)  # it began before the work was over
    assert core.state.promises.keys() == {"c"}
    core.sample(free=14_000)
    assert core.state.promises == {}
    assert core.request("r2", "b") == ["load b"]


def test_a_promise_that_nobody_is_left_to_take_is_given_up() -> None:
    core = Core(service("x", 4_000), service("a", 10_000), lazy("c", 13_000))
    core.request("long", "x")
    core.request("r1", "c")
    core.unloaded("a")
    assert core.request("r2", "a") == []
    assert core.cancel("r1") == ["load a"]


# ------------------------------------------------------------------ carrying it out


def unload_accepted(driver: str = "none", **settings: object) -> Core:
    """b wants in; a, 10,000 MiB of 20,000, has just accepted to unload."""
    core = Core(
        service("a", 10_000, driver=driver),
        service("b", 6_000),
        service("d", 4_000),
        gpus=CARD_20,
        absent=["b"],
        **settings,
    )
    core.use("r0", "d")
    core.sample(free=5_500)
    assert core.request("r1", "b") == ["unload a"]
    assert core.unloaded("a") == []
    return core


def test_memory_counts_as_free_when_a_sample_taken_after_the_unload_shows_it() -> None:
    core = unload_accepted()
    assert core.asked_to_sample()
    assert core.sample(free=15_500, age_s=0.0015) == []  # it began before the unload was over
    assert core.sample(free=6_255) == []
    assert core.sample(free=6_256) == ["load b"]


def test_the_core_asks_for_samples_while_it_waits_for_one_that_fits() -> None:
    core = unload_accepted()
    asked = sum(type(e).__name__ == "SampleGpu" for e in core.effects)
    core.sample(free=5_500)
    core.wait(5)
    assert sum(type(e).__name__ == "SampleGpu" for e in core.effects) > asked


def test_without_a_sample_in_time_the_unload_is_believed() -> None:
    core = unload_accepted(settle_timeout_us=4 * SECOND_US)
    assert core.wait(3.9) == []
    assert core.wait(0.2) == ["load b"]


def test_samples_that_do_not_fit_lead_to_a_new_plan_when_the_time_is_over() -> None:
    core = unload_accepted(settle_timeout_us=4 * SECOND_US)
    for _ in range(3):
        core.wait(1)
        assert core.sample(free=5_600) == []
    core.wait(1.5)
    assert core.history("unload") == ["unload a", "unload d"]
    core.unloaded("d")
    assert core.sample(free=9_600) == ["load b"]
    assert core.loaded("b") == ["serve r1"]


def test_no_new_set_ends_the_swap_and_when_unfit_applies() -> None:
    core = unload_accepted(settle_timeout_us=4 * SECOND_US)
    core.pin("d")
    for _ in range(3):
        core.wait(1)
        core.sample(free=5_600)
    core.wait(1.5)
    assert core.state.swaps == {}
    assert core.state.promises == {}
    assert core.queue == ["r1"]
    assert core.sample(free=15_500) == ["load b"]


def test_max_evictions_holds_for_a_swap_with_all_its_plans() -> None:
    core = Core(
        service("a", 10_000),
        service("b", 12_000),
        *(service(name, 4_000) for name in "cd"),
        gpus=CARD_20,
        absent=["b"],
        max_evictions=2,
    )
    core.use("r0", "c")
    core.use("r00", "d")
    core.sample(free=4_000)
    assert core.request("r1", "b") == ["unload a"]
    core.unloaded("a")
    for _ in range(11):
        core.wait(1)
        core.sample(free=4_500)
    by_epoch = Counter(e.epoch for e in core.effects if isinstance(e, fx.StartUnload))
    assert by_epoch[1] == 1
    assert all(count <= 2 for count in by_epoch.values())


def leaked(**settings: object) -> Core:
    """a gave back 100 MiB of 10,000."""
    core = unload_accepted(driver="systemd", settle_timeout_us=4 * SECOND_US, **settings)
    for _ in range(3):
        core.wait(1)
        core.sample(free=5_600)
    core.wait(1.5)
    return core


def test_a_victim_that_gave_back_too_little_is_leaky_and_goes_by_driver_next_time() -> None:
    core = leaked()
    assert core.state.consumers["a"].leaky_mib == 100
    core.probe("a", resident=True)
    assert core.unload("a") == ["unload a by driver"]


def test_the_gain_of_a_leaky_victim_is_what_it_gave_back() -> None:
    core = leaked()
    core.unloaded("d")
    core.sample(free=9_700)
    core.loaded("b")
    core.finish("r1")
    core.probe("a", resident=True)
    core.sample(free=3_700)
    assert core.request("r2", "d") == ["unload b"]  # a, never used, would go first


def test_without_a_driver_a_leaky_one_goes_by_its_routes_again() -> None:
    core = Core(service("a", 10_000), service("b", 10_000), gpus=CARD_16, absent=["b"])
    core.sample(free=5_900)
    core.request("r1", "b")
    core.unloaded("a")
    for _ in range(11):
        core.wait(1)
        core.sample(free=6_000)
    assert core.state.consumers["a"].leaky_mib == 100
    core.probe("a", resident=True)
    assert core.unload("a") == ["unload a"]


def test_a_clean_unload_clears_a_leak() -> None:
    core = leaked()
    core.probe("a", resident=True)
    core.unload("a")
    core.unloaded("a")
    core.unloaded("d")
    core.sample(free=19_900)
    core.wait(11)
    core.sample(free=19_900)
    assert core.state.consumers["a"].leaky_mib is None


@pytest.mark.parametrize("free", [4_000, 7_500], ids=["a game began", "a load ended"])
def test_other_changes_in_the_meantime_make_nobody_leaky(free: int) -> None:
    """What else took memory while a unloaded may have taken what a gave back."""
    core = Core(
        service("a", 10_000),
        service("b", 15_000),
        service("c", 6_000),
        gpus=ANY_SLOTS,
        absent=["b", "c"],
    )
    core.sample(free=13_900)
    if free == 7_500:
        assert core.load("c") == ["load c"]
    assert core.request("r1", "b") == ["unload a"]
    core.unloaded("a")
    if free == 7_500:
        core.loaded("c")
    for _ in range(11):
        core.wait(1)
        core.sample(free=free)
    assert core.state.consumers["a"].leaky_mib is None


def test_a_victim_that_gave_back_half_is_not_leaky() -> None:
    core = Core(service("a", 10_000), service("b", 12_000), gpus=CARD_20, absent=["b"])
    core.sample(free=5_000)
    core.request("r1", "b")
    core.unloaded("a")
    for _ in range(11):
        core.wait(1)
        core.sample(free=10_000)
    assert core.state.consumers["a"].leaky_mib is None


def test_its_next_load_clears_a_leak() -> None:
    core = leaked()
    core.unloaded("d")
    core.sample(free=9_700)
    core.loaded("b")
    core.finish("r1")
    core.sample(free=13_000)
    core.load("a")
    core.loaded("a")
    assert core.state.consumers["a"].leaky_mib is None
    assert core.unload("a") == ["unload a"]


def test_a_resident_target_that_only_needed_others_gone_ends_its_swap_when_they_are() -> None:
    core = Core(service("a"), service("b"), planner=Table({"a": ["b"]}))
    assert core.request("r1", "a") == ["unload b"]
    assert core.unloaded("b") == ["serve r1"]
    assert core.history("load") == []


def test_a_failed_unload_cools_down_twice_as_long_each_time() -> None:
    core = Core(service("a", 10_000), service("b", 10_000), gpus=CARD_16, absent=["b"])
    assert core.request("r1", "b") == ["unload a"]
    for seconds in (5, 10, 20, 40):
        assert core.unloaded("a", error="unload_failed") == []
        assert core.wait(seconds - 0.5) == []
        assert core.wait(0.6) == ["unload a"]
    assert core.unloaded("a") == ["load b"]


def test_a_target_without_load_route_but_with_a_driver_gets_a_load_and_takes_memory_later() -> None:
    core = Core(
        lazy("c", 12_000, driver="process"), service("b", 6_000), gpus=ANY_SLOTS, absent=["b"]
    )
    core.sample(free=17_000)
    assert core.request("r1", "c") == ["load c"]
    assert core.loaded("c") == ["serve r1"]
    core.sample(free=17_000)  # the process is up and has loaded nothing yet
    assert core.request("r2", "b") == []
    core.cancel("r2")
    core.finish("r1")
    core.sample(free=6_300)
    assert core.request("r3", "b") == ["load b"]


def test_measured_footprints_take_the_place_of_what_is_not_declared() -> None:
    core = Core(service("a", 0, vram_auto=True), service("b", 10_000), gpus=CARD_16, absent=["b"])
    core.probe("a", resident=True, vram_mib=9_000)
    assert core.request("r1", "b") == ["unload a"]
    core.answer_all()
    core.finish("r1")
    assert core.request("r2", "a") == ["unload b"]


def test_a_lazy_service_in_use_before_the_broker_started_is_emptied_not_taken_for_a_stranger() -> (
    None
):
    core = Core(lazy("c", 12_000), gpus=CARD_16)
    core.sample(free=3_500)  # it holds its 12,000 already
    assert core.request("r1", "c") == ["unload c"]
    assert core.state.reasons["r1"].why == "unloading"
    core.unloaded("c")
    assert core.state.reasons["r1"].why == "memory"  # it may be coming free
    assert core.sample(free=15_500) == ["serve r1"]


def test_it_is_told_so_once_then_others_hold_the_card() -> None:
    core = Core(lazy("c", 12_000), gpus=CARD_16)
    core.sample(free=3_500)
    core.request("r1", "c")
    core.unloaded("c")
    for _ in range(5):
        assert core.wait(3) + core.sample(free=3_500) == []
    assert core.state.reasons["r1"].why == "unfit"


def test_what_a_failed_cold_start_left_in_memory_is_cleared_for_the_next_request() -> None:
    core = Core(lazy("c", 12_000), gpus=CARD_16)
    core.sample(free=15_900)
    core.request("r1", "c")
    core.sample(free=10_900)
    core.finish("r1", "upstream_error")
    core.sample(free=10_900)
    assert core.state.consumers["c"].residency == "unknown"
    assert core.request("r2", "c") == ["unload c"]
    core.unloaded("c")
    assert core.sample(free=15_900) == ["serve r2"]


def test_a_pinned_one_is_not_emptied_even_for_itself() -> None:
    core = Core(lazy("c", 12_000, pinned=True), gpus=CARD_16)
    core.sample(free=3_500)
    assert core.request("r1", "c") == []


def test_what_a_service_left_behind_itself_does_not_stand_in_its_way() -> None:
    """13,000 fit beside 2,100 and a desktop of 768, the first time and every other time."""
    residue = {"vram_residue_mib": 500}
    core = Core(lazy("c", 13_000, **residue), service("w", 2_100), gpus=(Gpu(total_mib=16_384),))
    core.sample(free=13_516)
    assert core.request("r1", "c") == ["serve r1"]
    core.sample(free=516)
    core.finish("r1")
    core.unload("c")
    core.unloaded("c")
    core.sample(free=13_016)  # its context stays
    assert core.request("r2", "c") == ["serve r2"]
    assert core.state.promises["c"].mib == {0: 12_500}


def test_a_process_that_was_stopped_has_left_nothing_behind() -> None:
    unit = Consumer(name="c", vram_mib={0: 13_000}, vram_residue_mib=500, driver="systemd")
    core = Core(unit, service("w", 2_100), gpus=(Gpu(total_mib=16_384),))
    core.sample(free=516)
    core.unload("c")
    core.unloaded("c")
    core.sample(free=13_016)  # 500 more than w are somebody else's
    assert core.request("r1", "c") == ["unload w"]

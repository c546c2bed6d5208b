"""Who is let in, and with which answer the others are turned away."""

import pytest

from mgpu_core import events as ev
from mgpu_core.config import Consumer, Gpu
from mgpu_core.events import ProbeFailure
from tests.core.driver import Core, service

TWO_CARDS = (Gpu(index=0, total_mib=24_000), Gpu(index=1, total_mib=24_000))
TWO_SLOTS = (Gpu(total_mib=24_000, max_parallel=2),)
ANY_SLOTS = (Gpu(total_mib=24_000, max_parallel=None),)

# ------------------------------------------------------------------ admission


def test_an_unknown_consumer_is_refused_even_while_draining() -> None:
    core = Core(service("a"))
    core.send(ev.Drain)
    assert core.request("r1", "ghost") == ["reject r1 no_consumer"]
    assert not core.rejection("r1").retryable


def test_a_refusal_names_the_consumer_where_there_is_one() -> None:
    core = Core(service("a", max_pending=1))
    for request, consumer in (("r1", "a"), ("r2", "a"), ("r3", "ghost")):
        core.request(request, consumer)
    assert core.rejection("r2").consumer == "a"
    assert core.rejection("r3").consumer is None


def test_draining_comes_before_unreachable() -> None:
    core = Core(service("a"))
    core.probe("a", failure="refused")
    core.send(ev.Drain)
    assert core.request("r1", "a") == ["reject r1 shutting_down"]


def test_unreachable_comes_before_a_cool_down() -> None:
    core = Core(service("a"), absent=["a"])
    core.request("r0", "a")
    core.loaded("a", error="load_failed")
    core.probe("a", failure="refused")
    assert core.request("r1", "a") == ["reject r1 consumer_unreachable"]


def test_a_cool_down_comes_before_a_full_queue() -> None:
    core = Core(service("a", max_pending=2))
    core.request("r0", "a")
    core.unload("a", force=True)
    core.unloaded("a")
    assert core.request("r1", "a") == ["load a"]
    core.loaded("a", error="load_failed")
    core.reconfigure(service("a", max_pending=1))
    assert core.request("r2", "a") == ["reject r2 load_failed"]
    rejection = core.rejection("r2")
    assert rejection.retryable
    assert rejection.retry_after in {4, 5}


def test_a_full_queue_comes_before_too_little_memory() -> None:
    core = Core(service("a", 30_000, max_pending=1))
    core.request("r0", "a")
    core.unload("a", force=True)
    core.unloaded("a")
    assert core.request("r1", "a") == ["reject r1 overloaded"]
    core.finish("r0")
    assert core.request("r2", "a") == ["reject r2 insufficient_vram"]


def test_max_pending_counts_all_that_is_admitted_and_unfinished() -> None:
    core = Core(service("a", max_pending=2))
    core.request("r1", "a")
    core.request("r2", "a")
    assert core.request("r3", "a") == ["reject r3 overloaded"]
    rejection = core.rejection("r3")
    assert rejection.retryable
    assert rejection.retry_after is not None
    assert rejection.retry_after >= 1
    assert core.finish("r1") == ["serve r2"]
    assert core.request("r4", "a") == []
    assert core.queue == ["r4"]


@pytest.mark.parametrize(
    ("mib", "settings", "admitted"),
    [
        (12_744, {}, True),
        (12_745, {}, False),
        (12_745, {"can_coexist_with": ("pinned",)}, True),
        (12_000, {"vram_load_mib": 12_745}, False),
    ],
    ids=["fits exactly", "one MiB too much", "beside the pinned one", "while it loads"],
)
def test_what_can_never_fit_is_refused_for_good(
    mib: int, settings: dict[str, object], admitted: bool
) -> None:
    core = Core(
        service("pinned", 10_000, pinned=True),
        service("a", mib, **settings),
        gpus=(Gpu(total_mib=24_000, reserved_mib=1_000),),
        absent=["a"],
    )
    expected = ["load a"] if admitted else ["reject r1 insufficient_vram"]
    assert core.request("r1", "a") == expected
    assert admitted or not core.rejection("r1").retryable


def test_what_is_resident_needs_no_room() -> None:
    core = Core(service("a", 90_000))
    assert core.request("r1", "a") == ["serve r1"]


def test_before_the_first_probe_nothing_is_unreachable() -> None:
    assert Core(service("a")).request("r1", "a") == ["serve r1"]


@pytest.mark.parametrize("failure", ["timeout", "status", "answer"])
def test_other_failures_count_only_in_a_row(failure: ProbeFailure) -> None:
    core = Core(service("a"))
    core.probe("a", failure=failure)
    core.use("r1", "a")
    core.probe("a", failure=failure)
    assert core.request("r2", "a") == ["reject r2 consumer_unreachable"]
    core.probe("a")
    core.use("r3", "a")
    core.probe("a", failure=failure)
    core.use("r4", "a")


def test_a_refused_connection_makes_it_unreachable_at_once_and_an_answer_reachable() -> None:
    core = Core(service("a"))
    core.probe("a", failure="refused")
    assert core.request("r1", "a") == ["reject r1 consumer_unreachable"]
    core.probe("a")
    assert core.request("r2", "a") == ["serve r2"]


def test_time_outs_during_its_own_work_say_nothing() -> None:
    core = Core(service("a", max_concurrency=2))
    core.request("r1", "a")
    for _ in range(4):
        core.wait(5)
        core.probe("a", failure="timeout")
    assert core.request("r2", "a") == ["serve r2"]


@pytest.mark.parametrize("failure", ["refused", "timeout", "status"])
def test_failures_while_it_loads_say_nothing(failure: ProbeFailure) -> None:
    core = Core(service("a", max_concurrency=2), absent=["a"])
    core.request("r1", "a")
    for _ in range(3):
        assert core.probe("a", failure=failure) == []
    assert core.request("r2", "a") == []
    assert core.loaded("a") == ["serve r1", "serve r2"]


@pytest.mark.parametrize("driver", ["process", "systemd", "container"])
def test_what_a_driver_can_start_need_not_answer_yet(driver: str) -> None:
    core = Core(Consumer(name="a", driver=driver))
    core.probe("a", failure="refused")
    assert core.request("r1", "a") == ["load a"]


def test_who_becomes_unreachable_fails_all_that_waits_for_it() -> None:
    core = Core(service("x"), service("b"))
    core.request("long", "x")
    core.request("r1", "b")
    core.request("r2", "b")
    told = core.probe("b", failure="refused")
    assert told == ["reject r1 consumer_unreachable", "reject r2 consumer_unreachable"]
    assert core.serving == ["long"]


def test_a_second_request_of_the_same_name_changes_nothing() -> None:
    core = Core(service("a", max_concurrency=2))
    core.request("r1", "a")
    assert core.request("r1", "a") == []
    assert core.last_notes
    assert core.serving == ["r1"]

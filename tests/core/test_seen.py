"""One test for each rule that mends what a prototype really did; each docstring tells the history.

Without the rule, the history ends in a deadlock, a livelock, starvation, a needless rejection or
an over-commit of memory.
"""

from mgpu_core.config import Gpu
from tests.core.driver import Core, lazy, service

CARD_16 = (Gpu(total_mib=16_000),)
CARD_20 = (Gpu(total_mib=20_000),)
TWO_SLOTS = (Gpu(total_mib=24_000, max_parallel=2),)


def failed_unload() -> Core:
    """r1 wants b in; a has to go and refuses."""
    core = Core(service("a", 10_000), service("b", 10_000), gpus=CARD_16, absent=["b"])
    core.sample(free=5_500)
    assert core.request("r1", "b") == ["unload a"]
    assert core.unloaded("a", error="unload_failed") == []
    return core


def test_after_a_failed_unload_its_own_memory_counts_as_free_for_itself() -> None:
    """Both sides starved, one half: a failed to unload and was then neither resident nor gone.

    A request for a itself wanted its MiB free, which a itself still held: it waited for ever.
    """
    core = failed_unload()
    assert core.residency("a") == "unknown"
    assert core.asked_to_probe("a")
    core.sample(free=5_500)
    assert core.request("r2", "a") == ["load a"]
    assert core.loaded("a") == ["serve r2"]


def test_after_a_failed_unload_it_stays_a_victim_with_its_whole_gain() -> None:
    """Both sides starved, the other half: an unknown a gained nothing as a victim.

    So no set made b fit, although unloading a once more would have done it. A failed unload is no
    leak: nothing was given back because nothing was unloaded.
    """
    core = failed_unload()
    core.sample(free=5_500)
    core.wait(5.5)
    core.sample(free=5_500)
    assert core.history("unload") == ["unload a", "unload a"]
    assert core.state.consumers["a"].leaky_mib is None
    core.unloaded("a")
    assert core.sample(free=15_500) == ["load b"]
    assert core.loaded("b") == ["serve r1"]


def test_a_model_that_a_running_job_calls_does_not_wait_for_its_own_caller() -> None:
    """An image job held the only slot and called a language model in the middle of its work.

    The model's request waited for the slot, the job waited for the model: neither ever ended.
    """
    core = Core(
        service("comfyui", 13_000),
        service("llm", 4_000, gpu_slot=False),
        service("voice", 2_000),
        absent=["llm"],
    )
    assert core.request("job", "comfyui") == ["serve job"]
    assert core.request("speech", "voice") == []  # who takes a slot waits
    assert core.request("call", "llm") == ["load llm"]
    assert core.loaded("llm") == ["serve call"]
    core.finish("call")
    assert core.finish("job") == ["serve speech"]


def test_a_lost_unload_completion_does_not_block_its_consumer_for_ever() -> None:
    """The answer to an unload never came. The consumer stayed `unloading`, and so did all else."""
    core = Core(
        service("a", 10_000),
        service("b", 10_000),
        gpus=CARD_16,
        absent=["b"],
        unload_timeout_us=60_000_000,
    )
    assert core.request("r1", "b") == ["unload a"]
    core.wait(59)
    assert core.residency("a") == "unloading"
    core.wait(2)
    assert core.residency("a") == "unknown"
    core.cancel("r1")
    assert core.request("r2", "a") == ["load a"]
    assert core.loaded("a") == ["serve r2"]


def test_a_lost_load_completion_does_not_block_its_consumer_for_ever() -> None:
    """The answer to a load never came. Its waiters waited for ever, and all later ones."""
    core = Core(service("a", 10_000), absent=["a"], load_timeout_us=20_000_000)
    assert core.request("r1", "a") == ["load a"]
    late = core.state.swaps["a"].epoch
    assert core.wait(19) == []
    assert core.wait(2) == ["reject r1 load_failed"]
    assert core.residency("a") == "unknown"
    core.wait(10)
    assert core.request("r2", "a") == ["load a"]
    assert core.state.swaps["a"].epoch > late
    assert core.loaded("a") == ["serve r2"]


def test_a_loaded_consumer_is_not_evicted_before_its_waiter_got_the_slot() -> None:
    """Two loads evicted each other 50 times while a third consumer held the only slot.

    Each load ended without a slot for its waiter, which went back to the queue; the consumer was
    idle then, so that the other's load took its memory, and so on.
    """
    core = Core(service("x", 8_000), service("a", 10_000), service("b", 10_000), absent=["a", "b"])
    assert core.request("long", "x") == ["serve long"]
    assert core.request("ra", "a") == ["load a"]
    assert core.loaded("a") == []
    assert core.queue == ["ra"]
    assert core.request("rb", "b") == []
    assert core.wait(60) == []
    assert core.finish("long") == ["serve ra", "unload x"]  # x is idle now and makes room for b
    core.answer_all()
    core.finish("ra")
    core.answer_all()
    assert core.serving == ["rb"]
    assert core.history("load") == ["load a", "load b"]


def test_whoever_left_owes_nothing_any_more() -> None:
    """The other side of the same rule: owed ends when the waiter is gone, not only when granted."""
    core = Core(
        service("x", 8_000, pinned=True),
        service("a", 10_000),
        service("b", 10_000),
        absent=["a", "b"],
    )
    core.request("long", "x")
    core.request("ra", "a")
    core.loaded("a")
    assert core.request("rb", "b") == []
    assert core.cancel("ra") == ["unload a"]


def test_a_promoted_request_and_an_owed_consumer_do_not_wait_for_each_other() -> None:
    """A promoted request wanted the memory of a consumer that was owed to a later arrival.

    The promotion held the later one back, being owed kept the consumer in: both waited for ever.
    """
    core = Core(
        service("x", 10_000, max_concurrency=2),
        service("a", 4_000),
        service("b", 20_000),
        absent=["a", "b"],
        overtake_bound=1,
    )
    core.request("long", "x")
    assert core.request("big", "b") == []
    assert core.request("small", "a") == ["load a"]  # the one overtake that the bound allows
    assert core.loaded("a") == []
    assert core.request("more", "x") == []  # the promotion holds: x would be kept at work
    assert core.finish("long") == ["serve small"]
    assert sorted(core.finish("small")) == ["unload a", "unload x"]
    core.answer_all()
    assert core.serving == ["big"]


def test_every_later_grant_on_its_card_counts_not_only_those_in_its_way() -> None:
    """Only grants to planned victims counted, and the stream was never a victim.

    b had to wait for x, while y, which nobody wanted to evict, was served again and again.
    """
    core = Core(
        service("x", 10_000),
        service("y", 2_000, pinned=True),
        service("b", 14_000),
        gpus=TWO_SLOTS,
        absent=["b"],
    )
    core.request("long", "x")
    assert core.request("rb", "b") == []
    for number in range(8):
        core.use(f"y{number}", "y")
    assert core.state.overtaken["rb"] == 8


def test_a_request_for_two_cards_is_not_starved_by_one_stream_on_each() -> None:
    """Fences stood on single consumers; the one wanted two slots at the same time.

    Two streams overlapped such that never both cards were idle at once.
    """
    cards = (Gpu(index=0, total_mib=24_000), Gpu(index=1, total_mib=24_000))
    core = Core(
        service("a", 4_000, max_concurrency=2),
        service("b", 4_000, vram_mib={1: 4_000}, max_concurrency=2),
        service("both", 4_000, vram_mib={0: 4_000, 1: 4_000}),
        gpus=cards,
    )
    core.request("s0", "a")
    assert core.request("wide", "both") == []
    running, granted = ["s0"], 0
    for number in range(1, 30):
        name = f"s{number}"
        if core.request(name, "ab"[number % 2]) == [f"serve {name}"]:
            granted += 1
            running.append(name)
        if len(running) > 1:
            core.finish(running.pop(0))
    assert granted == 8
    for name in running:
        core.finish(name)
    assert "wide" in core.serving


def test_a_stream_for_the_very_same_consumer_cannot_starve_a_request() -> None:
    """Fences on victims said nothing about the consumer of the request itself.

    Urgent requests for a kept coming, one was always queued when the one before it ended.
    """
    core = Core(service("a", 4_000))
    core.request("u0", "a", priority=4)
    core.request("low", "a", priority=0)
    overtaken = 0
    for number in range(1, 40):
        core.request(f"u{number}", "a", priority=4)
        if core.finish(f"u{number - 1}") == ["serve low"]:
            break
        overtaken += 1
    assert overtaken == 16  # twice the bound: they are of higher priority


def test_waiting_long_promotes_nobody() -> None:
    """A wall-clock maximum made a long queue FIFO: everybody in it was over age."""
    core = Core(service("x", 10_000, max_concurrency=2), service("b", 20_000), absent=["b"])
    core.request("long", "x")
    assert core.request("rb", "b") == []
    core.wait(290)
    assert core.request("fresh", "x") == ["serve fresh"]


def test_a_probe_taken_during_a_cold_start_does_not_undo_it() -> None:
    """The first image request was loading its model; the probe in the meantime said `not loaded`.

    It arrived after the job and the consumer counted as absent with 13 GB in memory.
    """
    core = Core(lazy("c", 13_000))
    assert core.request("first", "c") == ["serve first"]
    core.wait(1)
    during = core.at
    core.probe("c", taken=during, resident=False)
    assert core.residency("c") == "resident"
    core.finish("first")
    core.probe("c", taken=during, resident=False)
    assert core.residency("c") == "resident"
    core.probe("c", resident=False)
    assert core.residency("c") == "absent"


def test_a_probe_taken_during_a_load_does_not_undo_it() -> None:
    """The same with a load by command: the probe began before the load had ended."""
    core = Core(service("a", 4_000), absent=["a"])
    assert core.load("a") == ["load a"]
    core.wait(1)
    during = core.at
    core.loaded("a")
    core.probe("a", taken=during, resident=False)
    assert core.residency("a") == "resident"
    core.probe("a", resident=False)
    assert core.residency("a") == "absent"


def test_a_probe_taken_during_a_swap_does_not_bring_its_victim_back() -> None:
    core = Core(service("a", 20_000), service("b", 20_000), absent=["b"])
    core.request("r1", "b")
    core.unloaded("a")
    core.wait(1)
    during = core.at
    core.wait(1)
    core.loaded("b")
    core.probe("a", taken=during, resident=True)
    assert core.residency("a") == "absent"
    core.probe("a", resident=True)
    assert core.residency("a") == "resident"


def test_one_failed_sample_does_not_forget_a_game() -> None:
    """6 GB of a game were measured; then one reading failed and the static budget knew no game."""
    core = Core(service("a", 12_000), gpus=CARD_16, absent=["a"])
    core.sample(free=10_000)
    assert core.request("r1", "a") == []
    assert core.sample_fails() == []
    assert core.wait(30) == []  # long stale: the static budget decides, less the game
    assert core.sample_fails() == []
    assert core.sample(free=15_800) == ["load a"]


def test_memory_is_not_sold_twice_while_the_victims_unload() -> None:
    """A sample showed the memory free before the load had begun, and a second swap took it."""
    core = Core(
        service("a", 10_000),
        service("b", 12_000),
        service("c", 9_000),
        gpus=CARD_20,
        absent=["b", "c"],
    )
    core.sample(free=9_800)
    assert core.request("rb", "b") == ["unload a"]
    core.sample(free=19_800)
    assert core.request("rc", "c") == []
    assert core.unloaded("a") == []
    assert core.sample(free=19_800) == ["load b"]
    assert core.queue == ["rc"]


def test_memory_is_not_sold_twice_between_a_load_and_the_next_sample() -> None:
    """The load was over, the sample at hand was older and still showed its memory as free."""
    core = Core(service("b", 12_000), service("c", 9_000), gpus=CARD_20, absent=["b", "c"])
    core.sample(free=19_800)
    assert core.request("rb", "b") == ["load b"]
    core.wait(1)
    core.loaded("b")
    assert core.request("rc", "c") == []
    core.sample(free=19_800, age_s=0.5)  # taken before the load was over
    assert core.queue == ["rc"]
    core.sample(free=7_800)
    assert core.queue == ["rc"]
    assert core.finish("rb") == ["unload b"]


def test_a_lazy_swap_that_waits_for_a_slot_does_not_begin_again_and_again() -> None:
    """The victims of a cold start were gone, its waiter had no slot yet and its swap was over.

    So the next walk began a new swap, which was over at once, and so on, for ever.
    """
    core = Core(service("x", 4_000), service("a", 10_000), lazy("c", 13_000))
    core.request("long", "x")
    assert core.request("image", "c") == ["unload a"]
    assert core.unloaded("a") == []
    assert core.queue == ["image"]
    assert core.request("again", "a") == []  # its memory is promised, and c is owed
    assert core.wait(30) == []
    assert core.cancel("again") == []
    assert core.finish("long") == ["serve image"]
    assert core.history("unload", "load") == ["unload a"]
    assert core.residency("c") == "resident"

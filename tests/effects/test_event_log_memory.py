"""What a new run begins with: what the last one knew, whatever became of its log."""

import gzip
import json
import logging
import re
from pathlib import Path

import pytest
from attrs import evolve

from mgpu_core.config import Consumer, in_order
from mgpu_core.events import Pin, Started
from mgpu_core.lifecycle import carried_over
from mgpu_core.scheduler import Scheduler
from mgpu_core.state import Cooldown, State
from mgpu_effects.event_log import read, recall
from mgpu_effects.event_log.writing import SEGMENT_EVENTS
from tests.support.brokers import lines, only_resident, over, running, service, settings_of, submit
from tests.support.logs import header, history, write_log
from tests.support.upstream import Upstream

OUTLIVES = (
    "measured_mib",
    "leaky_mib",
    "last_used",
    "uses",
    "credit",
    "load_us",
    "load_cooldown",
    "unload_cooldown",
    "total_requests",
)

# ------------------------------------------------------------------------------------ the core


def experienced() -> State:
    """A state with something of everything that outlives a run."""
    state = history().states[-1]
    known = evolve(
        state.consumers["ollama"],
        measured_mib=7_700,
        leaky_mib=300,
        last_used=42,
        uses=7,
        credit=5,
        load_us=1_234,
        load_cooldown=Cooldown(failures=2, until=99),
        unload_cooldown=Cooldown(failures=1, until=98),
        total_requests=9,
    )
    return evolve(state, age=17, epoch=23, consumers={**state.consumers, "ollama": known})


def test_a_new_run_is_as_if_the_old_state_had_been_started() -> None:
    for state in (*history().states[:: len(history().steps) // 7], experienced()):
        scheduler = Scheduler(state.config)
        event = Started(at=state.at + 5, run="r2")
        expected = scheduler.step(state, event)
        got = scheduler.step(carried_over(state, state.config, event.at), event)
        assert got == expected


def test_a_clock_that_was_set_back_holds_nothing_up() -> None:
    state = experienced()
    back = 10**15
    begun = carried_over(state, state.config, state.at - back)
    assert begun.at == state.at - back
    after = begun.consumers["ollama"]
    assert after.load_cooldown == Cooldown(failures=2, until=99 - back)
    assert after.unload_cooldown == Cooldown(failures=1, until=98 - back)
    assert after.last_used == 42 - back


def test_what_is_known_of_a_consumer_outlives_a_change_of_the_configuration() -> None:
    state = experienced()
    others = {name: c for name, c in state.config.consumers.items() if name != "comfyui"}
    new = Consumer(name="new", load_route=True, unload_route=True)
    config = in_order(evolve(state.config, consumers={**others, "new": new}, overtake_bound=3))
    begun = carried_over(state, config, state.at + 9)
    assert begun.config == config
    assert begun.consumers.keys() == config.consumers.keys()
    assert (begun.epoch, begun.age, begun.counters) == (23, 17, state.counters)
    known, before = begun.consumers["ollama"], state.consumers["ollama"]
    for name in OUTLIVES:
        assert getattr(known, name) == getattr(before, name), name
    assert begun.consumers["new"] == Scheduler(config).initial().consumers["new"]


def test_what_was_under_way_does_not_outlive_it() -> None:
    state = next(s for s in history().states if s.swaps and s.requests)
    begun = carried_over(state, state.config, state.at + 9)
    for held in (begun.requests, begun.queue, begun.swaps, begun.promises, begun.serving):
        assert not held
    fresh = Scheduler(state.config).initial()
    for name, consumer in begun.consumers.items():
        assert consumer.residency is fresh.consumers[name].residency


# ------------------------------------------------------------------------------------- the log


@pytest.mark.parametrize("per_segment", [20, 10_000])
def test_the_end_of_the_log_is_the_state_of_the_last_event(
    tmp_path: Path, per_segment: int
) -> None:
    told = history()
    paths = write_log(tmp_path, told, per_segment=per_segment)
    for path in paths[:-1]:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    memory = recall(tmp_path)
    assert memory.state == told.states[-1]
    assert memory.seq == len(told.steps)


def test_where_nothing_was_there_is_nothing_to_remember(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert recall(tmp_path).state is None
    assert recall(tmp_path).seq == 0
    assert caplog.text == ""


def test_a_run_without_events_counts_too(tmp_path: Path) -> None:
    state = history().states[30]
    (tmp_path / "events-r1-0000000031.jsonl").write_bytes(header(state))
    memory = recall(tmp_path)
    assert (memory.state, memory.seq) == (state, 30)


def test_a_torn_end_is_set_aside_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = history().first(30)
    (path,) = write_log(tmp_path, told)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert recall(tmp_path).state == told.states[29]
    assert "are set aside in events-r1-0000000001.jsonl.torn" in caplog.text
    assert recall(tmp_path).seq == 29
    assert path.read_bytes() + (tmp_path / f"{path.name}.torn").read_bytes() == whole[:-10]


def test_a_full_disk_does_not_cost_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = history().first(30)
    (path,) = write_log(tmp_path, told)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert recall(tmp_path).state == told.states[29]
    assert "stay where they are: No space left on device" in caplog.text
    assert path.read_bytes() == whole[:-10]


def test_a_segment_that_is_torn_in_its_header_gives_way_to_the_one_before(tmp_path: Path) -> None:
    told = history().first(30)
    write_log(tmp_path, told)
    torn = tmp_path / "events-r1-0000000031.jsonl"
    torn.write_bytes(header(told.states[-1])[:100])
    memory = recall(tmp_path)
    assert (memory.state, memory.seq) == (told.states[-1], 30)
    assert not torn.exists(), "so that its name is free"


def damage(path: Path) -> bytes:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)
    return bytes(whole)


def later_format(path: Path) -> bytes:
    head, _, rest = path.read_bytes().partition(b"\n")
    header = json.loads(head)
    del header["crc"]
    path.write_bytes(json.dumps({**header, "format": 9}).encode() + b"\n" + rest)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("harm", "said"),
    [(damage, r"byte \d+, line \d+: its checksum"), (later_format, "has format 9, written by")],
)
def test_a_segment_that_cannot_be_read_stays_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: object, said: str
) -> None:
    told = history().first(60)
    paths = write_log(tmp_path, told, per_segment=20)
    content = harm(paths[2])  # type: ignore[operator]
    memory = recall(tmp_path)
    assert memory.state == told.states[40]
    assert memory.seq == 41 + SEGMENT_EVENTS, "beyond what may have been given"
    assert paths[2].read_bytes() == content, "untouched"
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert str(paths[2]) in caplog.text
    assert re.search(said, caplog.text)


def test_where_nothing_can_be_read_a_run_begins_afresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in write_log(tmp_path, history().first(60), per_segment=20):
        damage(path)
    memory = recall(tmp_path)
    assert (memory.state, memory.seq) == (None, 41 + SEGMENT_EVENTS)
    assert "this one begins afresh" in caplog.text


# ---------------------------------------------------------------------------------- the broker


async def test_the_next_run_knows_what_the_last_one_knew(
    tmp_path: Path, upstream: Upstream
) -> None:
    a, b = service(upstream, "a"), service(upstream, "b")
    async with running(settings_of(a, b), tmp_path) as first:
        await only_resident(first, "a")
        for name in ("a", "b", "a"):
            await over(submit(first, name)[0])
        await first.apply(lambda at: Pin(at=at, consumer="a", pinned=True))
    old = first.state
    assert old.counters.loads > 0
    assert old.consumers["a"].load_us is not None

    c = service(upstream, "c")
    async with running(settings_of(a, c), tmp_path) as second:
        new = second.state
        assert new.run == second.run != first.run
        for name in OUTLIVES:
            assert getattr(new.consumers["a"], name) == getattr(old.consumers["a"], name), name
        assert new.consumers["a"].pinned is None, "commands of operators do not outlive a run"
        assert new.consumers.keys() == {"a", "c"}
        assert (new.counters, new.epoch) == (old.counters, old.epoch)
        assert new.at >= old.at
    seqs = [line["seq"] for line in lines(tmp_path)]
    runs = [item.run for item in read(tmp_path) if hasattr(item, "run")]
    assert runs == [first.run, second.run]
    assert sorted(seqs) == list(range(1, len(seqs) + 1)), "numbers go on"


async def test_a_broker_starts_whatever_is_in_its_log(tmp_path: Path, upstream: Upstream) -> None:
    (tmp_path / "events-r0-0000000001.jsonl").write_bytes(b"\0" * 5000 + b"\n{}\n")
    (tmp_path / "events-r0-0000000002.jsonl").mkdir()
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        await over(submit(broker, "a")[0])
    assert broker.state.consumers["a"].total_requests == 1

"""Which reading counts for which figure, and how the figures outlive a broker."""

import json
import logging

import pytest
from attrs import evolve

from mgpu_core.config import SECOND_US, Config, Consumer
from mgpu_core.events import UnloadDone
from mgpu_core.state import ConsumerState, Operation, Residency, State, initial_state
from mgpu_effects.footprints import FILE, MOST_KEPT, RECENT, Footprint, Footprints
from mgpu_effects.gpu_processes import Holders, Holding
from mgpu_effects.probes import ProbeFacts
from mgpu_effects.settings import ConsumerSettings, ResidencySettings

NOW = 100 * SECOND_US
A = Consumer(name="a", vram_mib={0: 4_000}, unload_route=True)
B = Consumer(name="b", vram_mib={0: 4_000}, server="a")


class Bench:
    """Footprints of `a` and `b` beside a state and readings that the test writes down."""

    def __init__(self, directory) -> None:
        config = Config(consumers={"a": A, "b": B})
        absent = {name: ConsumerState(residency=Residency.ABSENT) for name in ("a", "b")}
        self.state: State = evolve(initial_state(config), consumers=absent, at=NOW)
        self.footprints = Footprints(directory, lambda: self.state)

    def is_now(self, name: str = "a", **fields: object) -> None:
        one = evolve(self.state.consumers[name], **fields)
        self.state = evolve(self.state, consumers={**self.state.consumers, name: one})

    def reads(self, mib: int | None, *owners: str, taken: int = NOW, other_mib: int = 0) -> None:
        mine = (Holding(index=0, pid=7, name="x", mib=mib, owners=frozenset(owners or ["a"])),)
        used_mib = {0: (mib or 0) + other_mib}
        holdings = mine if mib != 0 else ()
        self.footprints.measure(Holders(taken=taken, used_mib=used_mib, holdings=holdings))

    @property
    def seen(self) -> Footprint:
        return self.footprints["a"]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_a_reading_counts_for_what_the_consumer_did_all_the_while(bench):
    bench.is_now(residency=Residency.LOADING, moved=NOW - 10)
    bench.reads(7_000)
    bench.is_now(residency=Residency.RESIDENT, moved=NOW + 10)
    bench.reads(6_500, taken=NOW + 5)  # it was still loading when this began
    bench.reads(5_000, taken=NOW + 20)
    bench.state = evolve(bench.state, serving={"a": 1})
    bench.reads(6_000, taken=NOW + 30)
    bench.state = evolve(bench.state, serving={})
    bench.is_now(last_done=NOW + 50)
    bench.reads(6_200, taken=NOW + 40)  # it worked, at least in part
    bench.is_now(residency=Residency.UNLOADING, moved=NOW + 60)
    bench.reads(300, taken=NOW + 70)
    assert bench.seen == Footprint(
        steady_mib=5_000, load_peaks=((NOW - 10, 7_000),), work_peaks=((NOW + 10, 6_000),)
    )


def test_who_works_past_the_broker_does_not_rest(bench):
    bench.is_now(residency=Residency.RESIDENT, moved=1, last_done=5, busy_seen=9)
    bench.reads(6_000)
    assert (bench.seen.steady_mib, bench.seen.work_peak_mib) == (None, 6_000)


def test_before_its_first_work_after_a_load_the_steady_figure_only_rises(bench):
    bench.is_now(residency=Residency.RESIDENT, moved=10, last_done=20)
    bench.reads(5_000)
    bench.is_now(moved=30)  # loaded again, and not used since
    bench.reads(4_500)
    assert bench.seen.steady_mib == 5_000
    bench.is_now(last_done=40)
    bench.reads(4_500)
    assert bench.seen.steady_mib == 4_500


def test_what_an_unload_leaves_is_read_once_it_has_settled(bench):
    bench.is_now(moved=NOW)
    bench.reads(4_000, taken=NOW + 1)
    assert bench.seen.residue_mib is None
    bench.reads(400, taken=NOW + bench.state.config.poll_interval_us)
    assert bench.seen.residue_mib == 400


def test_a_crash_does_not_show_what_an_unload_leaves(bench):
    bench.is_now(refused=True)
    bench.reads(0)
    assert bench.seen.residue_mib is None
    bench.is_now(refused=False)
    bench.reads(0)
    assert bench.seen.residue_mib == 0


@pytest.mark.parametrize(("other_mib", "residue_mib"), [(100, 0), (4_000, None)])
def test_that_it_holds_nothing_is_believed_where_nothing_else_could_be_its(
    bench, other_mib, residue_mib
):
    bench.reads(0, other_mib=other_mib)
    assert bench.seen.residue_mib == residue_mib


def test_a_service_that_is_in_and_holds_nothing_is_not_seen_at_all(bench):
    bench.is_now(residency=Residency.RESIDENT)
    bench.reads(0)
    assert bench.seen == Footprint()


def test_a_process_of_two_tells_of_one_only_while_the_other_is_out(bench):
    bench.is_now(residency=Residency.RESIDENT)
    bench.is_now("b", residency=Residency.RESIDENT)
    bench.reads(9_000, "a", "b")
    assert (bench.footprints.held_mib("a"), bench.seen.steady_mib) == (None, None)
    bench.is_now("b", residency=Residency.ABSENT)
    bench.reads(5_000, "a", "b")
    assert (bench.footprints.held_mib("a"), bench.seen.steady_mib) == (5_000, 5_000)
    assert bench.footprints["b"].residue_mib is None


def test_what_the_driver_keeps_to_itself_is_not_known(bench):
    bench.is_now(residency=Residency.RESIDENT)
    bench.reads(None)
    assert (bench.footprints.held_mib("a"), bench.seen) == (None, Footprint())
    bench.footprints.measure(Holders(taken=NOW, error="no_gpu"))
    assert bench.footprints.held_mib("a") is None


def test_a_peak_is_the_highest_of_the_last_loads(bench):
    for load, mib in enumerate([9_000, *[8_000] * (RECENT - 1)]):
        bench.is_now(residency=Residency.LOADING, moved=load)
        bench.reads(mib - 500)
        bench.reads(mib)
        bench.reads(mib - 200)
    assert (bench.seen.load_peak_mib, len(bench.seen.load_peaks)) == (9_000, RECENT)
    bench.is_now(moved=RECENT)
    bench.reads(8_000)
    assert (bench.seen.load_peak_mib, len(bench.seen.load_peaks)) == (8_000, RECENT)


def test_an_unload_is_timed_by_its_own_end(bench):
    unloading = Operation(kind="unload", epoch=7, since=NOW, deadline=NOW + 60 * SECOND_US)
    bench.is_now(residency=Residency.UNLOADING, operation=unloading)
    before, after = bench.state, evolve(bench.state, at=NOW + 2 * SECOND_US)
    for event in (
        UnloadDone(at=after.at, consumer="a", epoch=6),
        UnloadDone(at=after.at, consumer="a", epoch=7, error="timeout"),
        UnloadDone(at=after.at, consumer="stranger", epoch=7),
    ):
        bench.footprints.see(event, before, after)
        assert bench.seen.unload_us is None
    bench.footprints.see(UnloadDone(at=after.at, consumer="a", epoch=7), before, after)
    assert bench.seen.unload_us == 2 * SECOND_US


def test_the_word_of_a_service_stands_beside_what_was_measured(bench):
    asked = ResidencySettings(path="/state", resident="loaded", mib="mib")
    unit = ConsumerSettings(name="a", url="http://h", residency=asked, vram_resident_mib="auto")
    said = ProbeFacts(healthy=True, resident=True, vram_mib=4_700)
    assert bench.footprints.probed(unit, said) == said  # nothing was measured yet
    bench.is_now(residency=Residency.RESIDENT)
    bench.reads(5_000)
    assert bench.footprints.probed(unit, said) == evolve(said, vram_mib=5_000)
    assert bench.footprints.said_mib("a") == 4_700
    declared = evolve(unit, vram_resident_mib=4_000)
    assert bench.footprints.probed(declared, said) == said
    bench.state = evolve(bench.state, consumers={"b": bench.state.consumers["b"]})
    bench.reads(0)
    assert bench.footprints.said_mib("a") is None  # it is no more


# ------------------------------------------------------------------------------ over a restart


async def test_the_next_broker_begins_with_the_figures_of_the_last(tmp_path, bench):
    bench.is_now(residency=Residency.RESIDENT, moved=3)
    bench.reads(5_000)
    bench.state = evolve(bench.state, serving={"a": 1})
    bench.reads(6_000)
    await bench.footprints.save(now=True)
    again = Footprints(tmp_path, lambda: bench.state)
    again.recall()
    assert again["a"] == bench.seen != Footprint()


async def test_it_is_written_where_something_changed_and_not_at_every_reading(tmp_path, bench):
    await bench.footprints.save()
    assert not (tmp_path / FILE).exists()
    for mib in (5_000, 5_001):
        bench.is_now(residency=Residency.RESIDENT, last_done=1)
        bench.reads(mib)
        await bench.footprints.save()
    kept = json.loads((tmp_path / FILE).read_text())
    assert kept["consumers"]["a"]["steady_mib"] == 5_000


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"consumers": {"a": []}}',
        b'{"consumers": {"a": {"steady_mib": "x", "load_peaks": [], "work_peaks": []}}}',
        b'{"consumers": {"a": {"strange": 1, "load_peaks": [], "work_peaks": []}}}',
    ],
)
def test_a_file_that_is_damaged_is_said_and_passed_over(tmp_path, bench, content, caplog):
    (tmp_path / FILE).write_bytes(content)
    bench.footprints.recall()
    assert bench.seen == Footprint()
    assert "forgotten" in caplog.text


async def test_a_disk_that_takes_nothing_is_said_once_and_tried_again(tmp_path, bench, caplog):
    caplog.set_level(logging.ERROR)
    bench.footprints = Footprints(tmp_path / "later", lambda: bench.state)
    bench.is_now(residency=Residency.RESIDENT)
    bench.reads(5_000)
    for _ in range(2):
        await bench.footprints.save(now=True)
    assert len(caplog.records) == 1
    (tmp_path / "later").mkdir()
    await bench.footprints.save(now=True)
    assert (tmp_path / "later" / FILE).exists()


def test_models_that_come_and_go_are_forgotten_in_the_end(bench):
    consumers = {f"m{n}": evolve(A, name=f"m{n}") for n in range(MOST_KEPT + 1)}
    resident = ConsumerState(residency=Residency.RESIDENT)
    config = evolve(bench.state.config, consumers=consumers)
    bench.state = evolve(bench.state, config=config, consumers=dict.fromkeys(consumers, resident))
    for name in consumers:
        bench.reads(5_000, name)
    assert bench.footprints["m0"] == Footprint()
    assert bench.footprints["m1"].steady_mib == 5_000

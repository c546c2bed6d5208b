"""The transcripts say what the core does; `--rewrite-transcripts` writes them anew."""

import itertools
import re
from pathlib import Path
from random import Random

import pytest
from attrs import evolve

from mgpu_core import events as ev
from mgpu_core.config import Consumer, Gpu, config_of
from mgpu_core.simulation import Report, campaign
from mgpu_core.simulation.shrinking import STEP_US, Case, Retold, case_of, retold, shifted
from mgpu_core.simulation.world import START_US
from mgpu_core.transcript import configured, transcript
from tests.core.transcript import COMMANDS, CONFIGURES, TranscriptError, rewritten

FOLDER = Path(__file__).parent / "transcripts"
PAGE = Path(__file__).parents[2] / "docs" / "transcripts.md"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_transcript_says_what_the_core_does(path: Path, request: pytest.FixtureRequest) -> None:
    now = rewritten(path.read_text(), path.name)
    if request.config.getoption("--rewrite-transcripts"):
        path.write_text(now)
    assert path.read_text().splitlines() == now.splitlines()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu total_mib=9000\nrequst r1 a\n", r"bad.txt, line 2: unknown command 'requst'"),
        ("request r1 a\n", r"line 1: a transcript begins with a configuration"),
        ("service a\nrequest r1 a\nservice b\n", r"line 3: 'service' belongs before"),
        ("service a\n\nloaded a\n", r"line 3: no load of a is under way"),
        ("service a\nrequest r1\n", r"line 2: .*missing"),
        ("service a 4000 colour=red\n", r"line 1: .*colour"),
    ],
)
def test_a_line_that_is_no_command_is_an_error_with_its_place(text: str, expected: str) -> None:
    with pytest.raises(TranscriptError, match=expected):
        rewritten(text, "bad.txt")


def test_the_page_about_transcripts_lists_every_command() -> None:
    listed = set(re.findall(r"^\| `([a-z-]+)", PAGE.read_text(), re.MULTILINE))
    assert listed == {*COMMANDS, *CONFIGURES}


def test_the_example_of_that_page_is_what_the_core_does() -> None:
    (example,) = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert rewritten(example, PAGE.name).splitlines() == example.splitlines()


def spread(report: Report) -> Case:
    """A run without a second start, with a millisecond at least between what comes from outside."""
    cards = {n: evolve(gpu, total_mib=24_000) for n, gpu in report.setting.config.gpus.items()}
    late_us, last, events = 0, START_US, []
    for event in case_of(report).events[: report.war]:
        if isinstance(event, ev.Tick | ev.Started):
            continue
        late_us += max(0, last + STEP_US - event.at - late_us)
        events.append(shifted(event, late_us))
        last = events[-1].at
        if isinstance(event, ev.Reconfigured):
            events[-1] = evolve(events[-1], config=evolve(event.config, gpus=cards))
    return Case(config=evolve(report.setting.config, gpus=cards), events=tuple(events))


def can_be_told(told: Retold) -> bool:
    """No event comes within a millisecond after a tick: a command takes as long."""
    steps = itertools.pairwise(told.history)
    return all(two.at - one.at >= STEP_US or isinstance(two, ev.Tick) for one, two in steps)


def test_a_history_is_told_so_that_it_can_be_played() -> None:
    cases = (spread(report) for report in campaign(range(16), Random, acts=8))
    told = [(case.config, again) for case in cases if can_be_told(again := retold(case))]
    assert len(told) >= 6
    for config, history in told:
        text = transcript(config, history.log)
        assert [line for line in rewritten(text, "told").splitlines() if line] == [
            line for line in text.splitlines() if line
        ]


def test_a_configuration_is_told_by_what_is_not_so_by_default() -> None:
    config = config_of(
        Consumer(name="a"),
        Consumer(name="b", vram_mib={0: 9, 1: 8}, load_route=True, idle_unload_us=1_500_000),
        Consumer(name="c", vram_mib={}, server="one", driver="process", can_coexist_with=("a",)),
        gpus=(Gpu(), Gpu(index=1, total_mib=24_000, max_parallel=None)),
        overtake_bound=None,
        settle_timeout_us=3_000_000,
        overlap_loads=False,
    )
    assert configured(config) == [
        "gpu",
        "gpu 1 total_mib=24000 max_parallel=none",
        "consumer a",
        "consumer b vram_mib=0:9,1:8 load_route=true idle_unload_s=1.5",
        "consumer c vram_mib=none server=one driver=process can_coexist_with=a",
        "set overtake_bound=none overlap_loads=false settle_timeout_s=3",
    ]

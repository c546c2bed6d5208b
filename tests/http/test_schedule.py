"""`mgpu bench schedule`: recorded arrivals are read as they are meant, and compared as asked."""

import json
from pathlib import Path
from random import Random

import pytest

from mgpu_core.simulation.policies import POLICIES
from mgpu_core.simulation.workload import Arrival
from mgpu_http.bench import schedule
from mgpu_http.bench.traces import LATENCIES, REQUESTS, read_trace
from mgpu_http.cli import main
from mgpu_http.commands.output import CommandError

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "traces" / "genai2026"
HEAD = (
    "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,checkpoint_model_version_id"
)
# The md5 of cat leaves 0 when divided by 4, that of fay 1, those of ann and ben 2.
LINES = (
    "2026-01-01 10:00:00,TXT_2_IMG,SUCCEED,30.0,ann,M1",
    "2026-01-01 10:00:05,TXT_2_IMG,FAILED,,ann,M1",
    "2026-01-01 10:01:00,IMG_2_IMG,SUCCEED,12.5,cat,M2",
    "2026-01-01 10:00:59,IMG_2_IMG,SUCCEED,20.0,ben,M1",
    "2026-01-01 10:03:00,IMG_2_IMG,SUCCEED,40.0,fay,M3",
)
M_KEYS = {
    "requests",
    "mean_wait_ms",
    "p95_wait_ms",
    "max_wait_ms",
    "loads",
    "evictions",
    "rejected",
    "load_hours",
    "utilisation",
}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    (tmp_path / REQUESTS).write_text("\n".join((HEAD, *LINES, "")))
    (tmp_path / LATENCIES).write_text("timestamp_anon,value\n1.0,10000.0\n2.0,20500.0\n")
    return tmp_path


def test_a_trace_is_what_one_part_of_the_users_was_served(trace: Path) -> None:
    first = Arrival(1_767_261_600_000_000, "M1", 30_000_000)
    read = read_trace(trace, users=4, part=2)
    assert read.loads_us == (10_000_000, 20_500_000)
    assert read.arrivals == (first, Arrival(first.at_us + 59_000_000, "M1", 20_000_000))
    assert [len(read_trace(trace, users=4, part=part).arrivals) for part in (0, 1)] == [1, 1]
    assert len(read_trace(trace, users=1, part=0).arrivals) == 4


def test_load_times_are_drawn_for_each_model_and_arrivals_begin_together(trace: Path) -> None:
    read = read_trace(trace, users=1, part=0)
    drawn = [read.workload(Random(seed), 2) for seed in range(20)]
    assert {len({t.load_us for t in one.traits.values()}) for one in drawn} == {1, 2}
    assert {one.config.gpus[0].total_mib for one in drawn} == {2_000}
    assert drawn[0] == read.workload(Random(0), 2)
    offsets = [at - drawn[0].script[0][0] for at, _ in drawn[0].script]
    assert offsets == [0, 59_000_000, 60_000_000, 180_000_000]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (REQUESTS, "gmt_create,groupId\n", "no column checkpoint_model_version_id, exec_time_"),
        (REQUESTS, f"{HEAD}\n", "no request of part 0 of 1"),
        (REQUESTS, f"{HEAD}\n{LINES[0]}\nnoon,X,SUCCEED,1,ann,M1\n", "line 3: Invalid isoformat"),
        (REQUESTS, f"{HEAD}\n2026-01-01 10:00:00,X,SUCCEED\n", "line 2: "),
        (LATENCIES, "value\nsoon\n", "line 2: could not convert"),
        (LATENCIES, None, "No such file or directory; --trace takes a directory"),
    ],
)
def test_what_is_wrong_with_a_trace_is_told(
    trace: Path, name: str, text: str | None, told: str
) -> None:
    if text is None:
        (trace / name).unlink()
    else:
        (trace / name).write_text(text)
    with pytest.raises(CommandError, match=told) as ended:
        read_trace(trace, users=1, part=0)
    assert ended.value.exit_code == 2


def compared(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["bench", "schedule", *options]) == 0
    return capsys.readouterr().out


def test_the_document_has_a_measurement_for_each_policy_and_seed(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--trace", str(trace), "--users", "1", "--slots", "2", "--seeds", "3", "--json")
    some = ("--policies", "fifo,default-gdsf", *options)
    document = json.loads(compared(capsys, *some, "--processes", "1"))
    assert list(document) == ["policies"]
    assert list(document["policies"]) == ["fifo", "default-gdsf"]
    for measured in document["policies"].values():
        assert [m.keys() for m in measured] == [M_KEYS] * 3
        assert [(m["requests"], m["rejected"]) for m in measured] == [(4, 0)] * 3
    late = json.loads(compared(capsys, *some, "--first-seed", "1", "--processes", "2"))
    for policy, measured in late["policies"].items():
        assert measured[:2] == document["policies"][policy][1:]


def test_the_table_has_all_policies(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--trace", str(trace), "--users", "1", "--seeds", "1", "--processes", "1")
    lines = compared(capsys, *options).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("|")][2:] == list(POLICIES)


def test_the_four_services_are_drawn_where_no_trace_is_given() -> None:
    runs = [schedule.Run(policy="default", seed=s, trace=None, slots=1) for s in (0, 0, 1)]
    first, again, other = (run.workload() for run in runs)
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--policies", "fifo,best"), "'best' is none of"),
        (("--trace", ".", "--users", "4", "--part", "4"), "of 4 parts the last is 3"),
        (("--trace", "nowhere"), "nowhere/lora_request_trace.csv: No such file"),
    ],
)
def test_wrong_input_is_explained(
    options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "schedule", *options]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded arrivals are not here")
def test_the_recorded_arrivals() -> None:
    parts = [read_trace(RECORDED, users=4, part=part) for part in range(4)]
    assert [len(one.arrivals) for one in parts] == [6663, 6229, 6245, 7255]
    assert len({one.model for part in parts for one in part.arrivals}) == 79
    assert len(parts[0].loads_us) == 7531

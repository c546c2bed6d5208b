import io
import json
from pathlib import Path

import pytest
from attrs import asdict
from rich.console import Console

from mgpu_http.demo.report import (
    Half,
    Happening,
    Outcome,
    comparison,
    longest_waiting,
    percentile,
    tally,
)
from mgpu_http.demo.run import Book, Journal


def outcome(name: str = "ok", waited_s: float = 1.0, request: str | None = None) -> Outcome:
    return Outcome(
        name="chat 1.1 llm", kind="llm", outcome=name, waited_s=waited_s, request=request
    )


def happening(what: str) -> Happening:
    return Happening(at=1.0, service="ollama", what=what, mib=100)


@pytest.mark.parametrize(
    ("values", "expected"), [([5.0], 5.0), ([1.0, 2.0], 2.0), (list(range(1, 101)), 95)]
)
def test_a_percentile_is_a_value_that_was_there(values: list[float], expected: float) -> None:
    assert percentile(values, 0.95) == expected


def test_every_request_is_counted_once() -> None:
    told = tally([outcome(), outcome("gave_up"), outcome("http_500"), outcome("gave_up")], [])
    assert told.requests == 4
    assert told.outcomes == {"ok": 1, "gave_up": 2, "http_500": 1}


def test_waits_are_those_of_the_answered() -> None:
    told = tally([outcome(waited_s=1), outcome(waited_s=2), outcome("gave_up", 60)], [])
    assert (told.mean_wait_ms, told.p95_wait_ms) == (1500, 2000)


def test_without_an_answer_there_is_no_wait() -> None:
    told = tally([outcome("unreachable")], [])
    assert (told.mean_wait_ms, told.p95_wait_ms) == (None, None)


def test_what_makes_room_is_an_eviction_and_what_expires_is_none() -> None:
    what = ("load", "load", "unload", "evict", "expire", "out_of_memory", "crash", "load_failed")
    told = tally([], map(happening, what))
    assert (told.loads, told.evictions, told.out_of_memory) == (2, 2, 1)


def test_the_document_has_the_keys_of_the_contract() -> None:
    assert list(json.loads(json.dumps(asdict(tally([outcome()], []))))) == [
        *("requests", "outcomes", "mean_wait_ms", "p95_wait_ms"),
        *("loads", "evictions", "out_of_memory"),
    ]


def test_who_waited_longest_has_an_id() -> None:
    waited = [
        outcome(waited_s=9),
        outcome(waited_s=2, request="a"),
        outcome(waited_s=1, request="b"),
    ]
    assert longest_waiting(waited) == waited[1]
    assert longest_waiting([outcome()]) is None


def test_both_halves_are_in_the_table() -> None:
    console = Console(file=io.StringIO(), width=80)
    better = [outcome(waited_s=1), outcome(waited_s=2)]
    worse = [outcome("job_lost"), outcome("job_lost")]
    console.print(
        comparison(
            {
                Half.WITH: (tally(better, []), better),
                Half.WITHOUT: (tally(worse, [happening("out_of_memory")] * 4), worse),
            }
        )
    )
    assert isinstance(console.file, io.StringIO)
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in console.file.getvalue().splitlines()
    ]
    assert ["requests", "2", "2"] in rows
    assert ["ok", "2", "-"] in rows
    assert ["job_lost", "-", "2"] in rows
    assert ["llm: ok, mean wait", "2 of 2,  1.5 s", "0 of 2,      -"] in rows
    assert ["out-of-memory crashes", "0", "4"] in rows


def test_a_journal_is_read_line_by_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.look() == []
    line = json.dumps({"at": 1.5, "service": "ollama", "what": "load", "mib": 7}) + "\n"
    with journal.path.open("a") as file:
        file.write(line + line[:9])  # the second is just being written
        file.flush()
        assert len(journal.look()) == 1
        file.write(line[9:])
    assert journal.look() == [Happening(at=1.5, service="ollama", what="load", mib=7)] * 2


def test_what_services_do_at_their_end_is_not_counted(tmp_path: Path) -> None:
    book = Book(Journal(tmp_path / "journal.jsonl"), {})
    line = json.dumps({"at": 1.5, "service": "ollama", "what": "unload", "mib": 7}) + "\n"
    book.journal.path.write_text(line)
    book.journal.look()
    book.journal.path.write_text(line * 2)
    assert book.tally().evictions == 1

import io

import pytest
from attrs import evolve
from rich.console import Console

from mgpu_core.notes import Why
from mgpu_http.demo.report import Half, Happening
from mgpu_http.demo.screen import (
    COLOURS,
    HAPPENED,
    Score,
    ServiceView,
    Snapshot,
    Waiting,
    card_bar,
    happened_words,
    plain,
    render,
    why_words,
)

WIDTHS = pytest.mark.parametrize("width", [80, 100])
VICTIMS = {"type": "victim_at_work", "who": ["mvoice", "whisper-server"], "free_mib": 3}
WHY = why_words(VICTIMS, "comfyui")
SNAPSHOT = Snapshot(
    half=Half.WITH,
    elapsed_s=12.4,
    seconds=30,
    total_mib=16_384,
    held={"desktop": 768, "mvoice": 2_345, "comfyui": 13_000},
    services=[
        ServiceView(name="mvoice", state="resident", held_mib=2_345, waiting=0, ok=12, not_ok=1),
        ServiceView(name="whisper-server", state="absent", waiting=9),
        ServiceView(name="ollama", state="unknown", waiting=0),
        ServiceView(name="comfyui", state="unloading", held_mib=13_000, running=1, crashes=2),
    ],
    queue=[Waiting(service="comfyui", waited_s=3.21, why=WHY)] * 9,
    happenings=[
        Happening(at=1.5, service="mvoice", what="load", mib=2_345),
        Happening(at=2.5, service="comfyui", what="out_of_memory", mib=12_500),
    ],
    scores={Half.WITH: Score(sent=31, ok=25, gave_up=1, failed=1), Half.WITHOUT: Score(sent=7)},
)


def drawn(snapshot: Snapshot, width: int, height: int = 30) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(render(snapshot, width, height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@WIDTHS
@pytest.mark.parametrize("height", [24, 30, 60])
def test_it_fits_and_shows_everything(width: int, height: int) -> None:
    lines = drawn(SNAPSHOT, width, height)
    assert len(lines) <= min(height, 27)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for shown in (
        *("with mgpu", "12 s, 18 s to go", "271 of 16,384 MiB are free", "2,345", "13,000"),
        *("mvoice", "whisper-server", "ollama", "comfyui", "resident", "absent", "unloading"),
        *(
            "3.2 s",
            why_words(VICTIMS, "comfyui"),
            "comfyui x9",
            "loaded (2,345 MiB)",
            "OUT OF MEMORY",
        ),
    ):
        assert shown in text, shown
    assert [line.split() for line in lines if line.startswith("with mgpu ")] == [
        ["with", "mgpu", "31", "25", "1", "1", "4", "-", "-"]
    ]


def test_those_who_wait_for_the_same_share_a_row_with_the_longest_wait() -> None:
    another = Waiting(service="comfyui", waited_s=1, why="another")
    sooner = evolve(another, waited_s=9.87)
    lines = drawn(evolve(SNAPSHOT, queue=[*SNAPSHOT.queue, another, sooner]), 80)
    assert [line.split()[:4] for line in lines if "comfyui x" in line] == [
        ["3.2", "s", "comfyui", "x9"],
        ["9.9", "s", "comfyui", "x2"],
    ]


@WIDTHS
def test_what_does_not_fit_into_its_line_is_cut_visibly(width: int) -> None:
    long = Waiting(service="comfyui", waited_s=1, why="x" * 200)
    cut = next(line for line in drawn(evolve(SNAPSHOT, queue=[long]), width) if "xxx" in line)
    assert cut.endswith("…")
    assert len(cut) == width


@WIDTHS
def test_nothing_jumps_when_the_queue_is_empty(width: int) -> None:
    quiet = Snapshot(
        half=Half.WITHOUT,
        elapsed_s=31,
        seconds=30,
        total_mib=16_384,
        held={},
        services=SNAPSHOT.services,
        scores=SNAPSHOT.scores,
    )
    lines = drawn(quiet, width)
    assert len(lines) == len(drawn(SNAPSHOT, width))
    assert "nobody comes any more" in lines[0]


@WIDTHS
@pytest.mark.parametrize("held", [{}, {"desktop": 768}, {"a": 16_384}, {"a": 9_000, "b": 9_000}])
def test_the_bar_is_as_wide_as_the_screen(width: int, held: dict[str, int]) -> None:
    snapshot = Snapshot(
        half=Half.WITH, elapsed_s=0, seconds=1, total_mib=16_384, held=held, services=()
    )
    assert len(card_bar(snapshot, width)) == width


def test_a_segment_is_as_wide_as_what_it_holds() -> None:
    spans = {str(span.style): span.end - span.start for span in card_bar(SNAPSHOT, 80).spans}
    assert abs(spans[COLOURS["comfyui"]] - 80 * 13_000 / 16_384) <= 1


@pytest.mark.parametrize("why", Why)
@pytest.mark.parametrize("who", [[], ["mvoice"]])
def test_every_reason_fits(why: Why, who: list[str]) -> None:
    assert len(why_words({"type": why.value, "who": who}, "comfyui")) < 54


def test_who_has_just_come_has_no_reason_yet() -> None:
    assert why_words(None, "comfyui") == "it has just come"


def test_every_happening_has_words() -> None:
    named = ("load", "unload", "evict", "expire", "out_of_memory", "load_failed", "crash")
    assert set(named) == set(HAPPENED)


def test_a_model_beside_the_card_is_told() -> None:
    beside = Happening(at=1.0, service="ollama", what="load")
    assert "on the processor" in happened_words(beside)
    assert happened_words(evolve(beside, mib=1_900)) == "loaded (1,900 MiB)"


def test_one_line_where_there_is_no_terminal() -> None:
    assert plain(SNAPSHOT) == (
        "with mgpu 12 s: 31 sent, 25 ok, 4 waiting, 1 gave up, 1 failed;"
        " card: desktop 768, mvoice 2,345, comfyui 13,000, free 271 MiB"
    )

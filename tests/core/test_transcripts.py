"""The transcripts say what the core does; `--rewrite-transcripts` writes them anew."""

import re
from pathlib import Path

import pytest

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

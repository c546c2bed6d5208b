"""What docs/debugging.md says of the three incidents, and what commands print of their logs today.

`python -m tests.incidents.page` writes anew what they print, as where words have changed.
"""

import contextlib
import io
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

from attrs import frozen

from mgpu_core.replay import Record
from mgpu_effects.event_log import Segment, read
from mgpu_http.cli import main

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PAGE = ROOT / "docs" / "debugging.md"
HEADINGS = {
    "slow": "### A slow request",
    "evicted": "### An eviction that should not have been",
    "leaky": "### An unload that frees nothing",
}
CUT = "..."
CONSOLE = re.compile(r"^```console\n\$ mgpu ([^\n]+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RATE = re.compile(r"\d+ a second")
# What an incident turns on is the first event with one of these notes, the rarest kind first.
TURNS = ("Leaky", "Promoted", "Unloading")
ENVIRONMENT = {"TZ": "UTC", "COLUMNS": "140"}


@frozen
class Console:
    """One command of the page, and what stands there as printed by it."""

    command: str
    printed: str

    def cut(self, told: str) -> str:
        """Leave out of what it prints today what the page leaves out: as many lines stay."""
        before, cut, after = self.printed.partition(f"{CUT}\n")
        lines = told.splitlines(keepends=True)
        if not cut:
            return told
        first, last = len(before.splitlines()), len(after.splitlines())
        return "".join([*lines[:first], f"{CUT}\n", *lines[len(lines) - last :]])


def log_of(name: str) -> Path:
    return EXAMPLES / name / "log.jsonl.gz"


def section(name: str, text: str) -> str:
    """Give the part of the page that is about an incident."""
    return text[text.index(HEADINGS[name]) :].split("\n##", 1)[0]


def consoles(name: str, text: str) -> list[Console]:
    return [Console(*found) for found in CONSOLE.findall(section(name, text))]


@contextlib.contextmanager
def somewhere() -> Iterator[None]:
    """Be in a directory of one's own that has the documentation, at noon in Greenwich."""
    with (
        tempfile.TemporaryDirectory() as place,
        contextlib.chdir(place),
        mock.patch.dict(os.environ, ENVIRONMENT),
    ):
        Path("docs").symlink_to(ROOT / "docs")
        time.tzset()
        yield


def printed_today(shown: Sequence[Console]) -> list[str]:
    """Run the commands one after the other; a later one may use what an earlier one has written."""
    told = []
    with somewhere():
        for console in shown:
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                code = main(console.command.split())
            assert code in {0, 1}, console.command
            told.append(console.cut(RATE.sub("N a second", out.getvalue())))
    return told


# --------------------------------------------------------------------------------- writing it anew


def rewritten(text: str) -> str:
    """Give the page with what the commands print today."""
    for name in HEADINGS:
        shown = consoles(name, text)
        old = new = section(name, text)
        for console, told in zip(shown, printed_today(shown), strict=True):
            head = f"```console\n$ mgpu {console.command}\n"
            new = new.replace(f"{head}{console.printed}```", f"{head}{told}```")
        text = text.replace(old, new)
    return text


def marks(name: str) -> list[str]:
    """Give what commands name of a log: who waited longest, the turn, and the event before it."""
    segment, *items = read(log_of(name))
    assert isinstance(segment, Segment)
    records = [item for item in items if isinstance(item, Record)]
    notes = [(record.seq, note) for record in records for note in record.notes]
    granted = [note for _, note in notes if note["type"] == "Granted"]
    longest = max(granted, key=lambda note: int(note["waited_us"]))
    turn = next(
        seq
        for kind in TURNS
        for seq, note in notes
        if note["type"] == kind and "operator" not in note.get("because", "")
    )
    return [str(longest["request"]), str(turn), str(turn - 1)]


def renumbered(name: str, text: str, new: Mapping[str, str]) -> str:
    """Give the page with other names and numbers in the commands on a log, and in "event 35"."""
    old = section(name, text)

    def again(found: re.Match[str]) -> str:
        return re.sub(r"(?<![\w-])[\w-]+", lambda word: new.get(word[0], word[0]), found[0])

    return text.replace(old, re.sub(r"^\$ .*$|[Ee]vent \d+", again, old, flags=re.MULTILINE))


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))

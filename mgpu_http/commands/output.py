"""Standard output is for results, standard error for messages."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from attrs import define, field

DONE, FAILED, USAGE = 0, 1, 2
SHOW_EVERY_S = 2.0
DEFAULT_URL = "http://127.0.0.1:8770"


class CommandError(Exception):
    """Ends a command with a message on standard error."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def result(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def document(value: Any) -> None:
    result(json.dumps(value, indent=2))


def message(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Align columns: text to the left, numbers to the right. None shows as a dash."""
    cells = [list(head), *([_shown(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    numeric = [
        all(isinstance(row[column], int | float | None) for row in rows)
        for column in range(len(head))
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


@define
class Progress:
    """One line that is written anew on a terminal; else a line now and then."""

    _last: float = field(factory=time.monotonic)
    _width: int = 0

    def __enter__(self) -> "Progress":
        return self

    def show(self, text: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{text:<{self._width}}")
            sys.stderr.flush()
            self._width = len(text)
        elif (now := time.monotonic()) - self._last >= SHOW_EVERY_S:
            self._last = now
            message(text)

    def __exit__(self, *_: object) -> None:
        if self._width:
            message("")

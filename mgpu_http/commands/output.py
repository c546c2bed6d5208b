"""Standard output is for results, standard error for messages."""

import json
import sys
from collections.abc import Sequence
from typing import Any

DONE, FAILED, USAGE = 0, 1, 2
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
        all(isinstance(row[column], int | None) for row in rows) for column in range(len(head))
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

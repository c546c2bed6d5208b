"""Draw the state machines of the core into architecture.md, from the tables that move them.

`python docs/draw_transitions.py` rewrites the drawings; a test fails while they differ.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from mgpu_core.transitions import RESIDENCY, SWAP

PAGE = Path(__file__).with_name("architecture.md")
MACHINES: Mapping[str, Mapping[tuple[StrEnum, StrEnum], StrEnum]] = {
    "residency": RESIDENCY,
    "swap": SWAP,
}


def drawing(table: Mapping[tuple[StrEnum, StrEnum], StrEnum]) -> str:
    """Give a Mermaid diagram, one arrow for all the causes between two states."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (old, cause), new in table.items():
        if old is not new:
            arrows.setdefault((old.value, new.value), []).append(cause.value)
    lines = [f"    {old} --> {new}: {' / '.join(why)}" for (old, new), why in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def drawn(text: str) -> str:
    """Give the page with its drawings made anew."""
    for name, table in MACHINES.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(
            pattern, lambda m, t=table: m[1] + drawing(t) + m[2], text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"{PAGE.name}: the place for the drawing of {name} is missing")
    return text


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text()))

"""The memory of a card as one bar on a terminal."""

from collections.abc import Sequence

from attrs import frozen
from rich.text import Text

FREE_STYLE = "grey70 on grey15"
STRANGER_STYLE = "white on grey37"


@frozen
class Part:
    """Who holds so much of the card."""

    name: str
    mib: int
    style: str


def bar(parts: Sequence[Part], total_mib: int, width: int) -> Text:
    """Draw a segment for each part, its name and MiB in it where they fit."""
    drawn = Text(no_wrap=True)
    whole_mib = max(1, total_mib, sum(part.mib for part in parts))
    begin, before_mib = 0, 0
    for part in parts:
        before_mib += part.mib
        end = round(before_mib / whole_mib * width)  # by the sum so far: the widths add up
        cells, begin = end - begin, end
        fits = len(part.name) + 8 < cells
        label = f" {part.name} {part.mib:,}" if fits else f" {part.name}"[:cells]
        drawn.append(label.ljust(cells), part.style)
    return drawn

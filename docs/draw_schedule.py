"""Draw docs/schedule.svg from what `mgpu bench schedule --json` gave, and print its tables.

`python docs/draw_schedule.py DIRECTORY`, which holds the files that TITLES names; `make policies`
makes them.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import log10
from pathlib import Path
from statistics import mean
from typing import Any

from mgpu_http.bench.run import markdown
from mgpu_http.bench.schedule import rows

PICTURE = Path(__file__).with_name("schedule.svg")
TITLES = {
    "services": "four services on a card of 24 GB",
    "slots-1": "recorded image requests, room for 1 model",
    "slots-2": "room for 2 models",
    "slots-3": "room for 3 models",
    "slots-4": "room for 4 models",
}
# What is drawn of each policy, and its mark: width, how round, and what the legend says.
MARKS = {
    "mean": ("mean_wait_ms", 7, 3.5, "mean wait"),
    "p95": ("p95_wait_ms", 7, 0, "95 of 100 wait less"),
    "max": ("max_wait_ms", 3, 0, "longest wait"),
}
WIDTH, LABELS, MARGIN, LINE = 760, 110, 16, 24
TIMES = {
    3: "3 s",
    10: "10 s",
    30: "30 s",
    100: "100 s",
    300: "5 min",
    1000: "17 min",
    3000: "50 min",
}
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.ground { fill: #ffffff }
.title { font-weight: 600 }
.small { font-size: 10px; fill: #57606a }
.grid { stroke: #d0d7de; stroke-width: 1 }
.mean { fill: #0969da; stroke: #0969da }
.p95 { fill: #9a6700; stroke: #9a6700 }
.max { fill: #cf222e; stroke: #cf222e }
.range { stroke-width: 1.5; opacity: .6 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .ground { fill: #0d1117 }
  .small { fill: #9198a1 }
  .grid { stroke: #3d444d }
  .mean { fill: #58a6ff; stroke: #58a6ff }
  .p95 { fill: #d29922; stroke: #d29922 }
  .max { fill: #f85149; stroke: #f85149 }
}
"""
Found = Mapping[str, Sequence[Mapping[str, Any]]]


def x_of(seconds: float) -> float:
    """Give the place of a wait: ten times as long is always as far to the right."""
    low, high = log10(min(TIMES)), log10(max(TIMES) * 1.6)
    share = (log10(max(seconds, min(TIMES))) - low) / (high - low)
    return LABELS + MARGIN + share * (WIDTH - LABELS - 3 * MARGIN)


def text(x: float, y: float, words: str, look: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" class="{look}">{words}</text>'


def mark(name: str, x: float, y: float) -> str:
    _, width, roundness, _ = MARKS[name]
    place = f'x="{x - width / 2:.1f}" y="{y - 3.5:.1f}" width="{width}" height="7"'
    return f'<rect class="{name}" {place} rx="{roundness}"/>'


def waits(name: str, y: float, waits_s: Sequence[float]) -> Iterator[str]:
    """The range over the seeds as a line, and their mean as a mark on it."""
    low, high = x_of(min(waits_s)), x_of(max(waits_s))
    yield f'<path class="{name} range" d="M{low:.1f} {y:.1f}H{high:.1f}"/>'
    yield mark(name, x_of(mean(waits_s)), y)


def panel(title: str, found: Found, top: float) -> Iterator[str]:
    """One line for each policy."""
    bottom = top + LINE * (len(found) + 0.5)
    yield text(MARGIN, top, title, "title")
    for seconds, words in TIMES.items():
        x = x_of(seconds)
        yield f'<path class="grid" d="M{x:.1f} {top + 8}V{bottom}"/>'
        yield text(x, bottom + 12, words, "small", "middle")
    for number, (policy, each) in enumerate(found.items(), start=1):
        y = top + LINE * number
        yield text(MARGIN, y + 4, policy)
        for higher, (name, (what, *_)) in zip((-4, 0, 4), MARKS.items(), strict=True):
            yield from waits(name, y + higher, [one[what] / 1000 for one in each])


def legend(y: float) -> Iterator[str]:
    for number, (name, (*_, said)) in enumerate(MARKS.items()):
        x = MARGIN + 150 * number
        yield mark(name, x + 4, y - 4)
        yield text(x + 14, y, said)
    yield text(MARGIN + 450, y, "a line: from the kindest to the worst of the seeds", "small")


def picture(panels: Mapping[str, Found]) -> str:
    """Give an SVG that needs nothing from elsewhere, on a light ground and on a dark one."""
    parts: list[str] = []
    top = 24.0
    for title, found in panels.items():
        parts += panel(title, found, top)
        top += LINE * (len(found) + 2.5)
    parts += legend(top)
    size = f"0 0 {WIDTH} {top + 12:.0f}"
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="{size}">',
            f"<title>Waits by policy</title>\n<style>{STYLE}</style>",
            '<rect class="ground" width="100%" height="100%" rx="6"/>',
            *parts,
            "</svg>\n",
        )
    )


def read(directory: Path) -> Iterable[tuple[str, Found]]:
    for name, title in TITLES.items():
        path = directory / f"{name}.json"
        if path.exists():
            yield title, json.loads(path.read_text(encoding="utf-8"))["policies"]


def main(directory: Path) -> None:
    panels = dict(read(directory))
    for title, found in panels.items():
        sys.stdout.write(f"\n### {title}\n\n{markdown(rows(found))}\n")
    PICTURE.write_text(picture(panels), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

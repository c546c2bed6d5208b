"""Draw docs/demo.svg: the screen of a real demo when most was going on, and what came of it.

`python docs/draw_demo.py [SEED]` plays a demo of usual length for it.
"""

import asyncio
import io
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from mgpu_http.demo.host import Place
from mgpu_http.demo.report import Half
from mgpu_http.demo.run import Demo
from mgpu_http.demo.screen import Snapshot, plain, render

PICTURE = Path(__file__).with_name("demo.svg")
SECONDS = 30
WIDTH, HEIGHT = 100, 30
FONT = "ui-monospace, Menlo, Consolas, monospace"


def liveliness(snapshot: Snapshot) -> tuple[int, int]:
    """Say how much there is to see: the reasons why somebody waits, and what the card holds."""
    reasons = {one.why for one in snapshot.queue}
    return len(reasons), sum(snapshot.held.values())


def picture(snapshot: Snapshot, demo: Demo) -> str:
    """Give an SVG that needs nothing from elsewhere."""
    console = Console(record=True, file=io.StringIO(), width=WIDTH, color_system="truecolor")
    console.print(render(snapshot, WIDTH, HEIGHT), Text())
    console.print(demo.comparison(), justify="center")
    title = f"mgpu demo --seed {demo.seed}: {snapshot.elapsed_s:.0f} s after its beginning"
    svg = console.export_svg(title=title, unique_id="demo")
    svg = re.sub(r"@font-face \{.*?\}|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: Fira Code, monospace", f"font-family: {FONT}", svg)
    return re.sub(r"[ \t]+\n|\n(?=\n)", "\n", svg)


def main(seed: int) -> None:
    snapshots: list[Snapshot] = []

    def watch(snapshot: Snapshot) -> None:
        if snapshot.half is Half.WITH:
            snapshots.append(snapshot)

    with tempfile.TemporaryDirectory() as directory:
        place = Place(Path(directory))
        with place.taken():
            demo = Demo(place, SECONDS, seed, watch)
            asyncio.run(demo.run())
            best = max(snapshots, key=liveliness)
            PICTURE.write_text(picture(best, demo), encoding="utf-8")
    sys.stdout.write(f"{PICTURE}: {plain(best)}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)

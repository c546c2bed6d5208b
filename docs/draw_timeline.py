"""Draw docs/timeline.svg: what `mgpu log export` gives of docs/examples/demo.jsonl.gz.

`python docs/draw_timeline.py [LOG]` draws it from another log.
"""

import sys
from html import escape
from pathlib import Path

from attrs import define, field

from mgpu_http.commands.log_export import trace
from mgpu_http.commands.logs import Source
from mgpu_http.commands.timeline import HOST, TraceEvent

HERE = Path(__file__).parent
PICTURE = HERE / "timeline.svg"
WIDTH, LEFT, MARGIN, ROW, GRAPH = 1000, 130, 12, 16, 56
COLOURS = {
    "resident": "#8cc46a",
    "loading": "#e0b040",
    "unloading": "#e0b040",
    "unknown": "#d9534f",
    "ours": "#8cc46a",
    "foreign": "#a0a0a0",
    "waiting": "#c792ea",
}
SERVICE, MARK, LINE = "#4f8fc0", "#d9534f", "#d8d8d8"
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    ' font-family="ui-monospace, Menlo, Consolas, monospace" font-size="11">\n'
    '<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
)


@define
class Drawing:
    """Draws track after track, from top to bottom."""

    events: list[TraceEvent]
    y: float = MARGIN
    parts: list[str] = field(factory=list)

    def draw(self) -> str:
        consumers = [e for e in self.events if e.get("name") == "process_name"]
        for consumer in consumers:
            if consumer["pid"] != HOST:
                self.tracks(consumer["pid"], consumer["args"]["name"])
        total = max(sum(e["args"].values()) for e in self.counted("GPU 0 MiB"))
        self.graph("GPU 0 MiB", ("ours", "foreign"), total)
        most = max(e["args"]["waiting"] for e in self.counted("requests"))
        self.graph("requests", ("waiting",), max(1, most))
        self.seconds()
        return "".join([HEAD.format(width=WIDTH, height=round(self.y)), *self.parts, "</svg>\n"])

    @property
    def span(self) -> tuple[int, int]:
        times = [event["ts"] for event in self.events if "ts" in event]
        return times[0], times[-1]

    def x(self, ts: int) -> float:
        first, last = self.span
        return round(LEFT + (ts - first) / max(1, last - first) * (WIDTH - LEFT - MARGIN), 1)

    def tracks(self, pid: int, name: str) -> None:
        """Draw a consumer: its memory, then what it serves, with a mark for what went wrong."""
        mine = [event for event in self.events if event["pid"] == pid and "ts" in event]
        for tid in sorted({event["tid"] for event in mine if event["ph"] == "B"}):
            self.label(name if tid == 1 else f"at work {tid - 1}")
            begun: TraceEvent = {}
            for event in mine:
                if event["tid"] == tid and event["ph"] == "B":
                    begun = event
                elif event["tid"] == tid and event["ph"] == "E":
                    self.slice(begun, event["ts"])
                elif event["tid"] == tid and event["ph"] == "i" and "Fail" in event["name"]:
                    self.text(self.x(event["ts"]) - 4, "&#9660;", MARK)
            self.y += ROW
        self.y += MARGIN / 2

    def slice(self, begun: TraceEvent, end: int) -> None:
        """Draw one span, with its name where there is room for it."""
        x, name = self.x(begun["ts"]), begun["name"]
        width = round(max(1, self.x(end) - x), 1)
        colour = COLOURS.get(name, SERVICE)
        self.box(
            x,
            self.y,
            width - 0.5,
            ROW - 2,
            colour=colour,
            told=f"{name}, {(end - begun['ts']) / 1e6:.1f} s",
        )
        if len(name) * 7 < width:
            self.text(x + 3, escape(name), "#ffffff" if colour == SERVICE else "#202020")

    def counted(self, name: str) -> list[TraceEvent]:
        return [event for event in self.events if event["ph"] == "C" and event["name"] == name]

    def graph(self, name: str, shown: tuple[str, ...], most: int) -> None:
        """Draw a counter as boxes, its values on top of each other."""
        counted = self.counted(name)
        self.label(f"{name}:")
        for row, value in enumerate(shown, start=1):
            self.text(MARGIN, value, COLOURS[value], row * ROW)
        ends = [*(event["ts"] for event in counted[1:]), self.span[1]]
        for event, end in zip(counted, ends, strict=True):
            bottom, x = self.y + GRAPH, self.x(event["ts"])
            for value in shown:
                height = round(event["args"][value] / most * GRAPH, 1)
                bottom -= height
                if height:
                    told = f"{event['args'][value]} {value}"
                    self.box(
                        x,
                        round(bottom, 1),
                        round(self.x(end) - x, 1),
                        height,
                        colour=COLOURS[value],
                        told=told,
                    )
        frame = f'x="{LEFT}" y="{self.y}" width="{WIDTH - LEFT - MARGIN}" height="{GRAPH}"'
        self.parts.append(f'<rect {frame} fill="none" stroke="{LINE}"/>\n')
        self.text(LEFT + 4, f"{most:,}", "#808080")
        self.y += GRAPH + MARGIN

    def seconds(self) -> None:
        first, last = self.span
        for second in range(0, (last - first) // 10**6 + 1, 5):
            self.text(self.x(first + second * 10**6), f"{second} s", "#808080")
        self.y += ROW + MARGIN / 2

    def label(self, text: str) -> None:
        self.text(MARGIN, escape(text), "#202020")

    def text(self, x: float, text: str, colour: str, below: float = 0) -> None:
        self.parts.append(
            f'<text x="{x}" y="{self.y + below + 11}" fill="{colour}">{text}</text>\n'
        )

    def box(
        self, x: float, y: float, width: float, height: float, *, colour: str, told: str
    ) -> None:
        size = f'x="{x}" y="{y}" width="{round(width, 1)}" height="{height}"'
        self.parts.append(f'<rect {size} fill="{colour}"><title>{escape(told)}</title></rect>\n')


def main(log: str) -> None:
    drawing = Drawing(list(trace(Source(log), None, None)))
    PICTURE.write_text(drawing.draw(), encoding="utf-8")
    sys.stdout.write(f"{PICTURE}: {len(drawing.events)} trace events\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(HERE / "examples" / "demo.jsonl.gz"))

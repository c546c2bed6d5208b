"""What is shown while the demo runs: a snapshot in, something that rich can print out. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, frozen
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from mgpu_core.telling import awaited
from mgpu_http.bars import FREE_STYLE, STRANGER_STYLE, Part, bar
from mgpu_http.demo.report import CRASHES, OUT_OF_MEMORY, Half, Happening

QUEUE_ROWS = 6
HAPPENING_ROWS = 5
OTHER_ROWS = 12  # of everything else but the services: titles, the bar, the scores
FREE = "free"
DESKTOP = "desktop"
COLOURS = {
    DESKTOP: STRANGER_STYLE,
    "mvoice": "#101010 on #4fc3b0",
    "whisper-server": "#101010 on #e0b040",
    "ollama": "#101010 on #7cbf5a",
    "comfyui": "#101010 on #c792ea",
    FREE: FREE_STYLE,
}
UNKNOWN_COLOUR = "#101010 on #a8a8a8"
HAPPENED = {
    "load": "loaded",
    "unload": "unloaded, told to",
    "evict": "dropped a model, to make room",
    "expire": "dropped a model, unused for a while",
    "load_failed": "failed to load",
    "crash": "crashed",
    OUT_OF_MEMORY: "OUT OF MEMORY, crashed; was refused",
}
BAD = ("load_failed", *CRASHES)


@frozen(kw_only=True)
class ServiceView:
    """One service. `waiting` is None where nobody can tell: without a broker nobody queues."""

    name: str
    state: str
    held_mib: int = 0
    running: int = 0
    waiting: int | None = None
    ok: int = 0
    not_ok: int = 0
    crashes: int = 0


@frozen(kw_only=True)
class Waiting:
    """One request in the broker's queue; `why` is in words."""

    service: str
    waited_s: float
    why: str


@frozen(kw_only=True)
class Score:
    """How a half stands."""

    sent: int = 0
    ok: int = 0
    gave_up: int = 0
    failed: int = 0
    out_of_memory: int = 0
    loads: int = 0

    @property
    def open(self) -> int:
        return self.sent - self.ok - self.gave_up - self.failed


@frozen(kw_only=True)
class Snapshot:
    """All that the screen shows.

    `held`: MiB by name, the desktop among them. The happenings are told in seconds of this half.
    """

    half: Half
    elapsed_s: float
    seconds: float
    total_mib: int
    held: Mapping[str, int]
    services: Sequence[ServiceView]
    queue: Sequence[Waiting] = ()
    happenings: Sequence[Happening] = ()
    scores: Mapping[Half, Score] = field(factory=dict)

    @property
    def free_mib(self) -> int:
        return max(0, self.total_mib - sum(self.held.values()))


def why_words(why: Mapping[str, Any] | None, service: str) -> str:
    """Say in words what /v1/status says of why a request of this service waits."""
    return "it has just come" if why is None else awaited(why, service)


def render(snapshot: Snapshot, width: int, height: int) -> RenderableType:
    """Draw the snapshot: all of it from 80 columns and 24 lines on, and never 28 lines or more."""
    spare = max(2, height - OTHER_ROWS - len(snapshot.services))
    queue_rows = min(QUEUE_ROWS, (spare + 1) // 2)
    happening_rows = min(HAPPENING_ROWS, spare - queue_rows)
    return Group(
        _header(snapshot),
        Text(),
        card_bar(snapshot, width),
        _legend(snapshot),
        Text(),
        _services(snapshot.services),
        _rule("waiting, and why" if snapshot.half is Half.WITH else "nobody queues here"),
        _queue(snapshot.queue, queue_rows),
        _rule("what happened last"),
        _happenings(snapshot.happenings, happening_rows),
        _rule("so far"),
        _scores(snapshot.scores),
    )


def _header(snapshot: Snapshot) -> Text:
    left_s = snapshot.seconds - snapshot.elapsed_s
    rest = f"{left_s:.0f} s to go" if left_s > 0 else "nobody comes any more; the last are served"
    style = "bold green" if snapshot.half is Half.WITH else "bold red"
    return Text.assemble(
        ("mgpu demo  ", "bold"),
        (snapshot.half.label, style),
        f"  {snapshot.elapsed_s:.0f} s, {rest}",
        overflow="ellipsis",
        no_wrap=True,
    )


def card_bar(snapshot: Snapshot, width: int) -> Text:
    """Draw the card as one bar, a segment for each holder."""
    holders = [*snapshot.held.items(), (FREE, snapshot.free_mib)]
    parts = [Part(name, mib, COLOURS.get(name, UNKNOWN_COLOUR)) for name, mib in holders]
    return bar(parts, snapshot.total_mib, width)


def _legend(snapshot: Snapshot) -> Text:
    return Text(f"{snapshot.free_mib:,} of {snapshot.total_mib:,} MiB are free", "dim")


STATES = {"resident": "green", "loading": "yellow", "unloading": "yellow", "down": "bold red"}


def _services(services: Sequence[ServiceView]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", expand=False)
    for title in ("service", "memory"):
        table.add_column(title, no_wrap=True)
    for title in ("MiB", "running", "waiting", "ok", "not ok", "crashes"):
        table.add_column(title, justify="right", no_wrap=True)
    for service in services:
        table.add_row(
            Text(service.name, COLOURS.get(service.name, UNKNOWN_COLOUR).split(" on ")[1]),
            Text(service.state, STATES.get(service.state, "dim")),
            f"{service.held_mib:,}" if service.held_mib else "-",
            _number(service.running),
            "" if service.waiting is None else _number(service.waiting),
            _number(service.ok),
            Text(_number(service.not_ok), "red" if service.not_ok else ""),
            Text(_number(service.crashes), "bold red" if service.crashes else ""),
        )
    return table


def _queue(queue: Sequence[Waiting], rows: int) -> Table:
    """A row for all that wait at a service for the same reason, with the longest wait."""
    alike: dict[tuple[str, str], list[Waiting]] = {}
    for one in queue:
        alike.setdefault((one.service, one.why), []).append(one)
    table = _lines()
    for ones in list(alike.values())[:rows]:
        oldest_s = max(one.waited_s for one in ones)
        times = f" x{len(ones)}" if len(ones) > 1 else ""
        table.add_row(f"{oldest_s:6.1f} s", ones[0].service + times, ones[0].why)
    return _filled(table, rows)


def _happenings(happenings: Sequence[Happening], rows: int) -> Table:
    table = _lines()
    for one in happenings[-rows:]:
        bad = "bold red" if one.what in BAD else ""
        words = Text(happened_words(one), bad)
        table.add_row(f"{max(0.0, one.at):6.1f} s", Text(one.service, bad), words)
    return _filled(table, rows)


def happened_words(one: Happening) -> str:
    if one.what == "load" and not one.mib:
        return "loaded, but on the processor: no room on the card"
    return HAPPENED.get(one.what, one.what) + (f" ({one.mib:,} MiB)" if one.mib else "")


def _scores(scores: Mapping[Half, Score]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for title in ("sent", "ok", "gave up", "failed", "open", "loads", "out of memory"):
        table.add_column(title, justify="right", no_wrap=True)
    for half, score in scores.items():
        style = "bold red" if score.out_of_memory else ""
        counts = (score.sent, score.ok, score.gave_up, score.failed, score.open, score.loads)
        oom = Text(_number(score.out_of_memory), style)
        table.add_row(half.label, *map(_number, counts), oom)
    return table


def _lines() -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for width in (8, 14):
        table.add_column(no_wrap=True, min_width=width)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    return table


def _filled(table: Table, rows: int) -> Table:
    """Give it so many rows, so that nothing below jumps."""
    for _ in range(rows - table.row_count):
        table.add_row("")
    return table


def _rule(title: str) -> Rule:
    return Rule(Text(title, "dim"), style="grey37", align="left")


def _number(count: int) -> str:
    return f"{count:,}" if count else "-"


def plain(snapshot: Snapshot) -> str:
    """Say it in one line, for where there is no terminal."""
    score = snapshot.scores.get(snapshot.half, Score())
    failed = f", {score.failed} failed" if score.failed else ""
    gave_up = f", {score.gave_up} gave up" if score.gave_up else ""
    holders = [*snapshot.held.items(), (FREE, snapshot.free_mib)]
    card = ", ".join(f"{name} {mib:,}" for name, mib in holders if mib)
    return (
        f"{snapshot.half.label} {snapshot.elapsed_s:.0f} s: {score.sent} sent, {score.ok} ok,"
        f" {score.open} waiting{gave_up}{failed}; card: {card} MiB"
    )

"""What `mgpu top` shows: a status in, something that rich can print out. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from mgpu_http.bars import FREE_STYLE, STRANGER_STYLE, Part, bar

Told: TypeAlias = Mapping[str, Any]
Row: TypeAlias = Sequence[Text | str]

COLOURS = ("#4fc3b0", "#e0b040", "#7cbf5a", "#c792ea", "#6fa8dc", "#e07b7b")
RESIDENCY = {"resident": "green", "absent": "dim", "unknown": "bold red"}
MOVING = "yellow"
CARD_ROWS = 3
OTHER_ROWS = 8  # of everything but cards and lists: head, titles, the last line
LEAST_ROWS = 2  # of a list that has to be cut


def render(
    told: Told | None,
    *,
    url: str,
    width: int,
    height: int | None = None,
    trouble: str | None = None,
) -> RenderableType:
    """Draw a status; in so many lines where a height is given, cutting the lists as it must.

    `trouble` says why the status is old, or why there is none.
    """
    parts: list[RenderableType] = [_head(told, url)]
    parts.append(Text(trouble or "", "bold red", no_wrap=True, overflow="ellipsis"))
    if told is None:
        return Group(*parts)
    waiting, running = _requests(told)
    lists = [_consumer_rows(told), running, waiting]
    rows = [len(each) for each in lists]
    if height is not None:
        rows = shares(rows, height - OTHER_ROWS - CARD_ROWS * len(told["gpu"]))
    colours = _colours(told)
    for gpu in told["gpu"]:
        parts += [_card_title(gpu), _card_bar(gpu, colours, width), _legend(gpu)]
    consumers, at_work, queue = (_cut(*each) for each in zip(lists, rows, strict=True))
    parts += [_table(consumers, width)]
    parts += [_rule("running"), _lines(at_work, "nothing")]
    parts += [_rule("waiting, and why"), _lines(queue, "nobody")]
    return Group(*parts)


def shares(wanted: Sequence[int], room: int) -> list[int]:
    """Divide so many rows: who wants less than an equal share gets that, the others the rest."""
    given = [0] * len(wanted)
    left = sorted(range(len(wanted)), key=lambda number: wanted[number])
    for place, number in enumerate(left):
        fair = room // (len(left) - place)
        given[number] = min(wanted[number], max(LEAST_ROWS, fair))
        room -= given[number]
    return given


def _cut(rows: Sequence[Row], most: int) -> Sequence[Row]:
    if len(rows) <= most:
        return rows
    return [*rows[: most - 1], [Text(f"… and {len(rows) - most + 1} more", "dim")]]


def _head(told: Told | None, url: str) -> Text:
    if told is None:
        return Text.assemble(("mgpu top  ", "bold"), url)
    scheduler = told["scheduler"]
    state = ("draining", "bold yellow") if told["draining"] else ("serving", "green")
    counts = (
        f"  {scheduler['in_flight']} running, {scheduler['queue_depth']} waiting,"
        f" {scheduler['total_jobs']} jobs, {scheduler['loads']} loads,"
        f" {scheduler['evictions']} evictions  {url}, run {told['run']}"
    )
    head = Text.assemble((f"mgpu {told['version']}  ", "bold"), state, counts)
    head.no_wrap, head.overflow = True, "ellipsis"
    return head


# ----------------------------------------------------------------------------------- the cards


def _colours(told: Told) -> Mapping[str, str]:
    return {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(told["consumers"])}


def _card_title(gpu: Told) -> Text:
    title = Text(f"GPU {gpu['index']}", "bold", no_wrap=True, overflow="ellipsis")
    if gpu["used_mib"] is None:
        title.append(f"  of {_mib(gpu['total_mib'])} MiB nobody can tell what is in use", "dim")
    else:
        told = f"  {_mib(gpu['used_mib'])} of {_mib(gpu['total_mib'])} MiB are in use"
        title.append(f"{told}, {_mib(gpu['free_mib'])} free", "")
    if gpu["error"]:
        title.append(f"  {gpu['error']}", "bold red")
    return title


def _card_bar(gpu: Told, colours: Mapping[str, str], width: int) -> Text:
    """Draw who holds it; what the card shows beyond them is nobody's known."""
    parts = [
        Part(one["consumer"], one["mib"], f"#101010 on {colours[one['consumer']]}")
        for one in gpu["holders"]
    ]
    parts += [
        Part(_name(one), one["mib"], STRANGER_STYLE)
        for one in gpu["foreign"] or ()
        if one["mib"] is not None
    ]
    known_mib, total_mib = sum(part.mib for part in parts), gpu["total_mib"] or 0
    if gpu["used_mib"] is not None and gpu["used_mib"] > known_mib:
        parts.append(Part("others", gpu["used_mib"] - known_mib, STRANGER_STYLE))
        known_mib = gpu["used_mib"]
    parts.append(Part("free", max(0, total_mib - known_mib), FREE_STYLE))
    return bar(parts, total_mib, width)


def _legend(gpu: Told) -> Text:
    """Name who holds it, and the processes that are nobody's."""
    holders = [
        f"{one['consumer']} {_mib(one['mib'])}" + ("" if one["measured"] else " (believed)")
        for one in gpu["holders"]
    ]
    strangers = [f"{_name(one)} {_mib(one['mib'])}" for one in gpu["foreign"] or ()]
    told = ", ".join(holders) or "no consumer holds any of it"
    if strangers:
        told += f"; nobody's: {', '.join(strangers)}"
    return Text(told, "dim", no_wrap=True, overflow="ellipsis")


def _name(stranger: Told) -> str:
    return stranger["name"] or f"pid {stranger['pid']}"


# ----------------------------------------------------------------------------------- the lists

CONSUMER_HEAD = (
    *("consumer", "memory", "declared MiB", "holds MiB", "steady MiB"),
    *("running", "waiting", "jobs", "remarks"),
)
NUMBERS = CONSUMER_HEAD[2:-1]
# What a narrow terminal does without, the first one first.
DISPENSABLE = ("jobs", "steady MiB", "declared MiB", "remarks", "holds MiB")
GAP = 2


def _consumer_rows(told: Told) -> list[Row]:
    colours = _colours(told)
    return [_consumer_row(name, row, colours[name]) for name, row in told["consumers"].items()]


def _consumer_row(name: str, row: Told, colour: str) -> Row:
    memory = row["memory"]
    auto = memory["declared_mib"] is None
    return [
        Text(name, colour),
        Text(row["residency"], RESIDENCY.get(row["residency"], MOVING)),
        "auto" if auto else _mib(memory["declared_mib"]),
        _mib(memory["held_mib"]),
        _mib(memory["measured"]["steady_mib"]),
        _number(row["active"]),
        _number(row["waiting"]),
        _number(row["total_requests"]),
        _remarks(row),
    ]


def _remarks(row: Told) -> Text:
    bad = [] if row["healthy"] is not False else [f"down ({row['error'] or 'no answer'})"]
    bad += ["leaky"] * row["leaky"] + ["cooling down"] * (row["cooldown_until"] is not None)
    good = [mark for mark in ("owed", "pinned") if row[mark]]
    if row["healthy"] and row["error"]:
        good.append(row["error"])
    return Text.assemble((", ".join(bad), "red"), ", " if bad and good else "", ", ".join(good))


def _requests(told: Told) -> tuple[list[Row], list[Row]]:
    """Give the rows of those that wait, and of those that are served."""
    waiting, running = [], []
    for one in told["requests"]:
        if one["state"] == "serving":
            served_ms = (told["at"] - one["granted"]) // 1000
            running.append(_request_row(one, served_ms, ""))
        else:
            why = one["why"]["text"] if one["why"] else "it has just come"
            first = "first: " if one["promoted"] else ""
            waiting.append(_request_row(one, one["waited_ms"], first + why))
    return waiting, running


def _request_row(one: Told, ms: int, words: str) -> Row:
    return [f"{ms / 1000:7.1f} s", one["consumer"], one["kind"], Text(one["id"], "dim"), words]


def _table(rows: Sequence[Row], width: int) -> Table:
    """Align the consumers in columns, without those that a narrow terminal has no room for."""
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="bold", expand=False)
    cells = [CONSUMER_HEAD, *(row for row in rows if len(row) == len(CONSUMER_HEAD))]
    widths = {
        title: GAP + max(len(row[place]) for row in cells)
        for place, title in enumerate(CONSUMER_HEAD)
    }
    shown = list(CONSUMER_HEAD)
    for title in DISPENSABLE:
        if sum(widths[one] for one in shown) > width:
            shown.remove(title)
    for title in shown:
        table.add_column(
            title,
            justify="right" if title in NUMBERS else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in rows:
        by_title = dict(zip(CONSUMER_HEAD, row, strict=False))
        table.add_row(*(by_title.get(title, "") for title in shown))
    return table


def _lines(rows: Sequence[Row], none: str) -> RenderableType:
    if not rows:
        return Text(f"  {none}", "dim")
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for _ in range(4):
        table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        table.add_row(*row)
    return table


def _rule(title: str) -> Rule:
    return Rule(Text(title, "dim"), style="grey37", align="left")


def _shown(form: str) -> Callable[[int | None], str]:
    return lambda number: format(number, form) if number else "-"


_mib = _number = _shown(",")

"""What came of the two halves, counted alike, side by side.

A wait is the time from a request's arrival to its whole answer, the picture included, and is told
for the requests that ended `ok`. Loads, evictions and out-of-memory crashes are counted in what the
services wrote into their journal, never in what the broker says of them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from attrs import field, frozen
from rich.table import Table
from rich.text import Text

OK = "ok"
GAVE_UP = "gave_up"
# An eviction makes room for somebody else; a model that a service drops by its own clock is none.
EVICTIONS = ("unload", "evict")
OUT_OF_MEMORY = "out_of_memory"
CRASHES = (OUT_OF_MEMORY, "crash")


class Half(StrEnum):
    """One half of the demo. The names are those of `--json`, and of the folders left behind."""

    WITH = "with"
    WITHOUT = "without"

    @property
    def label(self) -> str:
        return f"{self} mgpu"


@frozen(kw_only=True)
class Outcome:
    """How one request ended; `request` is the broker's id for it, where there was a broker."""

    name: str
    kind: str
    outcome: str
    waited_s: float
    request: str | None = None


@frozen(kw_only=True)
class Happening:
    """One line of a journal. `at` is monotonic seconds, the same clock for all processes."""

    at: float
    service: str
    what: str
    mib: int = 0


@frozen(kw_only=True)
class Tally:
    """One half, as `--json` shows it; the waits are None where nothing ended `ok`."""

    requests: int = 0
    outcomes: Mapping[str, int] = field(factory=dict)
    mean_wait_ms: int | None = None
    p95_wait_ms: int | None = None
    loads: int = 0
    evictions: int = 0
    out_of_memory: int = 0


def tally(outcomes: Sequence[Outcome], journal: Iterable[Happening]) -> Tally:
    waits_ms = sorted(one.waited_s * 1000 for one in outcomes if one.outcome == OK)
    counted = Counter(one.outcome for one in outcomes)
    happened = Counter(one.what for one in journal)
    return Tally(
        requests=len(outcomes),
        outcomes=dict(sorted(counted.items(), key=_ok_first)),
        mean_wait_ms=round(sum(waits_ms) / len(waits_ms)) if waits_ms else None,
        p95_wait_ms=round(percentile(waits_ms, 0.95)) if waits_ms else None,
        loads=happened["load"],
        evictions=sum(happened[what] for what in EVICTIONS),
        out_of_memory=happened[OUT_OF_MEMORY],
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Give the smallest value that this share of all does not exceed (the nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _ok_first(entry: tuple[str, int]) -> tuple[bool, int, str]:
    name, count = entry
    return (name != OK, -count, name)


def longest_waiting(outcomes: Iterable[Outcome]) -> Outcome | None:
    """Give the request that waited longest of those that the broker has an id for."""
    known = (one for one in outcomes if one.request is not None)
    return max(known, key=lambda one: one.waited_s, default=None)


def comparison(halves: Mapping[Half, tuple[Tally, Sequence[Outcome]]]) -> Table:
    """Draw the halves side by side; of each its tally, and what that was made of."""
    table = Table(title="the same arrivals, the same services, the same card", title_style="bold")
    table.add_column("")
    for half in halves:
        table.add_column(half.label, justify="right")
    tallies = [tally for tally, _ in halves.values()]
    kinds = [_by_kind(outcomes) for _, outcomes in halves.values()]
    table.add_row("requests", *(_count(one.requests) for one in tallies))
    for name in dict.fromkeys([OK, *(name for one in tallies for name in one.outcomes)]):
        table.add_row(f"  {name}", *(_count(one.outcomes.get(name, 0)) for one in tallies))
    table.add_section()
    for kind in sorted({kind for one in kinds for kind in one}):
        table.add_row(f"{kind}: ok, mean wait", *(_answered(one.get(kind, ())) for one in kinds))
    table.add_section()
    table.add_row("loads", *(_count(one.loads) for one in tallies))
    table.add_row("evictions", *(_count(one.evictions) for one in tallies))
    table.add_row("out-of-memory crashes", *(_crashes(one.out_of_memory) for one in tallies))
    table.caption = "waits: until the whole answer, of those that got one"
    return table


def _by_kind(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for one in outcomes:
        found.setdefault(one.kind, []).append(one)
    return found


def _answered(outcomes: Sequence[Outcome]) -> str:
    told = tally(outcomes, ())
    return f"{told.outcomes.get(OK, 0)} of {told.requests}, {_seconds(told.mean_wait_ms):>6}"


def _crashes(number: int) -> Text:
    return Text(str(number), "bold red" if number else "bold green")


def _count(number: int) -> str:
    return f"{number:,}" if number else "-"


def _seconds(ms: int | None) -> str:
    return "-" if ms is None else f"{ms / 1000:.1f} s"

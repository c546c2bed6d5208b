"""Look for violations: `python -m tests.planted.catcher RUNS SEED[:RUN] ...`.

Prints, as a JSON list with an entry for each seed, which property failed, how, in which run of the
simulated host and after how many events; null where none did. RUN is where to look first.
"""

import gc
import json
import random
import sys
from collections.abc import Iterator

from mgpu_core.simulation import campaign

# No two seeds share a run, as long as none asks for more.
APART = 10**6
Found = dict[str, object]


def first_violation(seed: int, runs: int, first: int | None = None) -> Found | None:
    """Play one run after the other, each with its own configuration, traffic and faults."""
    events = 0
    for report in campaign(_runs(seed, runs, first), random.Random):
        events += report.steps
        if report.violation is not None:
            return {"by": str(report.violation), "events": events, "run": report.seed}
    return None


def _runs(seed: int, runs: int, first: int | None) -> Iterator[int]:
    if first is not None:
        yield first
    yield from range(seed * APART, seed * APART + runs)


def main() -> None:
    gc.set_threshold(100_000)  # a run keeps what it makes, so that looking for garbage is in vain
    runs, *seeds = sys.argv[1:]
    asked = [seed.partition(":") for seed in seeds]
    found = [first_violation(int(s), int(runs), int(run) if run else None) for s, _, run in asked]
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""`make fuzz`: runs with fresh seeds, for as long as one likes; the first failure is made small.

    python -m tests.sim.fuzz [--seconds N] [--seed S]

Prints how it goes on, and of a failure the seed, the settings and the smallest history. `--seed`
plays that one run again.
"""

import argparse
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from random import Random

from mgpu_core.simulation import Report, campaign, smallest
from mgpu_core.simulation.reach import LABELS

SHOW_EVERY_S = 5


def main() -> int:
    parser = argparse.ArgumentParser(description="Play random histories until one breaks a rule.")
    parser.add_argument("--seconds", type=float, default=60, help="how long; default 60")
    parser.add_argument("--seed", type=int, help="play this one run only")
    options = parser.parse_args()
    first = secrets.randbelow(2**40) if options.seed is None else options.seed
    seeds = itertools.count(first) if options.seed is None else iter([first])
    began, reached = time.monotonic(), Counter[str]()
    for report in _shown(campaign(seeds, Random), began):
        reached.update(report.reached)
        if report.violation is not None:
            _tell(report)
            return 1
        if time.monotonic() - began > options.seconds:
            break
    missed = [label for label in LABELS if not reached[label]]
    print("no property broken;", f"not reached: {', '.join(missed)}" if missed else "all reached")
    return 0


def _shown(reports: Iterator[Report], began: float) -> Iterator[Report]:
    runs, steps, shown = 0, 0, began
    for report in reports:
        runs, steps = runs + 1, steps + report.steps
        now = time.monotonic()
        if now - shown > SHOW_EVERY_S:
            shown = now
            rate = steps / (now - began)
            print(f"{runs} runs, {steps} events, {rate:.0f} a second, seed {report.seed}")
        yield report


def _tell(report: Report) -> None:
    print(f"\nseed {report.seed}: {report.violation}\nlooking for a smaller history ...")
    small = smallest(report, Random)
    print(f"\n{small.setting.config}\n{small.setting.faults}\n")
    for event in small.history:
        print(event)
    print(f"\n{small.violation}\nagain: make fuzz SEED={report.seed}")


if __name__ == "__main__":
    raise SystemExit(main())

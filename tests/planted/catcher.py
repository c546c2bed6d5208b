"""Look for one violation of a property: `python -m tests.planted.catcher SEED [RUNS]`.

Prints, as JSON, which property failed, where, and after how many events; null where none did.
"""

import json
import random
import sys

from mgpu_core.simulation import campaign

# Runs of the simulated host for a seed; no two seeds share one.
RUNS = 150
Found = dict[str, object]


def first_violation(seed: int, runs: int = RUNS) -> Found | None:
    """Play one run after the other, each with its own configuration, traffic and faults."""
    events = 0
    for report in campaign(range(seed * 10**6, seed * 10**6 + runs), random.Random):
        events += report.steps
        if report.violation is not None:
            return {"by": str(report.violation), "events": events}
    return None


if __name__ == "__main__":
    print(json.dumps(first_violation(*map(int, sys.argv[1:]))))

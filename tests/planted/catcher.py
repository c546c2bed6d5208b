"""Look for one violation of a property: `python -m tests.planted.catcher SEED [RUNS]`.

Prints, as JSON, which property failed, where, and after how many events; null where none did.
What looks is `first_violation`: the simulated host where the core has one, else the properties of
`tests/core`. Give it another body to change the harness.
"""

import json
import random
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# Runs of the simulated host for a seed; no two seeds share one.
RUNS = 150
Found = dict[str, object]


def first_violation(seed: int, runs: int = RUNS) -> Found | None:
    if find_spec("mgpu_core.simulation"):
        return in_the_simulation(seed, runs)
    return by_properties(seed)


def in_the_simulation(seed: int, runs: int) -> Found | None:
    """Play one run after the other, each with its own configuration, traffic and faults."""
    simulation = import_module("mgpu_core.simulation")
    events = 0
    for report in simulation.campaign(range(seed * 10**6, seed * 10**6 + runs), random.Random):
        events += report.steps
        if report.violation is not None:
            return {"by": str(report.violation), "events": events}
    return None


# ------------------------------------------------------------------ the properties of tests/core


class FoundError(BaseException):
    """The first failure: no other example is tried, none is made smaller."""


def by_properties(seed: int) -> Found | None:
    """Try each property in turn, with histories that only this seed decides."""
    from hypothesis import seed as seeded

    properties = vars(import_module("tests.core.test_properties"))
    events = count_events()
    for name, test in properties.items():
        if not name.startswith("test_"):
            continue
        test.hypothesis.inner_test = stop_at_first(test.hypothesis.inner_test)
        try:
            seeded(seed)(test)()
        except (FoundError, Exception) as error:  # noqa: BLE001
            cause = error.__cause__ if isinstance(error, FoundError) else error
            return {"by": f"{name}: {where(cause or error)}", "events": events[0]}
    return None


def stop_at_first(test: Callable[..., None]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            test(*args, **kwargs)
        except Exception as error:
            raise FoundError from error

    return run


def count_events() -> list[int]:
    """Count what every world is fed from now on."""
    world = import_module("tests.core.world").World
    count, feed = [0], world.feed

    def counted(self: Any, event: Any) -> list[str]:
        count[0] += 1
        told: list[str] = feed(self, event)
        return told

    world.feed = counted
    return count


def where(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.name}: {last.line} {type(error).__name__} {str(error).splitlines()[:1]}"


if __name__ == "__main__":
    print(json.dumps(first_violation(*map(int, sys.argv[1:]))))

"""What policies make of the same arrivals: the scheduler in a simulated host, for each seed anew.

A run is a function of its workload, policy and seed, so runs are spread over processes.
"""

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any, TypeAlias

from attrs import asdict, frozen

from mgpu_core.simulation.measures import Measures
from mgpu_core.simulation.policies import POLICIES, simulate
from mgpu_core.simulation.workload import Workload, four_services
from mgpu_http.bench.traces import Trace, read_trace
from mgpu_http.commands.output import USAGE, CommandError, message

# Of each policy, one measurement for each seed.
Found: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]


@frozen(kw_only=True)
class Run:
    """One policy on one draw: of a trace in so many slots, or of the four services."""

    policy: str
    seed: int
    trace: Trace | None
    slots: int

    def workload(self) -> Workload:
        chance = Random(self.seed)  # noqa: S311 - to be drawn again, not to be secret
        return self.trace.workload(chance, self.slots) if self.trace else four_services(chance)


def measure(run: Run) -> Measures:
    chance = Random(run.seed)  # noqa: S311 - to be drawn again, not to be secret
    return simulate(run.workload(), POLICIES[run.policy], chance)


def compare(arguments: Namespace) -> Found:
    """Let every policy that was asked for work off every draw."""
    policies = _policies(arguments.policies)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    trace = _trace(arguments)
    runs = [
        Run(policy=policy, seed=seed, trace=trace, slots=arguments.slots)
        for seed in seeds
        for policy in policies
    ]
    found: dict[str, list[dict[str, Any]]] = {policy: [] for policy in policies}
    for run, measured in zip(runs, _measured(runs, arguments.processes), strict=True):
        found[run.policy].append(asdict(measured))
        waited_s = measured.mean_wait_ms / 1000
        message(f"seed {run.seed}, {run.policy}: {measured.requests} waited {waited_s:.1f} s each")
    return found


def _policies(names: str | None) -> Sequence[str]:
    if names is None:
        return tuple(POLICIES)
    asked = tuple(dict.fromkeys(names.split(",")))
    if unknown := [name for name in asked if name not in POLICIES]:
        known = ", ".join(POLICIES)
        raise CommandError(f"--policies: {', '.join(unknown)!r} is none of {known}", USAGE)
    return asked


def _trace(arguments: Namespace) -> Trace | None:
    if arguments.trace is None:
        return None
    if arguments.part >= arguments.users:
        last = arguments.users - 1
        raise CommandError(f"--part: of {arguments.users} parts the last is {last}", USAGE)
    return read_trace(Path(arguments.trace), users=arguments.users, part=arguments.part)


def _measured(runs: Sequence[Run], processes: int | None) -> Iterator[Measures]:
    workers = min(processes or len(os.sched_getaffinity(0)), len(runs))
    if workers == 1:
        yield from map(measure, runs)
        return
    # What the other threads of this process hold must not be copied: each worker starts anew.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(measure, runs)


def rows(found: Found) -> list[dict[str, object]]:
    """Give a line for each policy: means over the seeds; `x` compares with the first policy."""
    first = next(iter(found.values()))
    return [
        {
            "policy": policy,
            "mean": _mean(each, "mean_wait_ms", 1000),
            "p95": _mean(each, "p95_wait_ms", 1000),
            "max": _mean(each, "max_wait_ms", 1000),
            "x mean": _times(each, first, "mean_wait_ms"),
            "x max": _times(each, first, "max_wait_ms"),
            "loads": round(mean(one["loads"] for one in each)),
            "load hours": _mean(each, "load_hours"),
            "at work": f"{mean(one['utilisation'] for one in each):.1%}",
        }
        for policy, each in found.items()
    ]


def _mean(each: Sequence[Mapping[str, Any]], what: str, by: int = 1) -> float:
    return round(mean(float(one[what]) for one in each) / by, 1)


def _times(
    each: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]], what: str
) -> float:
    """Compare seed by seed, as the draws differ more than the policies do."""
    pairs = zip(each, first, strict=True)
    return round(mean(float(a[what]) / max(1.0, float(b[what])) for a, b in pairs), 2)

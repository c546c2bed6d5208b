"""All parts in order, each as a table that can be pasted into `docs/measurements.md`."""

import asyncio
import os
import platform
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from mgpu_http.bench import PARTS, core, log, proxying, schedule, world
from mgpu_http.bench.load import LoadError
from mgpu_http.bench.servers import Target, servers
from mgpu_http.commands.output import DONE, CommandError, document, message, result
from mgpu_http.status import VERSION

Row: TypeAlias = Mapping[str, object]
# Its figures depend on no machine, and have a shape of their own.
SIMULATED = "schedule"
KEYS = {SIMULATED: "policies"}


def bench(arguments: Namespace) -> int:
    """Run the parts that were asked for, by default all."""
    parts = arguments.parts or list(PARTS)
    measured: dict[str, Any] = {}
    try:
        for part in parts:
            message(f"measuring: {part} ...")
            measured[part] = MEASURES[part](arguments)
    except (OSError, LoadError) as error:
        raise CommandError(str(error)) from error
    timed = {"machine": machine()} if set(parts) != {SIMULATED} else {}
    if arguments.json:
        named = {KEYS.get(part, part): found for part, found in measured.items()}
        document(timed | named)
        return DONE
    result(" on ".join((f"mgpu {VERSION}", *timed.values())))
    for part, found in measured.items():
        result(f"\n## {PARTS[part]}\n")
        result(markdown(schedule.rows(found) if part == SIMULATED else found))
    return DONE


def machine() -> str:
    """Name what the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("hypercorn", "aiohttp", "h11"))
    cores = len(os.sched_getaffinity(0))
    python = platform.python_version()
    return f"{cores} cores of {model}, Linux {platform.release()}, Python {python}, {libraries}"


def markdown(rows: Sequence[Row]) -> str:
    """Give a table with a column per key: numbers to the right."""
    head = list(rows[0])
    cells = [head, *([str(row[name]) for name in head] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    number = [not isinstance(rows[0][name], str) for name in head]

    def line(values: Sequence[str]) -> str:
        padded = (
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, number, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + ":" if right else "-" * width
        for width, right in zip(widths, number, strict=True)
    ]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


# ------------------------------------------------------------------------------------- parts


def steps(arguments: Namespace) -> list[Row]:
    rows: list[Row] = []
    for waiting, requests in ((0, 2000), (100, 1000), (1000, 300)):
        best = min(
            (core.steps(waiting, requests=requests) for _ in range(arguments.rounds)),
            key=lambda s: s.step_us,
        )
        rows.append(
            {"waiting": waiting, "us per step": round(best.step_us), "steps/s": round(best.per_s)}
        )
    return rows


def walk(arguments: Namespace) -> list[Row]:
    took_ms = min(core.walk_ms() for _ in range(arguments.rounds))
    return [
        {
            "waiting": core.CROWD,
            "consumers": core.CROWD,
            "ms per pass": round(took_ms, 1),
            "limit": core.WALK_LIMIT_MS,
        }
    ]


def event_log(arguments: Namespace) -> list[Row]:
    costs = log.measure(rounds=arguments.rounds)
    return [
        {
            "us per event, p50": round(costs.append_p50_us, 1),
            "p99": round(costs.append_p99_us, 1),
            "limit": log.APPEND_LIMIT_US,
            "p99, one round": round(costs.round_p99_us, 1),
            "p50, between steps": round(costs.between_p50_us, 1),
            "p99, between steps": round(costs.between_p99_us, 1),
            "replayed/s": round(costs.replayed_per_s),
            "goal": log.REPLAY_GOAL_PER_S,
        }
    ]


def host(arguments: Namespace) -> list[Row]:
    speeds = [world.measure() for _ in range(arguments.rounds)]
    return [
        {
            "host alone, events/s": round(max(speed.host for speed in speeds)),
            "goal": world.GOAL_PER_S,
            "with the scheduler": round(max(speed.scheduled for speed in speeds)),
            "judged": round(max(speed.judged for speed in speeds)),
        }
    ]


def requests(arguments: Namespace) -> list[Row]:
    return asyncio.run(_answers("/answer", arguments.rounds, requests=900))


def streams(arguments: Namespace) -> list[Row]:
    return asyncio.run(
        _answers("/stream", arguments.rounds, requests=64, without=("bare Hypercorn",))
    )


def bodies(_arguments: Namespace) -> list[Row]:
    return asyncio.run(_bodies())


async def _answers(
    path: str, rounds: int, *, requests: int, without: Sequence[str] = ()
) -> list[Row]:
    with servers() as all_targets:
        targets = {name: target for name, target in all_targets.items() if name not in without}
        measured = await proxying.measure(targets, path, requests=requests, rounds=rounds)
    direct = {one.clients: one for one in measured if one.target == "direct"}
    return [
        {
            "server": one.target,
            "clients": one.clients,
            "answers/s": round(one.per_s),
            "p50 ms": round(one.p50_ms, 2),
            "p99 ms": round(one.p99_ms, 2),
            "adds p50": round(one.p50_ms - direct[one.clients].p50_ms, 2),
            "adds p99": round(one.p99_ms - direct[one.clients].p99_ms, 2),
        }
        for one in measured
    ]


async def _bodies() -> list[Row]:
    with servers() as targets:
        kept: Mapping[str, Target] = {name: targets[name] for name in ("plain proxy", "mgpu")}
        passages = await proxying.pass_big_bodies(kept)
    return [
        {
            "server": one.target,
            "1 GiB": one.way,
            "MiB before": round(one.before_mib),
            "MiB at most": round(one.peak_mib),
            "MiB/s": round(one.mib_per_s),
        }
        for one in passages
    ]


MEASURES: Mapping[str, Callable[[Namespace], Any]] = {
    "steps": steps,
    "walk": walk,
    "log": event_log,
    "world": host,
    "requests": requests,
    "streams": streams,
    "bodies": bodies,
    SIMULATED: schedule.compare,
}

"""`mgpu log apply`: the pure core as a filter."""

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from mgpu_core.codec import (
    CodecError,
    decode_config,
    decode_event,
    encode_effect,
    encode_event,
    encode_note,
)
from mgpu_core.config import Config
from mgpu_core.events import Event
from mgpu_core.planners import PLANNERS, Planner, View
from mgpu_core.scheduler import Scheduler
from mgpu_effects.config_file import ConfigErrors, load_settings
from mgpu_effects.core_config import core_config
from mgpu_effects.event_log import encode_line
from mgpu_http.commands.output import DONE, USAGE, CommandError


def apply(arguments: Namespace) -> int:
    """Print a log line for each event on standard input, from the initial state on."""
    planner = load_planner(arguments.planner) if arguments.planner else None
    scheduler = Scheduler(load_config(Path(arguments.config)), planner)
    state = scheduler.initial()
    at, seq = state.at, 0
    for number, line in enumerate(sys.stdin, start=1):
        if not line.strip():
            continue
        try:
            event = parse(line, at)
        except ValueError as error:
            raise CommandError(f"line {number}: {error}", USAGE) from error
        seq += 1
        at = event.at
        transition = scheduler.step(state, event)
        state = transition.state
        text = encode_line(
            seq,
            at,
            encode_event(event),
            [encode_effect(effect) for effect in transition.effects],
            [encode_note(note) for note in transition.notes],
        )
        sys.stdout.write(text.decode("ascii"))
        sys.stdout.flush()
    return DONE


def parse(line: str, last_at: int) -> Event:
    """Read `{"at": ..., "event": {...}}`, as in a log, or an event with its own `at`.

    Without `at` it happened when the last one did. Raises ValueError.
    """
    data = json.loads(line)
    if not isinstance(data, dict):
        raise CodecError(f"expected an object, got {type(data).__name__}")
    event = data["event"] if "event" in data else {k: v for k, v in data.items() if k != "at"}
    at = data.get("at", last_at)
    if not isinstance(event, dict):
        raise CodecError(f"event: expected an object, got {event!r}")
    if type(at) is not int:
        raise CodecError(f"at: expected microseconds as an integer, got {at!r}")
    return decode_event(event, max(at, last_at))


def load_config(path: Path) -> Config:
    """Read the user's file, or the core's own configuration as the header of a log holds it."""
    if path.suffix == ".json":
        try:
            return decode_config(json.loads(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise CommandError(f"{path}: {error}", USAGE) from error
    try:
        return core_config(load_settings(path))
    except ConfigErrors as errors:
        raise CommandError(str(errors), USAGE) from errors


@frozen
class FunctionPlanner:
    """A planner that is a plain function."""

    function: Callable[[str, View], tuple[str, ...] | None]

    def victims(self, target: str, view: View) -> tuple[str, ...] | None:
        return self.function(target, view)


def load_planner(name: str) -> Planner:
    """Give a built-in one by its name, or import MODULE:NAME: a class, an object with `victims`, or
    a function like it.
    """
    built_in: Mapping[str, Planner] = {str(one): planner for one, planner in PLANNERS.items()}
    if name in built_in:
        return built_in[name]
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise CommandError(f"--planner {name}: it is lru, gdsf, or given as MODULE:NAME", USAGE)
    sys.path.insert(0, "")  # a planner beside the user's own files
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
        if isinstance(found, type):
            found = found()
    except Exception as error:
        raise CommandError(f"--planner {name}: {type(error).__name__}: {error}", USAGE) from error
    if not hasattr(found, "victims") and callable(found):
        found = FunctionPlanner(found)
    if not hasattr(found, "victims"):
        raise CommandError(f"--planner {name}: it has no `victims`", USAGE)
    planner: Planner = found
    return planner

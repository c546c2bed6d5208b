"""The commands that speak to a running broker."""

import json
import os
import urllib.error
import urllib.request
from argparse import Namespace
from typing import Any
from urllib.parse import quote, urlencode

from mgpu_http.commands.output import (
    DEFAULT_URL,
    DONE,
    FAILED,
    USAGE,
    CommandError,
    document,
    result,
    table,
)

TIMEOUT_S = 30
# By such a part of it, what is measured has to differ from what is declared to be worth a word.
DIFFERS = 0.1
# Of our own error codes: what the user got wrong, rather than what went wrong.
USERS_OWN = {"no_consumer", "not_found"}


def call(arguments: Namespace, method: str, path: str) -> Any:
    """Ask the broker; raises `CommandError` with its message where it refuses."""
    url = broker_url(arguments)
    request = urllib.request.Request(  # noqa: S310 - its scheme is checked
        url + path, method=method, headers=key_header()
    )
    # Not through a proxy of the environment: the broker is on this host or beside it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise refused(error.code, error.read()) from error
    except (OSError, ValueError) as error:
        raise silent(url, getattr(error, "reason", error)) from error


def broker_url(arguments: Namespace) -> str:
    url: str = (arguments.url or os.environ.get("MGPU_URL") or DEFAULT_URL).rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise CommandError(f"{url} is no http or https URL", USAGE)
    return url


def key_header() -> dict[str, str]:
    key = os.environ.get("MGPU_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def silent(url: str, reason: object) -> CommandError:
    return CommandError(f"no broker answers at {url}, is it running? ({reason})")


def refused(status: int, body: bytes) -> CommandError:
    """Give the broker's own words for why it refuses."""
    try:
        told = json.loads(body)
        code, text = told["error"], told["message"]
    except (ValueError, KeyError, TypeError):
        return CommandError(f"the answer is HTTP {status}: is this a broker?")
    return CommandError(f"{code}: {text}", USAGE if code in USERS_OWN else FAILED)


def consumer(arguments: Namespace) -> int:
    """load, unload, pin and unpin; a model is named as in a status: CONSUMER/ID."""
    name, _, model = arguments.consumer.partition("/")
    asked = {"model": model} if model else {}
    if getattr(arguments, "force", False):
        asked["force"] = "1"
    query = f"?{urlencode(asked)}" if asked else ""
    path = f"/v1/consumers/{quote(name, safe='')}/{arguments.command.name}{query}"
    answer = call(arguments, "POST", path)
    if arguments.json:
        document(answer)
    else:
        several = answer.get("consumers") or {answer["consumer"]: answer["residency"]}
        for one, residency in several.items():
            result(f"{one} is {residency}")
        for note in answer["notes"]:
            details = {key: value for key, value in note.items() if key not in {"type", "consumer"}}
            result("  ".join(["", note["type"], *(f"{k}: {v}" for k, v in details.items())]))
    return DONE


def cancel(arguments: Namespace) -> int:
    answer = call(arguments, "DELETE", f"/v1/requests/{quote(arguments.request, safe='')}")
    if arguments.json:
        document(answer)
    else:
        result(f"{answer['request']} is cancelled")
    return DONE


def broker(arguments: Namespace) -> int:
    """drain, resume and reload."""
    answer = call(arguments, "POST", f"/v1/{arguments.command.name}")
    if arguments.json:
        document(answer)
    elif arguments.command.name == "reload":
        result("the configuration was read anew")
    else:
        result("no new work is taken" if answer["draining"] else "work is taken")
    return DONE


def status(arguments: Namespace) -> int:
    answer = call(arguments, "GET", "/v1/status")
    if arguments.json:
        document(answer)
    else:
        result(screen(answer))
    return DONE


GPU_HEAD = ("GPU", "USED MIB", "FREE MIB", "TOTAL MIB", "ERROR")
CONSUMER_HEAD = (
    *("CONSUMER", "HEALTH", "MEMORY", "SOURCE", "MIB"),
    *("ACTIVE", "WAITING", "TOTAL", "MARKS"),
)
REQUEST_HEAD = ("REQUEST", "CONSUMER", "KIND", "STATE", "PLACE", "WAITED MS", "WHY")
MEMORY_HEAD = (
    *("CONSUMER'S MIB", "DECLARED", "API SAYS", "HOLDS NOW"),
    *("STEADY", "LOAD PEAK", "WORK PEAK", "RESIDUE", "LOAD S", "UNLOAD S"),
)
FOREIGN_HEAD = ("GPU", "PID", "NO CONSUMER'S PROCESS", "MIB")


def screen(told: dict[str, Any]) -> str:
    """Show a status on one screen."""
    scheduler = told["scheduler"]
    state = "draining" if told["draining"] else "serving"
    summary = (
        f"mgpu {told['version']}, run {told['run']}, {state}: {scheduler['in_flight']} in flight,"
        f" {scheduler['queue_depth']} waiting, {scheduler['total_jobs']} jobs,"
        f" {scheduler['loads']} loads, {scheduler['evictions']} evictions"
    )
    gpus = [
        [gpu[key] for key in ("index", "used_mib", "free_mib", "total_mib", "error")]
        for gpu in told["gpu"]
    ]
    consumers = [_consumer_cells(name, row) for name, row in told["consumers"].items()]
    requests = [_request_cells(row) for row in told["requests"]]
    strangers = [_foreign_cells(gpu, row) for gpu in told["gpu"] for row in gpu["foreign"] or ()]
    parts = [summary, table(GPU_HEAD, gpus), table(CONSUMER_HEAD, consumers)]
    memory = [_memory_cells(name, row) for name, row in told["consumers"].items()]
    measured = [row for row in memory if any(cell is not None for cell in row[2:])]
    parts += [table(MEMORY_HEAD, measured)] if measured else []
    parts += ["\n".join(lines)] if (lines := suggestions(told)) else []
    parts += [table(REQUEST_HEAD, requests)] if requests else []
    parts += [table(FOREIGN_HEAD, strangers)] if strangers else []
    return "\n\n".join(parts)


HEALTH = {True: "ok", False: "down", None: None}


def _foreign_cells(gpu: dict[str, Any], row: dict[str, Any]) -> list[object]:
    return [gpu["index"], row["pid"], row["name"], row["mib"]]


def _memory_cells(name: str, row: dict[str, Any]) -> list[object]:
    memory = row["memory"]
    measured = memory["measured"]
    return [
        name,
        memory["declared_mib"],
        memory["api_mib"],
        memory["held_mib"],
        measured["steady_mib"],
        measured["load_peak_mib"],
        measured["work_peak_mib"],
        measured["residue_mib"],
        memory["load_s"],
        memory["unload_s"],
    ]


def suggestions(told: dict[str, Any]) -> list[str]:
    """Say what to declare instead, of those that hold clearly more or less than was declared."""
    lines = []
    for name, row in told["consumers"].items():
        declared, suggested = row["memory"]["declared_mib"], row["memory"]["suggested_mib"]
        if declared is None or suggested is None:  # `auto`, or not to be told
            continue
        if abs(suggested - declared) > DIFFERS * declared:
            lines.append(
                f"suggest for {name}: vram_resident_mib: {suggested} (declared {declared})"
            )
    return lines


def _health(row: dict[str, Any]) -> str | None:
    error = row["error"]
    if error is not None and row["healthy"]:
        return f"ok ({error})"
    return error or HEALTH[row["healthy"]]


def _consumer_cells(name: str, row: dict[str, Any]) -> list[object]:
    marks = [mark for mark in ("owed", "leaky", "pinned") if row[mark]]
    if row["cooldown_until"] is not None:
        marks.append("cooling down")
    return [
        name,
        _health(row),
        row["residency"],
        row["residency_source"],
        row["gpu_resident_mib"],
        row["active"],
        row["waiting"],
        row["total_requests"],
        ", ".join(marks),
    ]


def _request_cells(row: dict[str, Any]) -> list[object]:
    why = row["why"]
    place = row["position"]
    return [
        row["id"],
        row["consumer"],
        row["kind"],
        row["state"] + (", promoted" if row["promoted"] else ""),
        place,
        row["waited_ms"],
        why["text"] if why else None,
    ]

"""The HTTP calls that bring a consumer into memory or out of it, and those about its jobs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
from attrs import evolve

from mgpu_effects.calls import CallError, call
from mgpu_effects.settings import ConsumerSettings, Step

AnyStep = TypeVar("AnyStep", bound=Step)
# An answer that is asked for something is read so far.
MAX_JSON_BYTES = 16 << 20


def with_value(step: AnyStep, name: str, value: str) -> AnyStep:
    """Put the value in wherever the path, or a text of the body, has `{name}`."""

    def filled(part: Any) -> Any:
        if isinstance(part, str):
            return part.replace(f"{{{name}}}", value)
        if isinstance(part, Mapping):
            return {key: filled(each) for key, each in part.items()}
        return [filled(each) for each in part] if isinstance(part, list | tuple) else part

    path = step.path.replace(f"{{{name}}}", quote(value, safe=""))
    return evolve(step, path=path, body=filled(step.body))


async def run_steps(
    session: aiohttp.ClientSession, consumer: ConsumerSettings, steps: Sequence[Step]
) -> str | None:
    """Carry the steps out in order. None, or the code (see calls.py) of the first that failed.

    A step is over when its answer is complete: some services stream the progress of a load.
    """
    try:
        for step in steps:
            await _call(session, consumer, step)
    except CallError as error:
        return error.code
    return None


async def json_of(session: aiohttp.ClientSession, consumer: ConsumerSettings, step: Step) -> object:
    """Carry one step out and give its answer's JSON. Raises CallError, `bad_answer` without any."""
    return json_in(await _call(session, consumer, step, read_bytes=MAX_JSON_BYTES, keep=True))


def json_in(answer: bytes) -> object:
    """Read an answer as JSON. Raises CallError, `bad_answer`, where it is none."""
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise CallError("bad_answer") from error


async def _call(
    session: aiohttp.ClientSession, consumer: ConsumerSettings, step: Step, **reading: Any
) -> bytes:
    headers, body = dict(step.headers), step.body
    if isinstance(body, Mapping):
        body = json.dumps(body)
        if not any(name.lower() == "content-type" for name in headers):
            headers["Content-Type"] = "application/json"
    return await call(
        session,
        consumer,
        step.method,
        step.path,
        timeout_s=step.timeout_s,
        ok=step.ok,
        headers=headers,
        body=body,
        **reading,
    )

"""The HTTP calls that bring a consumer into memory or out of it."""

import json
from collections.abc import Mapping, Sequence

import aiohttp

from mgpu_effects.calls import CallError, call
from mgpu_effects.settings import ConsumerSettings, Step


async def run_steps(
    session: aiohttp.ClientSession, consumer: ConsumerSettings, steps: Sequence[Step]
) -> str | None:
    """Carry the steps out in order. None, or the code (see calls.py) of the first that failed.

    A step is over when its answer is complete: some services stream the progress of a load.
    """
    try:
        for step in steps:
            await _run(session, consumer, step)
    except CallError as error:
        return error.code
    return None


async def _run(session: aiohttp.ClientSession, consumer: ConsumerSettings, step: Step) -> None:
    headers, body = dict(step.headers), step.body
    if isinstance(body, Mapping):
        body = json.dumps(body)
        if not any(name.lower() == "content-type" for name in headers):
            headers["Content-Type"] = "application/json"
    await call(
        session,
        consumer,
        step.method,
        step.path,
        timeout_s=step.timeout_s,
        ok=step.ok,
        headers=headers,
        body=body,
    )

"""Sends what was asked for, as real clients do, and tells how it ended: each exactly once.

Outcomes: `ok`; `gave_up` (its patience was at an end); `unreachable`; `broken_off` (the connection
broke); the code of an error of the broker's own, as `queue_timeout`; `http_500` and the like, a
service's own error; `job_failed`, and `job_lost` where the service forgot it in a crash.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from functools import cache
from typing import Any

import aiohttp
from attrs import frozen

from mgpu_effects.settings import Kind, Settings
from mgpu_http.demo.report import GAVE_UP, OK, Outcome
from mgpu_http.demo.services.sound import spoken
from mgpu_http.demo.traffic import Arrival

POLL_S = 0.25
WAITS_FOR_A_JOB: Kind = "image"
BODIES: Mapping[str, object] = {
    "tts": {"text": "The kettle is on, and the card is full."},
    "llm": {
        "model": "chat",
        "messages": [{"role": "user", "content": "What shall we cook tonight?"}],
        "stream": True,
    },
    "image": {
        "prompt": {
            "1": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 20}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}},
        }
    },
}


@frozen(kw_only=True)
class Route:
    """Where one kind of work is sent; `service_url` is where a picture is then asked for."""

    service: str
    url: str
    service_url: str


class FailedError(Exception):
    """It is over; `outcome` says how."""

    def __init__(self, outcome: str) -> None:
        super().__init__(outcome)
        self.outcome = outcome


def routes(settings: Settings, *, through_broker: bool) -> Mapping[str, Route]:
    """Give the route of each kind: to the broker, or past it to the service itself."""
    found = {}
    for kind, name in settings.routing.items():
        consumer = settings.consumers[name]
        url = (
            f"http://{settings.listen[0]}/v1/{kind}"
            if through_broker
            else consumer.url + consumer.paths[kind].path
        )
        found[kind] = Route(service=name, url=url, service_url=consumer.url)
    return found


@contextlib.asynccontextmanager
async def client_session() -> AsyncIterator[aiohttp.ClientSession]:
    """A connection for each request: none is reused that a crash has broken meanwhile."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


async def send(session: aiohttp.ClientSession, arrival: Arrival, route: Route) -> Outcome:
    """Send it and wait for the whole answer, as long as its client has patience."""
    begin = time.monotonic()
    ids: list[str] = []
    try:
        async with asyncio.timeout(arrival.patience_s):
            await _ask(session, arrival.kind, route, ids)
        outcome = OK
    except FailedError as failed:
        outcome = failed.outcome
    except TimeoutError:
        outcome = GAVE_UP
    except aiohttp.ClientConnectorError:
        outcome = "unreachable"
    except (aiohttp.ClientError, ConnectionError):
        outcome = "broken_off"
    return Outcome(
        name=arrival.name,
        kind=arrival.kind,
        outcome=outcome,
        waited_s=time.monotonic() - begin,
        request=ids[0] if ids else None,
    )


async def _ask(session: aiohttp.ClientSession, kind: Kind, route: Route, ids: list[str]) -> None:
    """Raises FailedError where it was refused or failed; `ids` gets the broker's id."""
    async with session.post(route.url, **_body(kind)) as answer:
        ids.extend(answer.headers.getall("X-Mgpu-Request", []))
        content = await answer.read()
    if answer.status >= 400:
        raise FailedError(_error(answer.status, content))
    if kind == WAITS_FOR_A_JOB:
        await _picture(session, route.service_url, str(json.loads(content)["prompt_id"]))


def _body(kind: Kind) -> dict[str, Any]:
    if kind != "stt":
        return {"json": BODIES[kind]}
    form = aiohttp.FormData()
    form.add_field("file", _recording(), filename="recording.wav", content_type="audio/wav")
    return {"data": form}


@cache
def _recording() -> bytes:
    return spoken("Remind me to look after the beans.")


def _error(status: int, content: bytes) -> str:
    """Give the broker's code, where this is an answer of its own: they alone have these keys."""
    try:
        told = json.loads(content)
        return str(told["error"]) if "retryable" in told else f"http_{status}"
    except (ValueError, TypeError, KeyError):
        return f"http_{status}"


async def _picture(session: aiohttp.ClientSession, url: str, job: str) -> None:
    """Wait until the job is over. Raises FailedError: it failed, or nobody knows of it any more."""
    while True:
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            # Asked in this order: a job that ends in between is in the history then.
            queued = await _queued(session, url)
            entry = (await _json(session, f"{url}/history/{job}")).get(job)
            if entry is not None:
                if entry["status"]["status_str"] != "success":
                    raise FailedError("job_failed")
                return
            if job not in queued:
                raise FailedError("job_lost")
        await asyncio.sleep(POLL_S)


async def _queued(session: aiohttp.ClientSession, url: str) -> set[str]:
    told = await _json(session, f"{url}/queue")
    return {entry[1] for state in ("queue_running", "queue_pending") for entry in told[state]}


async def _json(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(url) as answer:
        return dict(await answer.json())

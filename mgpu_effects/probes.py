"""Probes: does a consumer answer, is it loaded, does it work for somebody past the broker?"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import TypeAlias

import aiohttp
from attrs import evolve, frozen

from mgpu_core.events import ProbeFailure
from mgpu_effects.calls import CallError, check_health
from mgpu_effects.drivers.driver import Driver
from mgpu_effects.gpu_processes import Holders
from mgpu_effects.looking import Answers, paths_of, tell
from mgpu_effects.settings import ConsumerSettings, Step
from mgpu_effects.steps import MAX_JSON_BYTES, json_in, json_of

# Gives a reading of who holds the memory of the cards that began after the probe did.
ReadHolders: TypeAlias = Callable[[], Awaitable[Holders]]

_FAILURES: Mapping[str, ProbeFailure] = {"refused": "refused", "timeout": "timeout"}
_LEAST_S = 0.001  # aiohttp takes 0 for no limit


@frozen(kw_only=True)
class ProbeFacts:
    """What one probe saw: the fields of the event `ProbeResult`.

    `error` is a code of calls.py where it is not healthy, else what could not be told and why.
    """

    healthy: bool
    resident: bool | None = None
    vram_mib: int | None = None
    busy: bool | None = None
    failure: ProbeFailure | None = None
    error: str | None = None


async def probe(
    session: aiohttp.ClientSession,
    units: Sequence[ConsumerSettings],
    timeout_s: float,
    driver: Driver | None = None,
    *,
    read_holders: ReadHolders | None = None,
) -> Mapping[str, ProbeFacts]:
    """Ask the health path of a server, then the rest for each of its units.

    Each path is asked once, all within the time limit. Whatever the network does is in the answer.
    """
    until = asyncio.get_running_loop().time() + timeout_s
    server = units[0]
    wanted = {path: None for unit in units for path in paths_of(unit)}
    try:
        answers = await _health(session, server, timeout_s, wanted)
    except CallError as error:
        return {unit.name: await _unhealthy(unit, driver, error.code) for unit in units}
    unasked = [path for path in wanted if path not in answers]
    more, holders = await asyncio.gather(
        _ask_all(session, server, unasked, until), _holders(units, read_holders, until)
    )
    answers = {**answers, **more}
    return {unit.name: await _healthy(unit, driver, answers, holders) for unit in units}


async def is_resident(
    session: aiohttp.ClientSession,
    unit: ConsumerSettings,
    timeout_s: float,
    *,
    refused: bool | None = None,
) -> bool | None:
    """Ask only whether it is loaded, of a unit whose service tells; None: it can't be told.

    `refused` is what a refused connection says: some services start anew to load and to unload.
    """
    until = asyncio.get_running_loop().time() + timeout_s
    asked = evolve(unit, busy=None)
    answers = await _ask_all(session, asked, paths_of(asked), until)
    if any(isinstance(each, CallError) and each.code == "refused" for each in answers.values()):
        return refused
    return tell(asked, answers).resident


async def _unhealthy(unit: ConsumerSettings, driver: Driver | None, code: str) -> ProbeFacts:
    return ProbeFacts(
        healthy=False,
        resident=await _by_driver(unit, driver, healthy=False),
        failure=_failure(code),
        error=code,
    )


async def _healthy(
    unit: ConsumerSettings, driver: Driver | None, answers: Answers, holders: Holders | None
) -> ProbeFacts:
    told = tell(unit, answers, holders)
    by_driver = await _by_driver(unit, driver, healthy=True)
    assumed = unit.residency == "assumed"
    gone = by_driver is False
    return ProbeFacts(
        healthy=True,
        resident=by_driver if gone or assumed else told.resident,
        vram_mib=None if gone else told.vram_mib,
        busy=told.busy,
        error=", ".join(told.problems) or None,
    )


def _failure(code: str) -> ProbeFailure:
    return "status" if code.startswith("http_") else _FAILURES.get(code, "answer")


async def _health(
    session: aiohttp.ClientSession,
    consumer: ConsumerSettings,
    timeout_s: float,
    wanted: Collection[str],
) -> Answers:
    """Give its answer if it is wanted for more; raises CallError where it is not healthy."""
    if consumer.health.method != "GET" or consumer.health.path not in wanted:
        await check_health(session, consumer, timeout_s)
        return {}
    body = await check_health(session, consumer, timeout_s, read_bytes=MAX_JSON_BYTES)
    try:
        return {consumer.health.path: json_in(body)}
    except CallError as error:
        return {consumer.health.path: error}


async def _ask_all(
    session: aiohttp.ClientSession, consumer: ConsumerSettings, paths: Sequence[str], until: float
) -> Answers:
    answers = await asyncio.gather(*(_ask(session, consumer, path, until) for path in paths))
    return dict(zip(paths, answers, strict=True))


async def _ask(
    session: aiohttp.ClientSession, consumer: ConsumerSettings, path: str, until: float
) -> object:
    left_s = max(_LEAST_S, until - asyncio.get_running_loop().time())
    step = Step(path=path, method="GET", timeout_s=left_s)
    try:
        return await json_of(session, consumer, step)
    except CallError as error:
        return error


async def _holders(
    units: Sequence[ConsumerSettings], read_holders: ReadHolders | None, until: float
) -> Holders | None:
    if read_holders is None or all(unit.residency != "nvml" for unit in units):
        return None
    try:
        async with asyncio.timeout_at(until):
            return await read_holders()
    except TimeoutError:
        return Holders(taken=0, error="timeout")


async def _by_driver(
    consumer: ConsumerSettings, driver: Driver | None, *, healthy: bool
) -> bool | None:
    """Tell residency by the process, where the process is all that a consumer is.

    With routes of its own it may run and hold nothing. A process that runs and does not answer
    may be starting or stuck: that is not known. Who answers in place of a process of ours that
    does not run is a stranger, and to believe it resident would be to serve it.
    """
    if driver is None or consumer.load or consumer.unload:
        return None
    ours = consumer.driver is not None and consumer.driver.process is not None
    if (ours or not healthy) and await driver.running() is False:
        return False
    return True if healthy else None

"""Health probes: does a consumer answer, and what does that say about its memory?"""

from collections.abc import Mapping

import aiohttp
from attrs import frozen

from mgpu_core.events import ProbeFailure
from mgpu_effects.calls import CallError, check_health
from mgpu_effects.drivers.driver import Driver
from mgpu_effects.settings import ConsumerSettings

_FAILURES: Mapping[str, ProbeFailure] = {"refused": "refused", "timeout": "timeout"}


@frozen(kw_only=True)
class ProbeFacts:
    """What one probe saw: the fields of the event `ProbeResult`. `error` is a code of calls.py."""

    healthy: bool
    resident: bool | None = None
    vram_mib: int | None = None
    busy: bool | None = None
    failure: ProbeFailure | None = None
    error: str | None = None


async def probe(
    session: aiohttp.ClientSession,
    consumer: ConsumerSettings,
    timeout_s: float,
    driver: Driver | None = None,
) -> ProbeFacts:
    """Ask the consumer's health path once. Whatever the network does is in the answer."""
    try:
        await check_health(session, consumer, timeout_s)
    except CallError as error:
        return ProbeFacts(
            healthy=False,
            resident=await _resident(consumer, driver, healthy=False),
            failure=_failure(error.code),
            error=error.code,
        )
    return ProbeFacts(healthy=True, resident=await _resident(consumer, driver, healthy=True))


def _failure(code: str) -> ProbeFailure:
    return "status" if code.startswith("http_") else _FAILURES.get(code, "answer")


async def _resident(
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

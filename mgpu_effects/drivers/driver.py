"""What every driver can do, and how each of them waits for its service to answer."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias

# Does the service answer its health path with 2xx? Returns soon, whatever the network does.
Answers: TypeAlias = Callable[[], Awaitable[bool]]
# Why will it never answer: an error code, or None as long as it may.
Ended: TypeAlias = Callable[[], Awaitable[str | None]]


class Driver(Protocol):
    """Runs the server behind a consumer. Errors are codes of ours, None is success."""

    async def start(self) -> str | None:
        """Return when the server answers its health path. Running already: waits for that."""

    async def stop(self) -> str | None:
        """Return when nothing of the server is left, which is so at once if it doesn't run."""

    async def running(self) -> bool | None:
        """None: it can't be told."""

    async def close(self) -> None:
        """The broker ends: end what nobody else looks after."""


async def wait_until_ready(
    answers: Answers, ended: Ended, ready_s: float, poll_s: float
) -> str | None:
    """Poll until it answers; else return why it `ended`, or `not_ready` after `ready_s`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + ready_s
    while loop.time() < deadline:
        if error := await ended():
            return error
        if await answers():
            return None
        await asyncio.sleep(poll_s)
    return "not_ready"

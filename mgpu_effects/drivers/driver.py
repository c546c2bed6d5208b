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
        """Return when nothing of the server is left, which is so at once if it doesn't run.

        It is asked to end first, and has its grace to do so.
        """

    async def kill(self) -> str | None:
        """End all of it at once: for a `stop` that takes too long."""

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


async def wait_until_gone(
    running: Callable[[], Awaitable[bool | None]], wait_s: float, poll_s: float
) -> str | None:
    """Poll until it is known not to run; `still_running` after `wait_s`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    while await running() is not False:
        if loop.time() >= deadline:
            return "still_running"
        await asyncio.sleep(poll_s)
    return None

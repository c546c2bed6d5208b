"""Time limits that cost nothing where nothing waits.

Most of what a proxy awaits is there already: a chunk that has come, a write that fits into the
socket's buffer. A timer for each would cost more than the work.
"""

import asyncio
from collections.abc import Awaitable, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Begun(Generic[T]):
    """Work that has begun in this task: `over` at once, with a `result`, or still to be awaited."""

    result: T

    def __init__(self, work: Awaitable[T]) -> None:
        self._work = work.__await__()
        self._waits_for: Any = None
        self.over = False
        try:
            self._waits_for = self._work.send(None)
        except StopIteration as done:
            self._end(done)

    def __await__(self) -> Generator[Any, Any, T]:
        """Go on where it stopped: what it waits for is handed to the loop, and back what came."""
        while not self.over:
            try:
                came = yield self._waits_for
            except BaseException as error:  # noqa: BLE001 - it is the work's to handle
                self._go_on(self._work.throw, error)
            else:
                self._go_on(self._work.send, came)
        return self.result

    def _go_on(self, how: Any, what: Any) -> None:
        try:
            self._waits_for = how(what)
        except StopIteration as done:
            self._end(done)

    def _end(self, done: StopIteration) -> None:
        self.over = True
        self.result = done.value


async def within(limit_s: float | None, work: Awaitable[T]) -> T:
    """Await the work; after so many seconds it is cancelled and TimeoutError raised."""
    begun = Begun(work)
    if not begun.over:
        async with asyncio.timeout(limit_s):
            await begun
    return begun.result

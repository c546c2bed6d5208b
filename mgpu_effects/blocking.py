"""Calls that block and may hang: a driver's library, files under /proc."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Blocking:
    """Makes one call at a time, each in a thread of its own with a time limit.

    While one hangs no other is made, so that no threads pile up behind it.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._call: asyncio.Future[Any] | None = None

    @property
    def hangs(self) -> bool:
        """Say whether a call is under way."""
        return self._call is not None and not self._call.done()

    async def run(self, function: Callable[[], T]) -> T:
        """Give what it gives, and raise what it raises.

        Raises TimeoutError past the limit, and while an earlier call is not over: its late answer
        is nobody's.
        """
        async with self._lock:
            if self.hangs:
                raise TimeoutError
            self._call = call = _in_thread(self._name, function)
            done, _ = await asyncio.wait((call,), timeout=self._timeout_s)
            if not done:
                raise TimeoutError
            return call.result()


def _in_thread(name: str, function: Callable[[], T]) -> "asyncio.Future[T]":
    """Run in a daemon thread: one stuck in the kernel must not hold up the end of the broker."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is awaited
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    call = asyncio.wrap_future(future)
    call.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if late
    return call

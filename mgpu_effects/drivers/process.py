"""The `process` driver: the broker runs the service itself."""

import asyncio
import logging
import signal
from collections import deque
from collections.abc import Callable

from mgpu_effects.drivers.driver import Answers, wait_until_ready
from mgpu_effects.drivers.group import MARK, ProcessGroup, end_leftovers, spawn
from mgpu_effects.settings import KILLED_S, ProcessSettings

_TAIL_LINES = 10
_POLL_S = 0.05
_log = logging.getLogger(__name__)


class ProcessDriver:
    """Runs a command in a process group of its own, and ends the whole group.

    What it prints goes to the logger `mgpu.output.NAME`; `tail` has the last lines of it, which are
    logged once more, as an error, when it does not start or ends by itself. `mark` names the
    service on this host: what a killed broker left running under it is ended before the service is
    started, and when it is stopped.
    `on_exit` is called when the process ends without having been told to.

    Errors of `start`: `not_found`, `not_permitted`, `not_started`, `exited_CODE`, `killed_SIGNAL`,
    `not_ready`, and `not_ours`: somebody answers at its address whom this driver did not start.
    Errors of `stop`: `still_running`, `not_ours`.
    """

    def __init__(
        self,
        name: str,
        settings: ProcessSettings,
        answers: Answers,
        on_exit: Callable[[], None] | None = None,
        *,
        mark: str,
    ) -> None:
        self._name = name
        self._mark = mark
        self._settings = settings
        self._answers = answers
        self._on_exit = on_exit
        self._signum = signal.Signals[f"SIG{settings.stop_signal}"]
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._lock = asyncio.Lock()  # whoever spawns or ends a group
        self._group: ProcessGroup | None = None
        self._watcher: asyncio.Task[None] | None = None

    def tail(self) -> tuple[str, ...]:
        """Give what it printed last, for the operator's eyes only: it may hold anything."""
        return tuple(self._tail)

    async def running(self) -> bool:
        return self._group is not None and not self._group.exited.done()

    async def start(self) -> str | None:
        """Cancelled or not ready in time, it ends what it started."""
        async with self._lock:
            group, error = await self._ensure_spawned()
        if group is None:
            return error
        try:
            error = await wait_until_ready(
                self._answers, lambda: _why_ended(group), self._settings.ready_s, _POLL_S
            )
        except asyncio.CancelledError:
            await _kill(group)
            raise
        if error == "not_ready":
            await _kill(group)
        if error is not None:
            await group.drain()
            _log.error("%s did not start: %s", self._name, error)
        if error == "not_ready":
            self._log_last_words()
        return error

    async def stop(self) -> str | None:
        """The stop signal, once more at half the grace (some services wait for the second one),
        and SIGKILL at its end, or when cancelled: each to the whole group, until all of it is gone.
        """
        async with self._lock:
            if self._group is not None:
                return await self._end(self._group)
            if not await end_leftovers(self._mark, KILLED_S):
                return "still_running"
            return "not_ours" if await self._answers() else None

    async def kill(self) -> str | None:
        async with self._lock:
            group = self._group
            if group is None:
                return None if await end_leftovers(self._mark, KILLED_S) else "still_running"
            await _kill(group)
            return await self._end(group)

    async def close(self) -> None:
        async with self._lock:
            if self._group is not None:
                await self._end(self._group)

    async def _ensure_spawned(self) -> tuple[ProcessGroup | None, str | None]:
        if await self.running():
            return self._group, None
        if self._group is not None and (error := await self._end(self._group)):
            return None, error
        if not await end_leftovers(self._mark, KILLED_S):
            return None, "still_running"
        if await self._answers():
            return None, "not_ours"
        try:
            return await self._spawn(), None
        except OSError as error:
            _log.error("%s does not start: %s", self._name, error)
            return None, _spawn_code(error)

    async def _spawn(self) -> ProcessGroup:
        settings = self._settings
        output = logging.getLogger(f"mgpu.output.{self._name}")
        self._tail.clear()
        env = {**settings.env, MARK: self._mark}
        group = await spawn(settings.command, env, settings.cwd, output, self._tail)
        self._group = group
        self._watcher = asyncio.create_task(self._watch(group))
        _log.info("%s started: process %d", self._name, group.pid)
        return group

    async def _watch(self, group: ProcessGroup) -> None:
        returncode = await group.exited
        if group.ending:
            return
        _log.error("%s ended by itself: %s", self._name, _code(returncode))
        await _kill(group)  # what it left behind would keep its memory and its port
        await group.drain()
        self._log_last_words()
        if self._on_exit is not None:
            self._on_exit()

    def _log_last_words(self) -> None:
        _log.error("%s said last:\n  %s", self._name, "\n  ".join(self.tail()) or "nothing")

    async def _end(self, group: ProcessGroup) -> str | None:
        group.ending = True
        half_s = self._settings.grace_s / 2
        try:
            for signum, wait_s in (
                (self._signum, half_s),
                (self._signum, half_s),
                (signal.SIGKILL, KILLED_S),
            ):
                group.signal(signum)
                if await group.gone(wait_s):
                    await group.drain()
                    self._group = None
                    return None
        except asyncio.CancelledError:
            await _kill(group)  # out of time: nobody is left to do it at the end of the grace
            raise
        _log.error("%s: process group %d survives SIGKILL", self._name, group.pid)
        return "still_running"


async def _kill(group: ProcessGroup) -> None:
    group.ending = True
    group.signal(signal.SIGKILL)
    await group.gone(KILLED_S)


async def _why_ended(group: ProcessGroup) -> str | None:
    return _code(group.exited.result()) if group.exited.done() else None


def _code(returncode: int) -> str:
    return f"exited_{returncode}" if returncode >= 0 else f"killed_{-returncode}"


def _spawn_code(error: OSError) -> str:
    match error:
        case FileNotFoundError():
            return "not_found"
        case PermissionError():
            return "not_permitted"
        case _:
            return "not_started"

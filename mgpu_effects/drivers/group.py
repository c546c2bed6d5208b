"""A command in a session and process group of its own, and what it prints."""

import asyncio
import contextlib
import logging
import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_LINE_BYTES = 4096
_DRAIN_S = 0.5
_POLL_S = 0.05
# In the environment of what we start: so that a broker finds what a killed one left behind.
MARK = "MGPU_SERVICE"
_ENDED_STATES = ("Z", "X")  # in /proc/PID/stat: a zombie holds neither memory nor a port


class OutputReader(asyncio.Protocol):
    """Reads what the group prints as it comes, so that no child ever blocks on a full pipe."""

    def __init__(self, logger: logging.Logger, tail: deque[str]) -> None:
        self.complete = asyncio.Event()
        self._logger = logger
        self._tail = tail
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        # A progress bar returns its carriage for each new state: each counts as a line.
        *lines, rest = re.split(rb"[\r\n]+", self._rest + data)
        self._rest = rest[:_LINE_BYTES]
        for line in lines:
            self._keep(line)

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep(self._rest)
        self.complete.set()

    def _keep(self, line: bytes) -> None:
        if line:
            text = line[:_LINE_BYTES].decode(errors="replace")
            self._tail.append(text)
            self._logger.info("%s", text)


class ProcessGroup:
    """Made by `spawn`. `exited` gets the leader's return code (negative: the signal that ended
    it); what the leader started may live on, see `gone`. `ending`: somebody told it to end.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], output: OutputReader, pipe: asyncio.ReadTransport
    ) -> None:
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.ending = False
        self._process = process
        self._output = output
        self._pipe = pipe
        self._pidfd = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, signum: int) -> None:
        """Send it to every process of the group that we may signal."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signum)

    async def gone(self, wait_s: float) -> bool:
        """Wait for every process of the group to end, `wait_s` at most. Are they all gone?"""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while self._alive():
            if loop.time() >= deadline:
                return False
            if self.exited.done():
                await asyncio.sleep(_POLL_S)
            else:
                await asyncio.wait((self.exited,), timeout=deadline - loop.time())
        return True

    async def drain(self) -> None:
        """Take in the last words. Who has left the group may hold the pipe open for ever."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._output.complete.wait(), _DRAIN_S)
        self._pipe.close()

    def _reap(self) -> None:
        returncode = self._process.wait()
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.exited.set_result(returncode)

    def _alive(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        # Zombies count for killpg, and for ever where process 1 does not reap them.
        return not self.exited.done() or any(_members(self.pid))


async def spawn(
    command: Sequence[str],
    env: Mapping[str, str],
    cwd: str | None,
    logger: logging.Logger,
    tail: deque[str],
) -> ProcessGroup:
    """Start it, with `env` beside our own. Raises OSError where that can't be done.

    Nothing is awaited once the process is there: whoever is cancelled in here has started none.
    """
    read_fd, write_fd = os.pipe()
    try:
        pipe, output = await asyncio.get_running_loop().connect_read_pipe(
            lambda: OutputReader(logger, tail), os.fdopen(read_fd, "rb", buffering=0)
        )
        try:
            return ProcessGroup(_popen(command, env, cwd, write_fd), output, pipe)
        except BaseException:
            pipe.close()
            raise
    finally:
        os.close(write_fd)


def _popen(
    command: Sequence[str], env: Mapping[str, str], cwd: str | None, output_fd: int
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - the operator's own command, and no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=output_fd,
        stderr=output_fd,
        cwd=cwd,
        env={**os.environ, **env},
        start_new_session=True,
    )


def _members(pgid: int) -> Iterator[int]:
    """Give the processes of the group that have not ended."""
    return (int(entry.name) for entry, group in _processes() if group == pgid)


def _processes() -> Iterator[tuple[Path, int]]:
    """Give each process that has not ended, by its folder, and its group."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        state, _parent, group = stat.rpartition(")")[2].split()[:3]
        if state not in _ENDED_STATES:
            yield entry, int(group)


async def end_leftovers(mark: str, wait_s: float, variable: str = MARK) -> bool:
    """Kill what an earlier broker started under this mark. Is nothing of it left?"""
    deadline = asyncio.get_running_loop().time() + wait_s
    while groups := _marked(variable, mark):
        if asyncio.get_running_loop().time() >= deadline:
            return False
        for pgid in groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pgid, signal.SIGKILL)
        await asyncio.sleep(_POLL_S)
    return True


def _marked(variable: str, mark: str) -> set[int]:
    """Give the groups that were started under this mark, as far as we may look."""
    wanted, groups = f"{variable}={mark}".encode(), set()
    for entry, group in _processes():
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                groups.add(group)
    return groups

"""A short-lived command: run it, take its output, within a time limit."""

import asyncio
import contextlib
import os
import signal

from attrs import frozen

_REAP_S = 1.0


@frozen
class Output:
    returncode: int
    stdout: str
    stderr: str


async def run_command(*command: str, timeout_s: float) -> Output:
    """Raises FileNotFoundError or another OSError where it can't be started, and TimeoutError.

    Past its time limit, or when the caller is cancelled, it is killed with all that it started.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C"},  # its messages are read by us
    )
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A process stuck in the kernel (a hung GPU driver) outlives even that: don't wait for it.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _REAP_S)
        raise
    assert process.returncode is not None
    return Output(
        process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace")
    )

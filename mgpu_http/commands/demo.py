"""`mgpu demo`: the broker at work on this machine, without a GPU and without any real service."""

import asyncio
import contextlib
import secrets
import shlex
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from attrs import asdict, define
from rich.console import Console
from rich.live import Live

from mgpu_http.commands.output import DONE, USAGE, CommandError, document, message
from mgpu_http.demo.host import DemoError, Place, default_place
from mgpu_http.demo.report import Half, longest_waiting
from mgpu_http.demo.run import Demo, Watch
from mgpu_http.demo.screen import Snapshot, plain, render

INTERRUPTED_EXIT = 130  # as a shell says it of Ctrl-C
LINE_EVERY_S = 2.0
MAX_SEED = 9_999
MAX_SECONDS = 3_600


def demo(arguments: Namespace) -> int:
    """Exit code 0: it ran through, whatever the halves showed."""
    if not 1 <= arguments.seconds <= MAX_SECONDS:
        raise CommandError(f"--seconds is a number from 1 to {MAX_SECONDS}", USAGE)
    seed = secrets.randbelow(MAX_SEED) + 1 if arguments.seed is None else arguments.seed
    place = Place(Path(arguments.dir).absolute()) if arguments.dir is not None else default_place()
    console = Console(stderr=arguments.json)
    try:
        with place.taken(), watching(console) as watch:
            running = Demo(place, arguments.seconds, seed, watch)
            finished = asyncio.run(_interruptible(running))
    except DemoError as error:
        raise CommandError(str(error)) from error
    if arguments.json:
        document({half: asdict(tally) for half, tally in running.tallies().items()})
    else:
        console.print(running.comparison())
        console.print(_afterwards(running, arguments.dir), soft_wrap=True, highlight=False)
    return DONE if finished else INTERRUPTED_EXIT


async def _interruptible(running: Demo) -> bool:
    """Run it; False where a signal ended it before its time, with everything taken down."""
    task = asyncio.create_task(running.run())

    def stop() -> None:
        if not task.cancelling():  # a second Ctrl-C must not end the taking down
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    await asyncio.wait((task,))
    if task.cancelled():
        return False
    task.result()
    return True


@contextlib.contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """A screen where a terminal can show one, else a line now and then on standard error."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield LineByLine()
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda snapshot: live.update(render(snapshot, *console.size), refresh=True)


@define
class LineByLine:
    """Prints a snapshot every `LINE_EVERY_S`."""

    _last: float = 0.0

    def __call__(self, snapshot: Snapshot) -> None:
        if (now := time.monotonic()) - self._last >= LINE_EVERY_S:
            self._last = now
            message(plain(snapshot))


def _afterwards(running: Demo, directory: str | None) -> str:
    """Say where the event log is, how to look at it, and how to see the same again."""
    book = running.books.get(Half.WITH)
    longest = longest_waiting(book.outcomes) if book else None
    events = shlex.quote(str(running.place.events))
    again = f"{_program()} demo --seconds {running.seconds:g} --seed {running.seed}"
    if directory is not None:
        again += f" --dir {shlex.quote(directory)}"
    lines = [f"the event log:               {events}"]
    if longest is not None:
        why = f"{_program()} log why {events} {longest.request}"
        lines.append(f"who waited longest, and why: {why}")
    lines.append(f"the same arrivals again:     {again}")
    return "\n".join(lines)


def _program() -> str:
    """Give the command as it was called: nobody needs the virtual environment in the path."""
    called = sys.argv[0]
    return shlex.quote(called) if Path(called).name == "mgpu" else "mgpu"

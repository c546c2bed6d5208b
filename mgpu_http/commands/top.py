"""`mgpu top`: the status of a broker, live in the terminal."""

import asyncio
import contextlib
import os
import re
import signal
import sys
import termios
import tty
from argparse import Namespace
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NoReturn

import aiohttp
from rich.console import Console
from rich.live import Live

from mgpu_http.commands.output import DONE, USAGE, CommandError
from mgpu_http.commands.remote import TIMEOUT_S, broker_url, call, key_header, refused, silent
from mgpu_http.commands.top_screen import render

EVERY_S = 1.0
LEAST_S = 0.2  # between two looks, however much happens
FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 5.0
CONNECT_S = 5.0
SILENCE_S = 45.0  # of the events, which have a comment every 15 s
PLAIN_WIDTH = 120  # where nothing says how wide lines may be
NOT_ALLOWED = (401, 403)
# They come all the time and say little: the next look shows them.
_ROUTINE = re.compile(rb'^(?!data:)|"type":"(GpuSample|ProbeResult|Tick)"')


def top(arguments: Namespace) -> int:
    url, console = broker_url(arguments), Console(highlight=False)
    if arguments.once:
        told = call(arguments, "GET", "/v1/status")
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = PLAIN_WIDTH
        console.print(render(told, url=url, width=console.width))
        return DONE
    if not console.is_terminal or console.is_dumb_terminal:
        raise CommandError("there is no terminal here: mgpu top --once prints one screen", USAGE)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        return asyncio.run(Top(url, live).run())


class Top:
    """Asks for the status, now and then and when something has happened, until it may end."""

    def __init__(self, url: str, live: Live) -> None:
        self._url = url
        self._live = live
        self._told: dict[str, Any] | None = None
        self._trouble: str | None = None
        self._happened = asyncio.Event()
        self._quit = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._quit.set)
        loop.add_signal_handler(signal.SIGWINCH, self._show)
        async with aiohttp.ClientSession(headers=key_header()) as session:
            with quit_by_key(self._quit.set):
                self._show()
                await _first_of(self._look(session), self._listen(session), self._quit.wait())
        return DONE

    def _show(self) -> None:
        width, height = self._live.console.size
        drawn = render(self._told, url=self._url, width=width, height=height, trouble=self._trouble)
        self._live.update(drawn, refresh=True)

    async def _look(self, session: aiohttp.ClientSession) -> NoReturn:
        retry_s = FIRST_RETRY_S
        while True:
            self._happened.clear()
            try:
                self._told = await self._ask(session)
            except UnreachableError as error:
                self._trouble = f"not reachable, trying again in {retry_s:g} s: {error}"
                self._show()
                await asyncio.sleep(retry_s)
                retry_s = min(LONGEST_RETRY_S, 2 * retry_s)
                continue
            self._trouble, retry_s = None, FIRST_RETRY_S
            self._show()
            await asyncio.sleep(LEAST_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._happened.wait(), EVERY_S - LEAST_S)

    async def _ask(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        """Raises UnreachableError where it is worth trying again, else CommandError."""
        limit = aiohttp.ClientTimeout(total=TIMEOUT_S, connect=CONNECT_S)
        try:
            async with session.get(f"{self._url}/v1/status", timeout=limit) as answer:
                body = await answer.read()
                if answer.status in NOT_ALLOWED:
                    raise refused(answer.status, body)
                if answer.status != 200:
                    raise UnreachableError(str(refused(answer.status, body)))
                told: dict[str, Any] = await answer.json()
                return told
        except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
            raise UnreachableError(str(silent(self._url, error or "timeout"))) from error

    async def _listen(self, session: aiohttp.ClientSession) -> NoReturn:
        """Have it look at once when something happens. Without events it looks every second."""
        limit = aiohttp.ClientTimeout(total=None, connect=CONNECT_S, sock_read=SILENCE_S)
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, ValueError):
                async with session.get(f"{self._url}/v1/events", timeout=limit) as answer:
                    async for line in answer.content:
                        if not _ROUTINE.search(line):
                            self._happened.set()
            await asyncio.sleep(LONGEST_RETRY_S)


class UnreachableError(Exception):
    """Nobody answers, or not as a broker does; that may change."""


async def _first_of(*works: Coroutine[Any, Any, object]) -> None:
    """Run them until one ends, and raise what it raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def quit_by_key(end: Callable[[], None]) -> Iterator[None]:
    """Take keys one by one, unseen; where the input is no terminal only Ctrl-C is left."""
    if not sys.stdin.isatty():
        yield
        return
    keyboard, loop = sys.stdin.fileno(), asyncio.get_running_loop()
    before = termios.tcgetattr(keyboard)

    def pressed() -> None:
        keys = os.read(keyboard, 64)
        if not keys:  # the terminal is gone
            loop.remove_reader(keyboard)
        if not keys or b"q" in keys.lower():
            end()

    tty.setcbreak(keyboard)
    loop.add_reader(keyboard, pressed)
    try:
        yield
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)

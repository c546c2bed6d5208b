"""What the broker tells the service manager that started it: systemd's protocol of sd_notify(3)."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress

log = logging.getLogger(__name__)

SEND_S = 0.5  # a manager that takes nothing for so long misses that message


class ServiceManager:
    """Sends each message as a datagram to `$NOTIFY_SOCKET`; without it, nothing happens.

    The variables are taken out of `environ`: they are meant for this process, and not for the
    services that it starts. `beat_s` is half of the time after which the manager's watchdog takes
    the broker for stuck; None: it has no watchdog.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        self._address = environ.pop("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]  # a name that is no file
        limit_us = environ.pop("WATCHDOG_USEC", "")
        ours = environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watched = self._address and ours and limit_us.isdecimal() and int(limit_us) > 0
        self.beat_s = int(limit_us) / 2e6 if watched else None

    def tell(self, *lines: str) -> None:
        """Send `NAME=VALUE` lines as one message; a manager that can't be reached is no failure."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(SEND_S)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            log.warning("the service manager was not told %s: %s", lines[0], error)

    @contextmanager
    def reloading(self) -> Iterator[None]:
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            self.tell("READY=1")

    async def keep_alive(self, takes_events: Callable[[], Awaitable[bool]]) -> None:
        """Feed the watchdog for as long as `takes_events` says yes, and does so in time."""
        if self.beat_s is None:
            return
        loop = asyncio.get_running_loop()
        while True:
            next_s = loop.time() + self.beat_s
            alive = False
            with suppress(TimeoutError):
                alive = await asyncio.wait_for(takes_events(), self.beat_s)
            if alive:
                self.tell("WATCHDOG=1")
            else:
                log.error("the scheduler takes no events: the watchdog is told nothing")
            await asyncio.sleep(next_s - loop.time())

"""What `mgpu serve` tells the service manager, over a real datagram socket."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mgpu_effects.broker import Broker
from mgpu_http.service_manager import ServiceManager
from tests.support.brokers import running, settings_of
from tests.support.facade import LIMIT_S, config, write_config

WATCHDOG_US = 200_000
SILENCE_S = 10 * WATCHDOG_US / 1e6

# `mgpu serve` whose scheduler does what the first argument says with the configuration's change.
SERVE_WITH_A_DEFECT = """
import sys, time
from mgpu_core.events import Reconfigured
from mgpu_core.scheduler import Scheduler
from mgpu_http.cli import main

step = Scheduler.step

def defective(self, state, event):
    if isinstance(event, Reconfigured):
        if sys.argv[1] == "raise":
            raise RuntimeError("a defect")
        time.sleep(1000)
    return step(self, state, event)

Scheduler.step = defective
sys.exit(main(["serve", "--config", sys.argv[2]]))
"""


class Manager:
    """The receiving end. A message is the list of its lines."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.address = address
        self._sock = sock

    def next(self, limit_s: float = LIMIT_S) -> list[str]:
        """Raises TimeoutError when nothing is said for so long."""
        self._sock.settimeout(limit_s)
        return self._sock.recv(4096).decode().split("\n")

    def until(self, line: str) -> list[list[str]]:
        """Give the messages up to the one that begins with `line`, that one included."""
        said = [self.next()]
        while said[-1][0] != line:
            said.append(self.next())
        return said

    def rest(self) -> list[list[str]]:
        """Give what is there, once nobody says anything any more."""
        said = []
        with suppress(TimeoutError, BlockingIOError):
            while True:
                said.append(self.next(0))
        return said

    def falls_silent(self) -> bool:
        """Is nothing said for many heartbeats, after what was already under way?"""
        for _ in range(3):
            try:
                self.next(SILENCE_S)
            except TimeoutError:
                return True
        return False

    def environ(self, **more: str) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.address, **more}


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        yield Manager(sock, path)


@contextmanager
def serve(
    path: Path, environ: dict[str, str], defect: str = ""
) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "mgpu_http.cli", "serve", "--config", str(path)]
    if defect:
        command = [sys.executable, "-c", SERVE_WITH_A_DEFECT, defect, str(path)]
    process = subprocess.Popen(command, env={**os.environ, **environ}, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait(LIMIT_S)


def names(messages: list[list[str]]) -> list[str]:
    """Name the messages in order, without the watchdog's."""
    return [message[0] for message in messages if message != ["WATCHDOG=1"]]


# -------------------------------------------------------------------------------- the process


def test_it_tells_start_reload_and_end_in_order(tmp_path: Path, manager: Manager) -> None:
    path = write_config(tmp_path, config(None))
    with serve(path, manager.environ(WATCHDOG_USEC=str(WATCHDOG_US))) as process:
        ready, status = manager.next()
        assert ready == "READY=1"
        assert status.startswith("STATUS=listening on http://127.0.0.1:")
        manager.until("WATCHDOG=1")
        manager.until("WATCHDOG=1")

        before_us = time.monotonic_ns() // 1000
        process.send_signal(signal.SIGHUP)
        begun = manager.until("RELOADING=1")[-1]
        assert begun[1].startswith("MONOTONIC_USEC=")
        assert before_us <= int(begun[1].partition("=")[2]) <= time.monotonic_ns() // 1000
        assert names(manager.until("READY=1")) == ["READY=1"]

        path.write_text("listen: [")  # the old configuration goes on, and that is ready, too
        process.send_signal(signal.SIGHUP)
        assert names(manager.until("READY=1")) == ["RELOADING=1", "READY=1"]
        manager.until("WATCHDOG=1")

        process.send_signal(signal.SIGTERM)
        assert names(manager.until("STOPPING=1")) == ["STOPPING=1"]
        assert process.wait(LIMIT_S) == 0
        assert manager.rest() == []


@pytest.mark.parametrize(
    "watchdog", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "50000", "WATCHDOG_PID": "1"}]
)
def test_without_a_watchdog_of_its_own_there_is_no_heartbeat(
    tmp_path: Path, manager: Manager, watchdog: dict[str, str]
) -> None:
    path = write_config(tmp_path, config(None))
    with serve(path, manager.environ(**watchdog)) as process:
        assert manager.next()[0] == "READY=1"
        process.send_signal(signal.SIGHUP)
        assert names(manager.until("READY=1")) == ["RELOADING=1", "READY=1"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0
        assert [message[0] for message in manager.rest()] == ["STOPPING=1"]


def test_a_stuck_loop_is_no_longer_vouched_for(tmp_path: Path, manager: Manager) -> None:
    path = write_config(tmp_path, config(None))
    environ = manager.environ(WATCHDOG_USEC=str(WATCHDOG_US))
    with serve(path, environ, "hang") as process:
        manager.until("WATCHDOG=1")
        process.send_signal(signal.SIGHUP)
        manager.until("RELOADING=1")
        assert manager.falls_silent()
        assert process.poll() is None


def test_a_failed_scheduler_is_an_end_without_a_heartbeat(tmp_path: Path, manager: Manager) -> None:
    path = write_config(tmp_path, config(None))
    environ = manager.environ(WATCHDOG_USEC=str(WATCHDOG_US))
    with serve(path, environ, "raise") as process:
        manager.until("WATCHDOG=1")
        process.send_signal(signal.SIGHUP)
        manager.until("STOPPING=1")
        assert process.wait(LIMIT_S) == 1
        assert ["WATCHDOG=1"] not in manager.rest()


# ------------------------------------------------------------------------------ the heartbeat


async def beats(manager: Manager, broker: Broker) -> "asyncio.Task[None]":
    environ = manager.environ(WATCHDOG_USEC=str(WATCHDOG_US))
    return asyncio.create_task(ServiceManager(environ).keep_alive(broker.takes_events))


async def test_a_heartbeat_goes_through_the_inbox_and_leaves_no_event(tmp_path: Path) -> None:
    async with running(settings_of(), tmp_path) as broker:
        before = broker._seq
        turns = [asyncio.create_task(broker.takes_events()) for _ in range(100)]
        await asyncio.sleep(0)
        assert not any(turn.done() for turn in turns)
        assert all(await asyncio.wait_for(asyncio.gather(*turns), LIMIT_S))
        assert broker._seq - before < 10  # a sample of the card may have come between


async def test_the_loop_of_events_has_to_run(
    tmp_path: Path, manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(settings_of(), tmp_path) as broker:
        task = await beats(manager, broker)
        assert await asyncio.to_thread(manager.next) == ["WATCHDOG=1"]
        taken = broker._loop
        stuck = asyncio.Event()
        broker._loop = asyncio.create_task(_after(taken, stuck, broker))
        await asyncio.sleep(0)
        # The event loop turns, as this test shows by waiting, but nobody takes events.
        assert await asyncio.to_thread(manager.falls_silent)
        assert "takes no events" in caplog.text
        stuck.set()
        assert await asyncio.to_thread(manager.next) == ["WATCHDOG=1"]
        task.cancel()


async def _after(taken: "asyncio.Task[None]", stuck: asyncio.Event, broker: Broker) -> None:
    taken.cancel()
    await stuck.wait()
    await broker._run()


async def test_a_failed_broker_is_not_vouched_for(tmp_path: Path) -> None:
    async with running(settings_of(), tmp_path) as broker:
        assert await broker.takes_events()
        broker.failed.set()
        assert not await broker.takes_events()


# ------------------------------------------------------------------------------- the protocol


def test_an_abstract_address_begins_with_an_at() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = f"mgpu-test-{os.getpid()}"
        sock.bind(f"\0{name}")
        ServiceManager({"NOTIFY_SOCKET": f"@{name}"}).tell("READY=1", "STATUS=here")
        assert Manager(sock, name).next() == ["READY=1", "STATUS=here"]


def test_the_variables_are_not_left_to_the_services_that_it_starts() -> None:
    environ: dict[str, Any] = {
        "NOTIFY_SOCKET": "/nowhere",
        "WATCHDOG_USEC": "2000000",
        "WATCHDOG_PID": str(os.getpid()),
        "HOME": "/",
    }
    assert ServiceManager(environ).beat_s == 1.0
    assert environ == {"HOME": "/"}


def test_nothing_is_sent_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*_args: object) -> None:
        raise AssertionError("a socket was opened")

    manager = ServiceManager({"WATCHDOG_USEC": "1000000"})
    monkeypatch.setattr(socket, "socket", no_socket)
    manager.tell("READY=1")
    assert manager.beat_s is None


def test_a_manager_that_cannot_be_reached_is_only_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).tell("READY=1")
    assert "was not told READY=1" in caplog.text

"""`mgpu top`, in a terminal of the tests' own and on paper."""

import asyncio
import contextlib
import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mgpu_http.commands.top_screen import render, shares
from tests.http.test_cli import mgpu, remote
from tests.support.dev_http import free_port
from tests.support.facade import LIMIT_S
from tests.support.gpu_host import GpuHost, gpu_host, ready

ROUTES = {"load": {"path": "/load"}, "unload": {"path": "/unload"}}
CONSUMERS: dict[str, Any] = {
    "voice": {**ROUTES, "paths": {"tts": {"path": "/tts"}}, "vram_resident_mib": 8_000},
    "pictures": {**ROUTES, "paths": {"image": {"path": "/draw"}}, "vram_resident_mib": 9_000},
}
ROUTING = {"tts": "voice", "image": "pictures"}
OWN_NAME = Path("/proc/self/comm").read_text().strip()
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>]")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[GpuHost]:
    with gpu_host(tmp_path, total_mib=16_000) as host:
        host.start("voice", mib=5_000)
        host.start("pictures", mib=9_000, loaded=False)
        yield host


class Terminal:
    """A terminal in which `mgpu top` runs; `shown` is what came last, as it is read."""

    def __init__(self, url: str, *options: str, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(24, 120)
        self.settings = termios.tcgetattr(theirs)
        self._theirs = theirs
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mgpu_http.cli", "top", "--url", url, *options],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", **environment},
        )
        self._text = ""
        self._read = threading.Thread(target=self._take, daemon=True)
        self._read.start()

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    async def until(self, words: str) -> str:
        """Wait until something is drawn with these words, which begins after this call."""
        deadline, self._text = time.monotonic() + LIMIT_S, ""
        while words not in (text := ESCAPE.sub("", self._text)):
            assert time.monotonic() < deadline, f"never {words!r}: {text}"
            await asyncio.sleep(0.01)
        return text

    async def exit_code(self) -> int:
        return await asyncio.to_thread(self.process.wait, LIMIT_S)

    @property
    def is_as_before(self) -> bool:
        return termios.tcgetattr(self._theirs) == self.settings

    def close(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT_S)
        os.close(self._theirs)
        self._read.join(LIMIT_S)
        os.close(self._ours)

    def _take(self) -> None:
        with contextlib.suppress(OSError):  # the other side is closed
            while some := os.read(self._ours, 65536):
                self._text += some.decode(errors="replace")


@contextlib.contextmanager
def terminal(url: str, *options: str, **environment: str) -> Iterator[Terminal]:
    opened = Terminal(url, *options, **environment)
    try:
        yield opened
    finally:
        opened.close()


async def test_it_follows_the_broker_through_a_restart_and_ends_with_a_key(host: GpuHost) -> None:
    listen = f"127.0.0.1:{free_port()}"
    with terminal(f"http://{listen}") as top:
        await top.until("no broker answers")
        with host.serve(consumers=CONSUMERS, routing=ROUTING, listen=listen) as broker:
            run = (await broker.status())["run"]
            await top.until(f"run {run}")
            async with broker.connect() as client:
                await client.send("POST", "/v1/tts", "X-Upstream: do=never", body=b"")
                await top.until("1 running, 0 waiting")
            broker.process.terminate()
            assert await broker.exit_code() == 0
        shown = await top.until("trying again in 2 s")
        assert run in shown  # the last that was known stays
        with host.serve(consumers=CONSUMERS, routing=ROUTING, listen=listen) as broker:
            await top.until(f"run {(await broker.status())['run']}")
            top.press("x")
            top.press("Q")
            assert await top.exit_code() == 0
    assert broker.process.returncode is not None


async def test_it_leaves_the_terminal_as_it_was_and_follows_its_size(host: GpuHost) -> None:
    with host.serve(consumers=CONSUMERS, routing=ROUTING) as broker:
        await ready(broker)
        with terminal(broker.url) as top:
            await top.until("waiting, and why" + " " + "─" * 100)
            top.resize(24, 60)
            top.process.send_signal(signal.SIGWINCH)
            rule = next(
                line
                for line in (await top.until("nobody")).splitlines()
                if line.startswith("waiting, and why")
            )
            assert len(rule) <= 60
            top.process.send_signal(signal.SIGINT)
            assert await top.exit_code() == 0
            assert top.is_as_before


async def test_a_key_that_is_wrong_ends_it_with_the_words_of_the_broker(host: GpuHost) -> None:
    auth = {"keys": [{"name": "a", "hash": "0" * 64}]}
    with (
        host.serve(consumers=CONSUMERS, auth=auth) as broker,
        terminal(broker.url, MGPU_KEY="wrong") as top,
    ):
        await top.until("unauthorized")
        assert await top.exit_code() == 1


async def test_once_prints_one_screen_without_a_terminal(host: GpuHost) -> None:
    host.card.take("a game", 700)  # in this process
    with host.serve(consumers=CONSUMERS, routing=ROUTING) as broker:
        await broker.ask("POST", "/v1/consumers/pictures/unload")
        await broker.until(
            "measured", lambda s: s["consumers"]["voice"]["memory"]["measured"]["steady_mib"]
        )
        async with broker.connect() as served, broker.connect() as waiting:
            await served.send("POST", "/v1/tts", "X-Upstream: do=never", body=b"")
            await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
            await waiting.send("POST", "/v1/image", body=b"")
            await broker.until(
                "waits", lambda s: any(r["state"] == "queued" and r["why"] for r in s["requests"])
            )
            told = await remote("top", "--once", url=broker.url)
    assert (told.returncode, told.stderr) == (0, "")
    lines = told.stdout.splitlines()
    assert "1 running, 1 waiting" in lines[0]
    assert f"nobody's: {OWN_NAME} 700" in told.stdout
    row = next(line.split() for line in lines if line.startswith("voice"))
    assert row[1:5] == ["resident", "8,000", "5,000", "5,000"]
    assert "for the card, held by voice" in next(line for line in lines if " image " in line)


def test_without_a_terminal_or_a_broker_it_says_so() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    told = mgpu("top", "--url", url)
    assert (told.returncode, told.stdout) == (2, "")
    assert "mgpu top --once" in told.stderr
    told = mgpu("top", "--once", "--url", url)
    assert (told.returncode, told.stdout) == (1, "")
    assert "no broker answers" in told.stderr


# ---------------------------------------------------------------------------------- on paper


def consumer_row(**changes: Any) -> dict[str, Any]:
    measured = dict.fromkeys(("residue", "steady", "load_peak", "work_peak"))
    memory = {"declared_mib": 4_000, "held_mib": None}
    return {
        "healthy": True,
        "error": None,
        "residency": "resident",
        "active": 0,
        "waiting": 0,
        "total_requests": 3,
        "owed": False,
        "leaky": False,
        "pinned": False,
        "cooldown_until": None,
        "memory": {**memory, "measured": {f"{key}_mib": mib for key, mib in measured.items()}},
        **changes,
    }


def request_row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"r{number}",
        "consumer": "voice",
        "kind": "tts",
        "state": "queued",
        "promoted": False,
        "granted": None,
        "waited_ms": 1_500,
        "why": {"text": "for the card " * 20},
        **changes,
    }


def status_of(consumers: int, requests: int, **gpu: Any) -> dict[str, Any]:
    card = {"index": 0, "used_mib": 6_000, "free_mib": 2_000, "total_mib": 8_000, "error": None}
    return {
        "version": "1",
        "run": "abc",
        "at": 9_000_000,
        "draining": False,
        "scheduler": dict.fromkeys(
            ("in_flight", "queue_depth", "total_jobs", "loads", "evictions"), 0
        ),
        "gpu": [{**card, "holders": [], "foreign": None, **gpu}],
        "consumers": {f"service-{n}": consumer_row() for n in range(consumers)},
        "requests": [request_row(n) for n in range(requests)],
    }


def drawn(told: Any, width: int = 100, height: int | None = None, **more: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height or 200)
    console.print(render(told, url="http://h", width=width, height=height, **more))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("height", [24, 40])
@pytest.mark.parametrize("width", [60, 120])
@pytest.mark.parametrize(("consumers", "requests"), [(1, 0), (3, 100), (40, 2), (40, 100)])
def test_it_fits(width: int, height: int, consumers: int, requests: int) -> None:
    lines = drawn(status_of(consumers, requests), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "service-0" in text
    assert ("more" in text) is (consumers + requests > 20)
    if requests:
        assert "r0" in text


def test_on_paper_nothing_is_cut() -> None:
    text = "\n".join(drawn(status_of(40, 100)))
    assert "more" not in text
    assert "service-39" in text
    assert "r99" in text


def test_who_holds_the_card_is_named_and_what_nobody_is_known_to_hold_shows() -> None:
    told = status_of(
        1,
        0,
        holders=[{"consumer": "service-0", "mib": 4_000, "measured": False}],
        foreign=[{"pid": 7, "name": None, "mib": None}, {"pid": 8, "name": "Xorg", "mib": 900}],
    )
    lines = drawn(told, width=160)
    assert lines[2] == "GPU 0  6,000 of 8,000 MiB are in use, 2,000 free"
    assert re.findall(r"[\w-]+", lines[3]) == [
        *("service-0", "4", "000", "Xorg", "900"),
        *("others", "1", "100", "free", "2", "000"),
    ]
    assert lines[4] == "service-0 4,000 (believed); nobody's: pid 7 -, Xorg 900"


def test_a_card_that_nobody_reads_says_so() -> None:
    lines = drawn(status_of(1, 0, used_mib=None, free_mib=None, error="no_gpu"))
    assert lines[2].endswith("of 8,000 MiB nobody can tell what is in use  no_gpu")


def test_trouble_stands_above_what_was_known_last() -> None:
    assert drawn(None, trouble="no broker answers")[1] == "no broker answers"
    lines = drawn(status_of(1, 1), trouble="no broker answers")
    assert lines[1] == "no broker answers"
    assert any("r0" in line for line in lines)


def test_marks_and_the_first_in_line_are_shown() -> None:
    told = status_of(0, 0)
    told["consumers"] = {
        "a": consumer_row(healthy=False, error="refused", leaky=True, owed=True),
        "b": consumer_row(error="busy: no_value", pinned=True, cooldown_until=1),
    }
    told["requests"] = [
        request_row(1, promoted=True, why={"text": "for a"}),
        request_row(2, why=None),
        request_row(3, state="serving", granted=5_000_000),
    ]
    lines = drawn(told)
    a, b = (next(line for line in lines if line.startswith(f"{name} ")) for name in "ab")
    assert a.endswith("down (refused), leaky, owed")
    assert b.endswith("cooling down, pinned, busy: no_value")
    first, fresh, running = (next(x for x in lines if f" r{n}" in x) for n in (1, 2, 3))
    assert first.endswith("first: for a")
    assert fresh.endswith("it has just come")
    assert running.split()[:2] == ["4.0", "s"]


@pytest.mark.parametrize(
    ("wanted", "room", "given"),
    [
        ([2, 1, 3], 20, [2, 1, 3]),
        ([40, 1, 2], 13, [10, 1, 2]),
        ([40, 50, 2], 12, [5, 5, 2]),
        ([9, 9, 9], 3, [2, 2, 2]),
        ([0, 0, 9], 6, [0, 0, 6]),
    ],
)
def test_rows_are_shared_fairly(wanted: list[int], room: int, given: list[int]) -> None:
    assert shares(wanted, room) == given

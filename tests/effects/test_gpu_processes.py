"""Whose a process is: shown with real ones, and with a /proc that is written down."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mgpu_core.events import GpuReading
from mgpu_effects.clock import Clock
from mgpu_effects.drivers import mark_of
from mgpu_effects.drivers.group import MARK
from mgpu_effects.gpu import GpuProcess, SampleError
from mgpu_effects.gpu_processes import (
    HolderReader,
    Holders,
    Owner,
    attribute,
    local_port,
    owner_of,
)
from mgpu_effects.proc import Process, lineage, listeners
from mgpu_effects.settings import (
    ConsumerSettings,
    DriverSettings,
    ProcessSettings,
    SystemdSettings,
)

# Listens, and has a child that does not; says the port and the pids; ends with its input.
SERVER = """
import json, os, socket, subprocess, sys
listener = socket.create_server(("127.0.0.1", 0))
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
told = {"port": listener.getsockname()[1], "pid": os.getpid(), "child": child.pid}
print(json.dumps(told), flush=True)
sys.stdin.read()
child.kill()
"""


@pytest.fixture
def start() -> Iterator[object]:
    """Run a service as above; gives its port, its pid and its child's."""
    with ExitStack() as stack:

        def run(**env: str) -> tuple[int, int, int]:
            process = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **env},
                start_new_session=True,
            )
            stack.callback(process.wait, 20)
            stack.callback(process.communicate)
            told = json.loads(process.stdout.readline())
            return told["port"], told["pid"], told["child"]

        yield run


def owned(owner: Owner, *pids: int) -> list[bool]:
    processes = [GpuProcess(0, pid, 100) for pid in pids]
    found = attribute(1, (), processes, (owner,))
    return [owner.consumer in each.owners for each in found.holdings]


def test_who_listens_on_the_port_is_the_consumers_and_so_are_its_children(start):
    port, pid, child = start()
    other_port, other, other_child = start()
    assert owned(Owner(consumer="a", port=port), pid, child, other) == [True, True, False]
    assert owned(Owner(consumer="b", port=other_port), child, other_child) == [False, True]
    assert owned(Owner(consumer="c"), pid) == [False]


def test_what_a_process_driver_started_carries_its_mark(start):
    _, pid, child = start(**{MARK: "a http://x"})
    assert owned(Owner(consumer="a", mark="a http://x"), pid, child) == [True, True]
    assert owned(Owner(consumer="b", mark="b http://x"), pid, child) == [False, False]


def test_a_process_knows_its_name_and_whom_it_descends_from(start):
    _, pid, child = start()
    line = lineage(child)
    assert [one.pid for one in line[:2]] == [child, pid]
    assert line[0].name.startswith("python")
    # The lineage ends below this process, in whose place the broker is.
    assert len(line) == 2


def test_who_has_ended_is_nobodys(start):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(20)
    assert lineage(gone.pid) == ()
    found = attribute(1, (), [GpuProcess(0, gone.pid, 5)], ())
    assert [(each.name, each.owners) for each in found.holdings] == [(None, frozenset())]


# ------------------------------------------------------------------------- what stands under /proc

UNIT = "0::/system.slice/whisper-server.service\n"
TEMPLATE = "0::/system.slice/system-tts.slice/tts@one.service\n"
CONTAINER = "ab" * 32
DOCKER_V1 = f"12:memory:/docker/{CONTAINER}\n11:cpu:/docker/{CONTAINER}\n"
DOCKER_V2 = f"0::/system.slice/docker-{CONTAINER}.scope\n"
PODMAN = f"0::/user.slice/user@1.service/user.slice/libpod-{CONTAINER}.scope/container\n"


@pytest.fixture
def proc(tmp_path):
    def put(pid: int, parent: int = 1, name: str = "x", cgroup: str = "") -> Path:
        here = tmp_path / str(pid)
        here.mkdir()
        (here / "stat").write_text(f"{pid} ({name}) S {parent} {pid} {pid} 0 -1 4194304")
        (here / "cgroup").write_text(cgroup)
        return tmp_path

    return put


@pytest.mark.parametrize(
    ("cgroup", "name", "is_it"),
    [
        (UNIT, "whisper-server.service", True),
        (UNIT, "server.service", False),
        (UNIT, "whisper.service", False),
        (TEMPLATE, "tts@one.service", True),
        (TEMPLATE, "tts@two.service", False),
        (DOCKER_V1, CONTAINER, True),
        (DOCKER_V2, CONTAINER, True),
        (PODMAN, CONTAINER, True),
        (DOCKER_V2, "cd" * 32, False),
        ("", CONTAINER, False),
    ],
)
def test_a_unit_and_a_container_are_control_groups(proc, cgroup, name, is_it):
    [process] = lineage(7, proc(7, cgroup=cgroup))
    assert Owner(consumer="a", cgroup=name).owns((process,), {}) is is_it


def test_a_service_manager_is_nobodys_ancestor(proc):
    """It holds the sockets of those whom it starts on demand."""
    proc(20, name="systemd")
    proc(21, parent=20, name="a (strange) name")
    assert [one.name for one in lineage(22, proc(22, parent=21))] == ["x", "a (strange) name"]


def test_ancestors_without_an_end_are_cut_off(proc):
    proc(30, parent=31)
    assert 2 < len(lineage(30, proc(31, parent=30))) < 100


def test_sockets_that_listen_are_found_by_port(tmp_path):
    (tmp_path / "net").mkdir()
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid ...\n"
    rest = "00000000:00000000 00:00000000 00000000  1000        0"
    (tmp_path / "net" / "tcp").write_text(
        f"{head}   0: 0100007F:1F90 00000000:0000 0A {rest} 777 1 0000 100\n"
        f"   1: 0100007F:1F90 0100007F:C350 01 {rest} 778 1 0000 100\n"
    )
    (tmp_path / "net" / "tcp6").write_text(
        f"{head}   0: {'0' * 32}:1F90 {'0' * 32}:0000 0A {rest} 779 1 0000 100\n"
        f"   1: {'0' * 32}:0050 {'0' * 32}:0000 0A {rest} 780 1 0000 100\n"
    )
    assert listeners(tmp_path) == {8080: {777, 779}, 80: {780}}
    server = Process(pid=5, parent=1, name="s", sockets=frozenset({779}))
    caller = Process(pid=6, parent=1, name="c", sockets=frozenset({778}))
    owner = Owner(consumer="a", port=8080)
    assert owner.owns((server,), listeners(tmp_path))
    assert not owner.owns((caller,), listeners(tmp_path))


# ------------------------------------------------------------------------ how a consumer is known

URL = "http://127.0.0.1:9"


def consumer(**more: object) -> ConsumerSettings:
    return ConsumerSettings(name="a", **{"url": URL, **more})


def test_a_consumer_is_known_by_its_driver_and_its_port():
    process = consumer(driver=DriverSettings(process=ProcessSettings(command=("x",))))
    assert owner_of(process, process) == Owner(consumer="a", mark=mark_of(process), port=9)
    for unit in ("x", "x.service"):
        of_unit = consumer(driver=DriverSettings(systemd=SystemdSettings(unit=unit)))
        assert owner_of(of_unit, of_unit) == Owner(consumer="a", cgroup="x.service", port=9)
    assert owner_of(consumer(), consumer()) == Owner(consumer="a", port=9)
    # What runs was started by settings that are no more.
    assert owner_of(consumer(), process).mark == mark_of(process)


def test_only_a_port_leaves_a_doubt():
    assert [Owner(consumer="a", **by).certain for by in ({"port": 9}, {"mark": "m"})] == [
        False,
        True,
    ]
    assert Owner(consumer="a", cgroup="x.service").certain


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://127.0.0.1:8080/x", 8080),
        ("http://127.9.9.9", 80),
        ("https://localhost", 443),
        ("http://[::1]:81", 81),
        ("http://0.0.0.0:82", 82),
        ("http://10.0.0.1:83", None),
        ("http://gpu-box:84", None),
    ],
)
def test_a_port_is_one_of_this_host_only_on_its_loopback(url, port):
    assert local_port(url) == port


# ------------------------------------------------------------------------------------ the reading


class Cards:
    """A sampler that gives what it is told."""

    def __init__(self, *processes: GpuProcess) -> None:
        self.told: tuple[GpuProcess, ...] = processes
        self.error: Exception | None = None
        self.times = 0
        self.hold: asyncio.Event | None = None

    async def read(self) -> tuple[GpuReading, ...]:
        self.times += 1
        if self.hold is not None:
            await self.hold.wait()
        if self.error is not None:
            raise self.error
        return (GpuReading(index=0, total_mib=9000, used_mib=900, free_mib=8100),)

    async def processes(self) -> tuple[GpuProcess, ...]:
        return self.told

    async def close(self) -> None:
        raise AssertionError


async def known(*owners: Owner) -> tuple[Owner, ...]:
    return owners


async def test_a_reading_tells_whose_the_memory_is(start):
    port, _, child = start()
    _, stranger, _ = start()
    cards = Cards(*(GpuProcess(0, each, mib) for each, mib in ((child, 700), (stranger, 100))))
    owner = Owner(consumer="a", port=port)
    reader = HolderReader(Clock(), lambda: cards, lambda: known(owner))
    found = await reader.read(0)
    assert (found.error, found.held_mib("a", [0]), found.used_mib) == (None, 700, {0: 900})
    assert [(each.pid, each.mib) for each in found.foreign(0)] == [(stranger, 100)]
    assert found.foreign(0)[0].name.startswith("python")
    assert found.foreign(1) == ()


async def test_readers_share_a_reading_that_began_late_enough():
    cards, clock = Cards(), Clock()
    reader = HolderReader(clock, lambda: cards, known)
    first = await reader.read(clock.now())
    assert await reader.read(first.taken) is first
    assert (await reader.recent(10**9)) is first
    second = await reader.read(first.taken + 1)
    assert second.taken > first.taken
    assert cards.times == 2


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (SampleError("nvml_failed"), "nvml_failed"),
        (TimeoutError(), "timeout"),
        (ZeroDivisionError(), "internal_error"),
    ],
)
async def test_a_reading_that_fails_says_why(raised, error):
    cards, clock = Cards(), Clock()
    cards.error = raised
    found = await HolderReader(clock, lambda: cards, known).read(0)
    assert (found.error, found.holdings) == (error, ())


async def test_who_only_wants_to_see_does_not_wait_for_a_card_that_hangs(monkeypatch):
    monkeypatch.setattr("mgpu_effects.gpu_processes._RECENT_S", 0.05)
    cards, clock = Cards(), Clock()
    reader = HolderReader(clock, lambda: cards, known)
    cards.hold = asyncio.Event()
    assert await reader.recent(10**9) is None
    cards.hold = None
    first = await reader.recent(0)
    assert isinstance(first, Holders)
    cards.hold = asyncio.Event()
    assert await reader.recent(-1) is first

"""The broker as users run it: `mgpu serve` with a configuration, and other commands of `mgpu`."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from client import CALL_S, CheckError, Client, check
from watch import Service, Watch

from mgpu_effects.config_file import load_settings
from mgpu_effects.units import units

READY_S = 30
STOP_S = 45  # beyond shutdown_grace_s, which is 30
COMMAND_S = 120
OUTPUT_LINES = 60


class Host(NamedTuple):
    """A configuration, what its variables stand for, how its services' processes are known, and
    the command of one that the broker does not start.
    """

    config: Path
    variables: Mapping[str, str]
    processes: Mapping[str, tuple[str, ...]]
    beside: Sequence[str] = ()

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, **self.variables}

    def watch(self) -> Watch:
        settings = load_settings(self.config, self.environ)
        known, (gpu,) = units(settings), settings.gpus
        mib = {
            name: known[name].vram_resident_mib if name in known else 0 for name in self.processes
        }
        services = {name: Service(args, mib[name]) for name, args in self.processes.items()}
        return Watch(services, gpu.total_mib)


class Broker:
    """The process of the broker."""

    def __init__(self, host: Host, output: Path) -> None:
        self.url = f"http://127.0.0.1:{host.variables['REAL_BROKER_PORT']}"
        self._output = output
        commands = [[_mgpu(), "serve", "--config", str(host.config)]]
        commands += [list(host.beside)] if host.beside else []
        with output.open("wb") as file:
            self.process, *self._beside = [
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=host.environ,
                    start_new_session=True,  # a Ctrl-C is for us; we end them in order
                )
                for command in commands
            ]

    async def ready(self, client: Client) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            check(self.process.poll() is None, f"mgpu serve ended: {self.process.returncode}")
            with contextlib.suppress(aiohttp.ClientConnectionError):
                await client.status()
                return
            await asyncio.sleep(0.05)
        raise CheckError(f"mgpu serve did not answer within {READY_S} s")

    def stop(self) -> Sequence[int]:
        """End it, then what runs beside it, by force if need be, and give the exit statuses."""
        return [_stopped(process) for process in (self.process, *self._beside)]

    def last_words(self) -> str:
        lines = self._output.read_text(errors="replace").splitlines()
        return "\n".join(lines[-OUTPUT_LINES:])


class Stage(NamedTuple):
    """What every scene plays on."""

    host: Host
    client: Client
    watch: Watch

    async def swaps(self) -> tuple[int, int]:
        """How many loads there were by the process table, and how many evictions by the books."""
        status = await self.client.status()
        loads = sum(len(self.watch.seen.get(name, ())) for name in status["consumers"])
        return loads, status["scheduler"]["evictions"]

    async def until(
        self, consumer: str, what: str, holds: Callable[[dict[str, Any]], object]
    ) -> bool:
        """Wait until it holds of the consumer's status; was it called down at work meanwhile?"""
        deadline = time.monotonic() + CALL_S
        down = False
        while time.monotonic() < deadline:
            row = (await self.client.status())["consumers"][consumer]
            if holds(row):
                return down
            down = down or bool(row["active"] and row["healthy"] is False)
            await asyncio.sleep(0.05)
        raise CheckError(f"not within {CALL_S} s: {what}")


Scene = Callable[[Stage], Awaitable[str]]


def free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


def mgpu(host: Host, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of `mgpu` to its end."""
    return subprocess.run(
        [_mgpu(), *words],
        capture_output=True,
        text=True,
        env=host.environ,
        timeout=COMMAND_S,
        check=False,
    )


@contextlib.contextmanager
def running_broker(host: Host, folder: Path) -> Iterator[tuple[Broker, Watch]]:
    """Start it, with what it says in `folder`; nothing lives on after the block."""
    watch = host.watch()
    watch.start()
    broker = Broker(host, folder / "broker.log")
    try:
        yield broker, watch
    finally:
        broker.stop()
        watch.stop()
        watch.kill_all()


def _stopped(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _mgpu() -> str:
    found = shutil.which("mgpu", path=str(Path(sys.executable).parent))
    check(found, f"no mgpu command beside {sys.executable}")
    return str(found)

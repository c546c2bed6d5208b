"""The processes of the demo, one by one: a card, and services on it.

async with demo_host(tmp_path) as host:
    mvoice = await host.start("mvoice")
    answer = await mvoice.ask("POST", "/tts", json={"text": "hello"})
    await host.until("free", lambda: host.held("mvoice") == 0)
"""

import asyncio
import contextlib
import json
import random
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from mgpu_http.demo.card import DESKTOP_MIB, TOTAL_MIB, CardConnection

LIMIT_S = 20.0
_POLL_S = 0.02
_DRAWS = 80


@dataclass
class Answer:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Service:
    process: asyncio.subprocess.Process
    url: str
    session: aiohttp.ClientSession

    async def ask(self, method: str, path: str, **request: Any) -> Answer:
        async with self.session.request(method, self.url + path, **request) as response:
            return Answer(response.status, response.headers, await response.read())

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), LIMIT_S)

    async def log(self) -> str:
        """Give what it wrote to stderr; it must have ended."""
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()


@dataclass
class DemoHost:
    directory: Path
    session: aiohttp.ClientSession
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)
    connections: list[CardConnection] = field(default_factory=list)

    async def start(self, name: str, seed: str | None = None) -> Service:
        """Start a service and wait until it listens, or has ended."""
        port = free_port()
        service = Service(
            await self.run("service", name, port, self.directory, seed or calm_seed(name)),
            f"http://127.0.0.1:{port}",
            self.session,
        )
        assert service.process.stdout is not None
        await asyncio.wait_for(service.process.stdout.readline(), LIMIT_S)
        return service

    async def run(self, module: str, *arguments: object) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"mgpu_http.demo.{module}",
            *map(str, arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self.processes.append(process)
        return process

    async def join(self, name: str = "somebody", mib: int = 0) -> CardConnection:
        """Be a process on the card."""
        connection = await CardConnection.open(self.directory, name)
        self.connections.append(connection)
        await connection.hold(mib)
        return connection

    @property
    def free_mib(self) -> int:
        free: int = self._card()["gpus"][0]["free_mib"]
        return free

    def held(self, name: str) -> int:
        """Give what the card shows as held by the processes of a name; 0 for nobody."""
        held: int = self._card()["held"].get(name, 0)
        return held

    def journal(self, name: str) -> list[tuple[str, int]]:
        """Give what happened to a service, with the MiB."""
        path = self.directory / "journal.jsonl"
        lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
        return [(line["what"], line["mib"]) for line in lines if line["service"] == name]

    async def until(self, what: str, holds: Callable[[], object]) -> None:
        try:
            async with asyncio.timeout(LIMIT_S):
                while not holds():  # noqa: ASYNC110 - other processes set no event here
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise AssertionError(f"never: {what}") from None

    def _card(self) -> Any:
        return json.loads((self.directory / "card.json").read_text())


@contextlib.asynccontextmanager
async def demo_host(
    directory: Path, total_mib: int = TOTAL_MIB, desktop_mib: int = DESKTOP_MIB
) -> AsyncIterator[DemoHost]:
    timeout = aiohttp.ClientTimeout(total=LIMIT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        host = DemoHost(directory, session)
        try:
            card = await host.run("card", directory, total_mib, desktop_mib)
            assert card.stdout is not None
            assert await asyncio.wait_for(card.stdout.readline(), LIMIT_S) == b"ready\n"
            yield host
        finally:
            for connection in host.connections:
                connection.close()
            for process in host.processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.communicate()


def calm_seed(name: str) -> str:
    """Give a seed with which nothing fails by chance, not soon."""
    return seed(name, lambda draws: min(draws) >= 0.05)


def seed(name: str, fits: Callable[[list[float]], bool]) -> str:
    """Give a seed whose first draws are as they should be."""
    for number in range(10_000):
        chance = random.Random(f"{number} {name}")
        if fits([chance.random() for _ in range(_DRAWS)]):
            return str(number)
    raise AssertionError("no such seed")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port

"""The whole broker for tests of its façade: in this process, or as `mgpu serve` in its own.

    async with facade(tmp_path, config(upstream)) as broker:
        answer = await broker.ask("POST", "/v1/tts", body=b"text")

A configuration is the mapping that the file holds; JSON is YAML.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgpu_core.planners import Planner
from mgpu_effects.broker import Broker
from mgpu_effects.clock import Clock
from mgpu_effects.config_file import load_settings
from mgpu_effects.settings import Settings
from mgpu_http.app import make_app
from mgpu_http.connection import RESET_ON_CLOSE
from mgpu_http.server import Fronts, Reloader, Server, bind
from mgpu_http.service_manager import ServiceManager
from tests.support.upstream import Upstream

LIMIT_S = 20


def config(upstream: Upstream | None, **changes: Any) -> dict[str, Any]:
    """One consumer `worker` does everything; `worker={...}` changes its keys, others the file's."""
    worker = {
        "url": upstream.url if upstream else "http://127.0.0.1:9",
        "health": {"path": "/health"},
        "paths": {kind: {"path": f"/do/{kind}"} for kind in ("tts", "stt", "llm")},
        "max_concurrency": 1,
        **changes.pop("worker", {}),
    }
    return {
        "listen": "127.0.0.1:0",
        "gpu": {"sampler": "none", "total_mib": 24000},
        "probe": {"interval_s": 0.5, "timeout_s": 2},
        "routing": {"tts": "worker", "stt": "worker", "llm": "worker"},
        "audio_proxy": "worker",
        "consumers": {"worker": worker},
        **changes,
    }


def write_config(directory: Path, content: Mapping[str, Any]) -> Path:
    """Write the file; its event log goes beside it."""
    path = directory / "consumers.yaml"
    path.write_text(json.dumps({"event_log": {"dir": str(directory / "log")}, **content}))
    return path


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes = b""
    complete: bool = True  # the body ended as its framing says

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The code of the broker's error, in whatever shape its path has it."""
        told = self.json()
        code: str = told["error"]["code"] if isinstance(told["error"], dict) else told["error"]
        return code


class Client:
    """A raw HTTP/1.1 connection: it sends what it is told, and can see a cut."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(
        self,
        method: str,
        target: str,
        *headers: str,
        body: bytes | None = None,
        host: str = "localhost",
        version: str = "1.1",
    ) -> None:
        lines = [f"{method} {target} HTTP/{version}", f"Host: {host}", *headers]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        await self.writer.drain()

    async def head(self, limit_s: float = LIMIT_S) -> Answer:
        async with asyncio.timeout(limit_s):
            text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = text.split("\r\n")[:-2]
        pairs = [line.split(": ", 1) for line in lines]
        return Answer(int(status_line.split(" ")[1]), {n.lower(): v for n, v in pairs})

    async def answer(self, *, to_head: bool = False, limit_s: float = LIMIT_S) -> Answer:
        """Read one answer, whole or cut off; it begins within a limit."""
        answer = await self.head(limit_s)
        return answer if to_head or answer.status in {204, 304} else await self.rest(answer)

    async def rest(self, answer: Answer) -> Answer:
        """Read what comes after a head that was read."""
        try:
            async with asyncio.timeout(LIMIT_S):
                await self._body(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            answer.complete = False
        return answer

    async def _body(self, answer: Answer) -> None:
        if "content-length" in answer.headers:
            answer.body = await self.reader.readexactly(int(answer.headers["content-length"]))
        elif answer.headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                answer.body += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            await self.reader.readexactly(2)
        else:
            answer.body = await self.reader.read()

    async def closed(self) -> bytes:
        """Wait until the other side closes or resets; give what came before that."""
        rest = b""
        async with asyncio.timeout(LIMIT_S):
            with contextlib.suppress(ConnectionError):
                while piece := await self.reader.read(65536):
                    rest += piece
        return rest

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        if not self.writer.is_closing():
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.writer.transport.abort()


@dataclass
class Address:
    """Something that speaks HTTP on a port of this host."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[Client]:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        try:
            yield client
        finally:
            client.reset()

    async def ask(
        self,
        method: str,
        target: str,
        *headers: str,
        body: bytes | None = None,
        host: str = "localhost",
    ) -> Answer:
        """Send one request over a connection of its own, and give its answer."""
        async with self.connect() as client:
            await client.send(method, target, *headers, body=body, host=host)
            return await client.answer(to_head=method == "HEAD")

    async def status(self, *headers: str) -> Any:
        return (await self.ask("GET", "/v1/status", *headers)).json()

    async def until(self, what: str, true: Any) -> Any:
        """Poll the status until `true(status)`, and give that status."""
        deadline = time.monotonic() + LIMIT_S
        while not true(status := await self.status()):
            assert time.monotonic() < deadline, f"never {what}: {status}"
            await asyncio.sleep(0.01)
        return status


@dataclass
class Facade(Address):
    broker: Broker = field(kw_only=True)
    server: Server = field(kw_only=True)
    path: Path = field(kw_only=True)


@contextlib.asynccontextmanager
async def facade(
    directory: Path,
    content: Mapping[str, Any],
    *,
    planner: Planner | None = None,
    alter: Callable[[Settings], Settings] = lambda settings: settings,
) -> AsyncIterator[Facade]:
    """Run broker and façade in this process; `alter` makes settings that no file could hold."""
    path = write_config(directory, content)
    clock = Clock()
    broker = Broker(alter(load_settings(path)), planner=planner, clock=clock)
    server = Server()
    fronts = Fronts(server)
    app = make_app(broker, clock, Reloader(broker, path, ServiceManager({}), fronts))
    [sock] = bind(broker.settings.listen)
    await fronts.begin(app, broker.settings)
    await broker.start()
    await server.listen(sock, app)
    try:
        yield Facade(sock.getsockname()[1], broker=broker, server=server, path=path)
    finally:
        server.stop_accepting()
        await broker.stop()
        await server.close()


@dataclass
class ServeProcess(Address):
    process: subprocess.Popen[str] = field(kw_only=True)
    path: Path = field(kw_only=True)
    lines: list[str] = field(default_factory=list)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def exit_code(self) -> int:
        return await asyncio.to_thread(self.process.wait, LIMIT_S)

    def said(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.lines)


# The same with everything that any library has to say.
TALKATIVE = (
    "import logging, sys; logging.basicConfig(level=logging.DEBUG);"
    " from mgpu_http.cli import main; sys.exit(main())"
)


@contextlib.contextmanager
def serve_process(
    directory: Path, content: Mapping[str, Any], *, talkative: bool = False
) -> Iterator[ServeProcess]:
    """Run `mgpu serve` as a user does."""
    path = write_config(directory, content)
    program = ("-c", TALKATIVE) if talkative else ("-m", "mgpu_http.cli")
    process = subprocess.Popen(
        [sys.executable, *program, "serve", "--config", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    served = ServeProcess(0, process=process, path=path)
    reader: threading.Thread | None = None
    try:
        for line in process.stderr:
            served.lines.append(line)
            if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                served.port = int(found[1])
                break
        assert served.port, served.lines
        reader = threading.Thread(target=served.lines.extend, args=(process.stderr,))
        reader.start()
        yield served
    finally:
        process.kill()
        process.wait(LIMIT_S)
        if reader is not None:
            reader.join(LIMIT_S)
        process.stderr.close()

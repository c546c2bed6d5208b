"""A real HTTP/1.1 server in a process of its own that behaves, or misbehaves, as it is told.

    with start_upstream() as upstream:
        upstream.url                      # http://127.0.0.1:PORT
        upstream.rule("/health", status=503)
        upstream.stats()                  # what it saw
        upstream.kill()                   # SIGKILL, as an upstream that crashes

Orders come as `key=value` pairs, the later ones win: a path's rule (`upstream.rule`), the query,
the header `X-Upstream: do=stream chunks=3`. `do` names one of:

echo (default)  JSON: method, target, headers as they came, body, and the body's size and sha256
text            the text `body=`, of the type `type=`
stream          `chunks=` pieces `data: N\n\n`, chunked, `gap=` seconds apart; with `die=1` the
                connection is cut after them, with `plain=1` it has no length and ends by closing
bytes           `size=` bytes of zeros with their Content-Length; only `send=` of them with `send`
never           reads the request and never answers
deaf            answers nothing and reads no further
drop            closes without an answer
garbage         something that is no HTTP
exit            the process ends

Beside these, for each: `status=`, `delay=` seconds before the head, `close=1`, `header=NAME:VALUE`.
"""

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

READY_S = 15
FOR_EVER_S = 3600  # a timer holds its task; one that waits for nothing may be collected
IDLE_S = 5.0  # uvicorn, llama-server and whisper close an idle connection after this long


# ---------------------------------------------------------------------------- the tests' side
@dataclass
class Upstream:
    """The handle of a running one."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def rule(self, path: str, **orders: object) -> None:
        """From now on requests to `path` are answered by these orders."""
        self._call(f"/_rule?{urlencode({'path': path, **orders})}")

    def stats(self) -> dict[str, object]:
        """`requests` and `targets` (by method and path, in order), `active`, `most_active`,
        `gone` (the caller closed before the end), `connections`.
        """
        stats: dict[str, object] = json.loads(self._call("/_stats"))
        return stats

    def count(self, path: str) -> int:
        """How many requests to this path came in."""
        targets = self.stats()["targets"]
        assert isinstance(targets, list)
        return sum(1 for target in targets if urlsplit(target.split(" ")[1]).path == path)

    def kill(self) -> None:
        """Let it die as if it had crashed."""
        self.process.kill()
        self.process.wait(READY_S)

    def _call(self, target: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=READY_S)
        try:
            connection.request("GET", target)
            return connection.getresponse().read()
        finally:
            connection.close()


@contextlib.contextmanager
def start_upstream(port: int = 0, idle_s: float = IDLE_S) -> Iterator[Upstream]:
    """Run one until the block ends; `port` 0 takes a free one."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__)), str(port), str(idle_s)], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the upstream ended with {process.wait(READY_S)}"
        yield Upstream(process, int(line))
    finally:
        process.kill()
        process.wait(READY_S)
        assert process.stdout is not None
        process.stdout.close()


async def eventually(
    true: Callable[[], object], within_s: float = 15, every_s: float = 0.01
) -> None:
    """Wait until it holds, and fail the test if it does not in time."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "did not become true in time"
        await asyncio.sleep(every_s)


# --------------------------------------------------------------------------- the server's side
@dataclass
class Request:
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    orders: dict[str, str]

    def number(self, name: str, default: float = 0) -> float:
        return float(self.orders.get(name, default))


@dataclass
class Server:
    idle_s: float
    rules: dict[str, dict[str, str]] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts["connections"] += 1
        with contextlib.suppress(OSError, EOFError, asyncio.TimeoutError):
            while await self.exchange(reader, writer):
                pass
        writer.close()

    async def exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Take one request and answer it; False: the connection is over."""
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), self.idle_s)
        line, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, target, _ = line.split(" ")
        headers = [(n, v.strip()) for n, v in (h.split(":", 1) for h in lines)]
        orders = self.orders(target, headers)
        if urlsplit(target).path.startswith("/_"):
            return await answer(
                writer, Request(method, target, headers, b"", {}), self.control(target)
            )
        self.targets.append(f"{method} {target}")
        if orders.get("do") == "deaf":
            await asyncio.sleep(FOR_EVER_S)
        body = await read_body(reader, headers)
        request = Request(method, target, headers, body, orders)
        self.counts["active"] += 1
        self.counts["most_active"] = max(self.counts["most_active"], self.counts["active"])
        try:
            return await self.watched(reader, writer, request)
        finally:
            self.counts["active"] -= 1

    async def watched(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request
    ) -> bool:
        """Answer, unless the caller closes before the answer is complete."""
        work = asyncio.create_task(DOES[request.orders.get("do", "echo")](writer, request))
        gone = asyncio.create_task(until_closed(reader))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            work.cancel()
            gone.cancel()
            raise
        if not work.done():
            self.counts["gone"] += 1
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            return False
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        return work.result()

    def orders(self, target: str, headers: list[tuple[str, str]]) -> dict[str, str]:
        url = urlsplit(target)
        orders = {**self.rules.get(url.path, {}), **dict(parse_qsl(url.query))}
        for name, value in headers:
            if name.lower() == "x-upstream":
                orders.update(pair.split("=", 1) for pair in value.split())
        return orders

    def control(self, target: str) -> bytes:
        url = urlsplit(target)
        if url.path == "/_rule":
            orders = dict(parse_qsl(url.query))
            self.rules[orders.pop("path")] = orders
        stats = {**self.counts, "requests": len(self.targets), "targets": self.targets}
        return json.dumps({"active": 0, "most_active": 0, "gone": 0, **stats}).encode()


async def until_closed(reader: asyncio.StreamReader) -> None:
    # A read would take the first byte of the next request.
    while not reader.at_eof() and reader.exception() is None:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def read_body(reader: asyncio.StreamReader, headers: list[tuple[str, str]]) -> bytes:
    fields = {name.lower(): value for name, value in headers}
    if "chunked" not in fields.get("transfer-encoding", ""):
        return await reader.readexactly(int(fields.get("content-length", "0")))
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return body


def head(request: Request, *fields: str) -> bytes:
    """Give the head of the answer, its own fields last."""
    lines = [f"HTTP/1.1 {int(request.number('status', 200))} Whatever", *fields]
    if "header" in request.orders:
        lines += [pair.replace(":", ": ", 1) for pair in request.orders["header"].split(",")]
    if "close" in request.orders:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def answer(
    writer: asyncio.StreamWriter, request: Request, body: bytes, kind: str = "application/json"
) -> bool:
    await asyncio.sleep(request.number("delay"))
    kind = request.orders.get("type", kind)
    writer.write(head(request, f"Content-Type: {kind}", f"Content-Length: {len(body)}"))
    if request.method != "HEAD" and request.number("status", 200) not in {204, 304}:
        writer.write(body)
    await writer.drain()
    return "close" not in request.orders


async def do_echo(writer: asyncio.StreamWriter, request: Request) -> bool:
    seen = {
        "method": request.method,
        "target": request.target,
        "headers": request.headers,
        "body": request.body[:65536].decode("latin-1"),
        "size": len(request.body),
        "sha256": hashlib.sha256(request.body).hexdigest(),
    }
    return await answer(writer, request, json.dumps(seen).encode())


async def do_text(writer: asyncio.StreamWriter, request: Request) -> bool:
    return await answer(writer, request, request.orders.get("body", "").encode(), "text/plain")


async def do_stream(writer: asyncio.StreamWriter, request: Request) -> bool:
    await asyncio.sleep(request.number("delay"))
    plain = "plain" in request.orders
    framing = () if plain else ("Transfer-Encoding: chunked",)
    writer.write(head(request, "Content-Type: text/event-stream", *framing))
    for number in range(int(request.number("chunks", 3))):
        if number:
            await asyncio.sleep(request.number("gap"))
        data = f"data: {number}\n\n".encode()
        writer.write(data if plain else b"%x\r\n%s\r\n" % (len(data), data))
        await writer.drain()
    if not plain and "die" not in request.orders:
        writer.write(b"0\r\nX-Trailer: ignored\r\n\r\n")
        await writer.drain()
        return True
    return False


async def do_bytes(writer: asyncio.StreamWriter, request: Request) -> bool:
    size = int(request.number("size"))
    rest = int(request.number("send", size))
    await asyncio.sleep(request.number("delay"))
    writer.write(head(request, f"Content-Length: {size}"))
    while rest > 0:
        writer.write(bytes(min(rest, 65536)))
        rest -= 65536
        await writer.drain()
    return "send" not in request.orders


async def do_never(_writer: asyncio.StreamWriter, _request: Request) -> bool:
    await asyncio.sleep(FOR_EVER_S)
    return False


async def do_drop(_writer: asyncio.StreamWriter, request: Request) -> bool:
    await asyncio.sleep(request.number("delay"))
    return False


async def do_garbage(writer: asyncio.StreamWriter, _request: Request) -> bool:
    writer.write(b"SSH-2.0-whatever\r\n\r\n")
    await writer.drain()
    return False


async def do_exit(_writer: asyncio.StreamWriter, request: Request) -> bool:
    await asyncio.sleep(request.number("delay"))
    os._exit(1)


DOES = {
    "echo": do_echo,
    "text": do_text,
    "stream": do_stream,
    "bytes": do_bytes,
    "never": do_never,
    "drop": do_drop,
    "garbage": do_garbage,
    "exit": do_exit,
}


async def main(port: int, idle_s: float) -> None:
    server = await asyncio.start_server(Server(idle_s).connection, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))

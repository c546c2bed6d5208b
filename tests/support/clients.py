"""The client's side of a job: records what it is told, and may take nothing."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import count

from mgpu_effects.errors import BrokerError
from mgpu_effects.jobs import Headers, Job

_numbers = count(1)


@dataclass
class BytesBody:
    data: bytes = b""
    closed: bool = False

    @property
    def size(self) -> int:
        return len(self.data)

    def content(self) -> bytes | AsyncIterator[bytes]:
        """As the real one: whole while it is short."""
        return self.data if self.size < 65536 else self._pieces()

    async def _pieces(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self.data), 65536):
            yield self.data[start : start + 65536]

    def close(self) -> None:
        self.closed = True


@dataclass
class Client:
    """Takes an answer; with `taking` cleared it takes nothing more."""

    status: int | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    finished: bool = False
    error: BrokerError | None = None
    taking: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.taking.set()

    async def start(self, status: int, headers: Headers) -> None:
        self.calls.append("start")
        await self.taking.wait()
        self.status, self.headers = status, list(headers)

    async def write(self, chunk: bytes) -> None:
        await self.taking.wait()
        self.chunks.append(chunk)

    async def finish(self) -> None:
        self.calls.append("finish")
        await self.taking.wait()
        self.finished = True

    async def fail(self, error: BrokerError) -> None:
        self.calls.append("fail")
        self.error = error

    def cut(self) -> None:
        self.calls.append("cut")

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def header(self, name: str) -> list[str]:
        """Give every value of a header."""
        wanted = name.lower().encode()
        return [value.decode() for key, value in self.headers if key.lower() == wanted]


def make_job(
    path: str = "/work",
    *,
    consumer: str = "a",
    method: str = "POST",
    body: bytes = b"",
    headers: Headers = (),
    **more: object,
) -> tuple[Job, Client]:
    client = Client()
    job = Job(
        request=f"r{next(_numbers)}",
        consumer=consumer,
        kind="tts",
        method=method,
        path=path,
        headers=list(headers),
        body=BytesBody(body),
        responder=client,
        **more,  # type: ignore[arg-type]
    )
    return job, client

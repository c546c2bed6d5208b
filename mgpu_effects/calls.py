"""One bounded HTTP call to a consumer: probes, load and unload steps, questions about jobs.

What goes wrong has a code of ours; nothing that an upstream says ever becomes part of one:

`refused`       nobody listens there
`unreachable`   no such host, no route, no TLS
`timeout`       no whole answer within the time limit
`disconnected`  the connection broke before the answer was complete
`bad_answer`    not HTTP
`http_STATUS`   an answer, but not one that counts
"""

import errno
from collections.abc import Collection, Mapping

import aiohttp
from multidict import CIMultiDict

from mgpu_effects.settings import ConsumerSettings

# The first that fits an exception names it.
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (TimeoutError, "timeout"),
    (aiohttp.ClientConnectorError, "unreachable"),
    (aiohttp.ClientConnectionError, "disconnected"),
    (aiohttp.ClientPayloadError, "disconnected"),
    (aiohttp.ClientError, "bad_answer"),
)
_HEALTH_BODY_BYTES = 64 * 1024


class CallError(Exception):
    """The call failed; `code` says how."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def control_session() -> aiohttp.ClientSession:
    """Make a session for these calls, apart from the one that carries the clients' work.

    Each call gets a connection of its own: a kept one may be closed by the server just when it is
    used again, and an unload must not fail for that. Hanging probes leave room for all others.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True, limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity"},
    )


async def call(
    session: aiohttp.ClientSession,
    consumer: ConsumerSettings,
    method: str,
    path: str,
    *,
    timeout_s: float,
    ok: Collection[int] = (),
    headers: Mapping[str, str] | None = None,
    body: bytes | str | None = None,
    read_bytes: int | None = None,
    keep: bool = False,
) -> bytes:
    """Call and read the answer's body, `read_bytes` of it at most (None: to its end).

    It is given where it is to be kept, else thrown away piece by piece.

    Raises CallError unless the status is one of `ok` (none given: any 2xx). Redirects are not
    followed: they would lead away from the configured service.
    """
    try:
        async with session.request(
            method,
            consumer.url.rstrip("/") + path,
            headers=_merged(consumer.headers, headers or {}),
            data=body,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        ) as answer:
            content = await _read(answer.content, read_bytes, keep=keep)
            status = answer.status
    except (aiohttp.ClientError, TimeoutError) as error:
        raise CallError(_code(error)) from error
    if status not in ok if ok else not 200 <= status < 300:
        raise CallError(f"http_{status}")
    return content


async def check_health(
    session: aiohttp.ClientSession,
    consumer: ConsumerSettings,
    timeout_s: float,
    *,
    read_bytes: int = _HEALTH_BODY_BYTES,
) -> bytes:
    """Ask the consumer's health path and give so much of its answer.

    Raises CallError unless it answers 2xx in time.
    """
    health = consumer.health
    return await call(
        session,
        consumer,
        health.method,
        health.path,
        timeout_s=timeout_s,
        read_bytes=read_bytes,
        keep=True,
    )


def _merged(base: Mapping[str, str], more: Mapping[str, str]) -> CIMultiDict[str]:
    headers = CIMultiDict(base)
    headers.update(more)
    return headers


async def _read(content: aiohttp.StreamReader, limit_bytes: int | None, *, keep: bool) -> bytes:
    read, kept = 0, bytearray()
    async for chunk in content.iter_any():
        read += len(chunk)
        if keep:
            kept += chunk
        if limit_bytes is not None and read >= limit_bytes:
            break
    return bytes(kept)


def _code(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and error.errno == errno.ECONNREFUSED:
        return "refused"
    return next(code for kind, code in _CODES if isinstance(error, kind))

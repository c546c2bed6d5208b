"""The service behind the proxies: answers at once, and costs as little as Python lets it.

`python -m mgpu_http.bench.upstream` prints its port. `/stream` answers in 1,000 chunks, `/download`
with `BIG_BYTES`; anything else takes its body in and gets a short constant answer.
"""

import asyncio
import re

ANSWER = b'{"text": "An answer about as long as those of the voice services that mgpu serves."}'
CHUNKS = 1000
CHUNK = b'data: {"choices": [{"delta": {"content": "token"}}]}\n\n'
BIG_BYTES = 1 << 30
PIECE = bytes(1 << 18)

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
SHORT = _HEAD + b"Content-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
STREAM_HEAD += b"Transfer-Encoding: chunked\r\n\r\n"


async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1]
            length = LENGTH.search(head)
            await _take_in(reader, int(length[1]) if length else 0)
            if path == b"/stream":
                await _stream(writer)
            elif path == b"/download":
                await _download(writer)
            else:
                writer.write(SHORT)
            await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def _take_in(reader: asyncio.StreamReader, left: int) -> None:
    while left:
        left -= len(await reader.readexactly(min(left, len(PIECE))))


async def _stream(writer: asyncio.StreamWriter) -> None:
    """Send each chunk by itself, as a service does whose tokens come one after the other."""
    writer.write(STREAM_HEAD)
    for _ in range(CHUNKS):
        writer.write(b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK))
        await asyncio.sleep(0)
    writer.write(b"0\r\n\r\n")


async def _download(writer: asyncio.StreamWriter) -> None:
    writer.write(_HEAD + b"Content-Length: %d\r\n\r\n" % BIG_BYTES)
    for _ in range(BIG_BYTES // len(PIECE)):
        writer.write(PIECE)
        await writer.drain()


async def main() -> None:
    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201 - whoever started it waits
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())

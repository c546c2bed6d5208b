"""The spooled body, and the one reader of what a client sends."""

import asyncio
from typing import Any

import pytest

from mgpu_effects.errors import BrokerError
from mgpu_http.body import MEMORY_BYTES, PIECE_BYTES, ClientGoneError, Intake, SpooledBody


@pytest.mark.parametrize(
    "size", [0, 1, PIECE_BYTES, MEMORY_BYTES, MEMORY_BYTES + 1, 3 * MEMORY_BYTES + 7]
)
async def test_a_body_is_given_whole_each_time_it_is_asked_for(size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    body = SpooledBody()
    for start in range(0, size, 10_000):
        await body.append(data[start : start + 10_000])
    assert body.size == size
    for _ in range(2):
        assert await whole(body) == data
    body.close()
    body.close()


async def whole(body: SpooledBody) -> bytes:
    content = body.content()
    if isinstance(content, bytes):
        assert body.size <= MEMORY_BYTES
        return content
    return b"".join([piece async for piece in content])


class Sender:
    """A server's side of `receive`, with its queue of ten."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue(10)

    async def piece(self, data: bytes, *, more: bool = True) -> None:
        message = {"type": "http.request", "body": data, "more_body": more}
        await asyncio.wait_for(self.queue.put(message), 5)

    async def leave(self) -> None:
        await asyncio.wait_for(self.queue.put({"type": "http.disconnect"}), 5)


async def test_the_reader_goes_on_to_the_disconnect_after_the_body() -> None:
    sender = Sender()
    intake = Intake(sender.queue.get)
    await sender.piece(b"ab")
    await sender.piece(b"c", more=False)
    body = await intake.take(10, stall_s=5)
    assert body.content() == b"abc"
    assert not intake.gone.is_set()
    await sender.leave()
    await asyncio.wait_for(intake.until_gone(), 5)
    assert intake.gone.is_set()


async def test_a_refused_body_is_read_on_and_thrown_away() -> None:
    sender = Sender()
    intake = Intake(sender.queue.get)
    await sender.piece(b"abc")
    with pytest.raises(BrokerError) as refused:
        await intake.take(2, stall_s=5)
    assert refused.value.code == "body_too_large"
    for _ in range(30):  # three times what the server's queue holds
        await sender.piece(b"abc")
    assert not intake.over.is_set()
    await sender.piece(b"", more=False)
    await asyncio.wait_for(intake.over.wait(), 5)
    await sender.leave()
    await asyncio.wait_for(intake.gone.wait(), 5)


async def test_a_client_that_leaves_in_mid_body() -> None:
    sender = Sender()
    intake = Intake(sender.queue.get)
    await sender.piece(b"abc")
    await sender.leave()
    with pytest.raises(ClientGoneError):
        await intake.take(10, stall_s=5)
    assert intake.gone.is_set()

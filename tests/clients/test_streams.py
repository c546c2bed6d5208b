"""Streams through the broker as the libraries see them: piece by piece, broken off, and waiting."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import pytest_asyncio

from tests.clients.behind import WAYS, Behind, behind
from tests.clients.calls import (
    CALLS,
    CHAT,
    MESSAGE,
    MODEL,
    STREAMS,
    TALKS,
    outcome,
    read_async,
)
from tests.support.apis import Reply, refusal, spoken, whole
from tests.support.upstream import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALL = [(library, name) for library, names in STREAMS.items() for name in names]
# Those of which each piece is one item for who reads them.
ITEM_BY_ITEM = [
    ("openai", "completion streamed"),
    ("openai", "response streamed"),
    ("openai", "transcription streamed"),
    ("ollama", "chat streamed"),
    ("ollama", "pull streamed"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: Any) -> AsyncIterator[Behind]:
    async with behind(tmp_path_factory.mktemp("broker"), max_concurrency=1) as it:
        yield it


@pytest.fixture
def here(shared: Behind) -> Behind:
    shared.service.forget()
    return shared


# ---------------------------------------------------------------------------------- piece by piece


@pytest.mark.parametrize("awaited", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("library", "name"), ALL)
async def test_the_first_is_there_before_the_second_is_sent(
    here: Behind, library: str, name: str, awaited: bool
) -> None:
    turns = here.service.turns = asyncio.Semaphore(0)

    def on_item() -> None:
        here.service.turns = None
        turns.release()

    client = here.client(library, WAYS[library][1], awaited=awaited)
    told = await outcome(CALLS[library][name], client, on_item)
    assert here.service.turns is None
    assert len(told) > 1


@pytest.mark.parametrize(("library", "name"), ITEM_BY_ITEM)
async def test_each_is_there_before_the_next_is_sent(here: Behind, library: str, name: str) -> None:
    here.service.turns = asyncio.Semaphore(0)
    client = here.client(library, WAYS[library][1])
    told = await outcome(CALLS[library][name], client, here.service.turns.release)
    assert len(told) > 3


async def test_a_sound_can_be_heard_while_it_is_made(here: Behind) -> None:
    turns = here.service.turns = asyncio.Semaphore(0)
    asked = {"model": MODEL, "voice": "alloy", "input": "something to be said"}
    speech = here.client("openai", "model").audio.speech
    sound = b""
    async with speech.with_streaming_response.create(**asked) as answer:
        async for piece in answer.iter_bytes():
            sound += piece
            turns.release()
    assert sound == spoken("something to be said")


# ------------------------------------------------------------------------------------- broken off


async def closed(client: Any, library: str, begun: Callable[[], Any]) -> None:
    stream = await CALLS[library][TALKS[library]](client)
    async for _ in stream:
        begun()
        break
    await (stream.aclose() if library == "ollama" else stream.close())


async def cancelled(client: Any, library: str, begun: Callable[[], Any]) -> None:
    first = asyncio.Event()

    def on_item() -> None:
        begun()
        first.set()

    task = asyncio.create_task(outcome(CALLS[library][TALKS[library]], client, on_item))
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def closed_by_a_thread(client: Any, library: str, begun: Callable[[], Any]) -> None:
    def ask() -> None:
        stream = CALLS[library][TALKS[library]](client)
        next(iter(stream))
        begun()
        stream.close()

    await asyncio.to_thread(ask)


async def timed_out(client: Any, library: str, begun: Callable[[], Any]) -> None:
    told = await outcome(CALLS[library][TALKS[library]], client, begun)
    assert "Timeout" in told["raised"].__name__


@pytest.mark.parametrize("break_off", [closed, cancelled, closed_by_a_thread, timed_out])
@pytest.mark.parametrize("library", TALKS)
async def test_who_breaks_off_ends_the_work(here: Behind, library: str, break_off: Any) -> None:
    here.service.turns = asyncio.Semaphore(0)  # it never comes to the second piece
    begun = []
    options = {"timeout": 0.5} if break_off is timed_out else {}
    awaited = break_off is not closed_by_a_thread
    client = here.client(library, WAYS[library][1], awaited=awaited, **options)
    await break_off(client, library, lambda: begun.append(1))
    assert begun
    await eventually(lambda: here.service.left == 1)
    await here.at_rest()
    assert len(here.service.seen) == 1


async def test_who_breaks_off_a_call_without_a_stream_ends_it_too(here: Behind) -> None:
    with here.service.holding():
        client = here.client("openai", "model")
        task = asyncio.create_task(client.chat.completions.create(**CHAT))
        await eventually(lambda: here.service.working == 1)
        task.cancel()
        await eventually(lambda: here.service.left == 1)
        await here.at_rest()


async def test_where_the_work_is_to_be_done_whole_it_keeps_its_turn(tmp_path: Path) -> None:
    async with behind(tmp_path, on_client_gone="drain") as here:
        turns = here.service.turns = asyncio.Semaphore(0)
        await closed(here.client("openai", "model"), "openai", lambda: None)
        row = (await here.broker.status())["consumers"]["any"]
        assert (row["active"], here.service.working) == (1, 1)
        here.service.turns = None
        turns.release()
        await here.at_rest()
        assert here.service.left == 0


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
@pytest.mark.parametrize("library", TALKS)
async def test_who_gives_up_waiting_never_reaches_the_service(
    here: Behind, library: str, how: str
) -> None:
    name, way = TALKS[library], WAYS[library][1]
    with here.service.holding() as go:
        first = asyncio.create_task(outcome(CALLS[library][name], here.client(library, way)))
        await eventually(lambda: here.service.working == 1)
        options = {"timeout": 0.5} if how == "timed out" else {}
        call = outcome(CALLS[library][name], here.client(library, way, **options))
        second = asyncio.create_task(call)
        await here.broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)
        if how == "cancelled":
            second.cancel()
        else:
            assert "Timeout" in (await second)["raised"].__name__
        await here.broker.until("gone", lambda s: s["scheduler"]["queue_depth"] == 0)
        go.set()
        await first
    await here.at_rest()
    assert len(here.service.seen) == 1


# ------------------------------------------------------------------------ comments while it waits


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def talkative(tmp_path_factory: Any) -> AsyncIterator[Behind]:
    directory = tmp_path_factory.mktemp("talkative")
    async with behind(directory, max_concurrency=1, wait_comments_s=0.05) as it:
        yield it


async def waits_behind_another(here: Behind, library: str, call: Any) -> tuple[Any, Any]:
    """Give a stream that has begun by comments alone, and the call for which it waits."""
    busy = here.client("openai", "model").chat.completions.create(**CHAT)
    first = asyncio.create_task(busy)
    await eventually(lambda: here.service.working == 1)
    stream = await call(here.client(library, "model"))
    assert "x-mgpu-queue-ms" not in stream.response.headers  # too late for it
    assert not first.done()
    return stream, first


COMMENTED = [
    ("openai", "chat streamed"),
    ("openai", "response streamed"),
    ("openai", "completion streamed"),
    ("anthropic", "message streamed"),
]


@pytest.mark.parametrize(("library", "name"), COMMENTED)
async def test_comments_are_nothing_to_a_library(
    talkative: Behind, library: str, name: str
) -> None:
    call = CALLS[library][name]
    directly = await outcome(call, talkative.client(library, "direct"))
    with talkative.service.holding() as go:
        stream, first = await waits_behind_another(talkative, library, call)
        go.set()
        assert await read_async(stream, lambda: None) == directly
        await first


def hurried(library: str, client: Any) -> Any:
    headers = {"X-Mgpu-Max-Wait": "0.5"}
    if library == "openai":
        return client.chat.completions.create(**CHAT, stream=True, extra_headers=headers)
    return client.messages.create(**MESSAGE, stream=True, extra_headers=headers)


@pytest.mark.parametrize(
    ("library", "raised"), [("openai", openai.APIError), ("anthropic", anthropic.APIStatusError)]
)
async def test_an_error_after_comments_is_raised(
    talkative: Behind, library: str, raised: type[Any]
) -> None:
    with talkative.service.holding() as go:
        stream, first = await waits_behind_another(
            talkative, library, lambda client: hurried(library, client)
        )
        with pytest.raises(raised) as caught:
            await read_async(stream, lambda: None)
        go.set()
        await first
    error = caught.value.body if library == "openai" else caught.value.body["error"]
    assert (error["code"], error["status"], error["retryable"]) == ("queue_timeout", 503, True)
    assert "waited" in str(caught.value)


REFUSALS = {
    "OpenAI's": refusal(400, "'messages' is required"),
    "Anthropic's": whole(
        {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}, 400
    ),
    "text": Reply([b"Internal Server Error"], "text/plain", 500),
}


@pytest.mark.parametrize("refused", REFUSALS)
@pytest.mark.parametrize(
    ("library", "raised"), [("openai", openai.APIError), ("anthropic", anthropic.APIStatusError)]
)
async def test_a_refusal_of_the_service_after_comments_is_raised(
    talkative: Behind, library: str, raised: type[Any], refused: str
) -> None:
    answer = REFUSALS[refused]
    with talkative.service.holding() as go:
        stream, first = await waits_behind_another(
            talkative, library, CALLS[library][TALKS[library]]
        )
        talkative.service.instead = [whole({"choices": []}), answer]
        go.set()
        with pytest.raises(raised) as caught:
            await read_async(stream, lambda: None)
        await first
    error = caught.value.body if library == "openai" else caught.value.body["error"]
    assert error["status"] == answer.status
    assert error["message"] in answer.pieces[0].decode()

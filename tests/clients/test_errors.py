"""Errors as the libraries raise them: the service's own unchanged, the broker's by their kind."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import ollama
import openai
import pytest
import pytest_asyncio
from attrs import frozen

from mgpu_http.auth import hash_key
from tests.clients.behind import WAYS, Behind, behind
from tests.clients.calls import CALLS, CHAT, MESSAGE, TALKS, outcome
from tests.support.apis import OLLAMA_MODEL, Reply, apis, refusal, whole
from tests.support.dev_http import free_port
from tests.support.upstream import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIBRARIES: Mapping[str, Any] = {"openai": openai, "anthropic": anthropic}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: Any) -> AsyncIterator[Behind]:
    keys = {
        "timeout_s": {"connect": 0.3, "first_byte": 0.3},
        "max_concurrency": 1,
        "max_pending": 2,
    }
    async with behind(tmp_path_factory.mktemp("broker"), **keys) as it:
        yield it


@pytest.fixture
def here(shared: Behind) -> Behind:
    shared.service.forget()
    return shared


# -------------------------------------------------------------------------------- of the service


ERROR = {"type": "invalid_request_error", "message": "max_tokens: too many"}
DETAIL = {"detail": [{"type": "missing", "loc": ["body", "file"], "msg": "Field required"}]}
OF_THE_SERVICE: Mapping[str, Reply] = {
    "loading": refusal(503, "Loading model", "unavailable_error"),
    "not supported": refusal(501, "This server does not support embeddings", "not_supported_error"),
    "its own key": refusal(401, "Invalid API Key", "authentication_error"),
    "no such path": refusal(404, "File Not Found", "not_found_error"),
    "Anthropic's": whole({"type": "error", "error": ERROR}, 400),
    "Ollama's": whole({"error": "model requires more system memory"}, 500),
    "details": whole(DETAIL, 422),
    "text": Reply([b"Internal Server Error"], "text/plain", 500),
    "too many": refusal(429, "slow down", "rate_limit_error"),
    "nothing": Reply([b""], "text/plain", 502),
}


@pytest.mark.parametrize("kind", OF_THE_SERVICE)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("library", TALKS)
async def test_an_error_of_the_service_is_its_own(
    here: Behind, library: str, streamed: bool, kind: str
) -> None:
    name = TALKS[library] if streamed else TALKS[library].removesuffix(" streamed")
    told = {}
    for way in WAYS[library]:
        here.service.instead = [OF_THE_SERVICE[kind]]
        told[way] = await outcome(CALLS[library][name], here.client(library, way))
    assert told["direct"]["raised"]
    for way in WAYS[library]:
        assert told[way] == told["direct"], way


BROKEN = {
    "openai": openai.APIConnectionError,
    "anthropic": httpx2.TransportError,
    "ollama": httpx.TransportError,
}


@pytest.mark.parametrize("library", TALKS)
async def test_a_stream_that_breaks_is_never_taken_for_whole(here: Behind, library: str) -> None:
    here.service.cut_after = 2
    for way in WAYS[library]:
        told = await outcome(CALLS[library][TALKS[library]], here.client(library, way))
        # Of the two that pass these on as they are, one is told of an end, the other of a reset.
        assert issubclass(told["raised"], BROKEN[library]), way


@pytest.mark.parametrize("library", LIBRARIES)
async def test_an_error_of_the_service_is_tried_again_as_often_as_without_us(
    here: Behind, library: str
) -> None:
    tries = {}
    for way in ("direct", "model"):
        here.service.forget()
        here.service.instead = [OF_THE_SERVICE["text"]] * 2
        client = here.client(library, way, retries=1)
        told = await outcome(CALLS[library][TALKS[library]], client)
        tries[way] = (told["status_code"], len(here.service.seen))
    assert tries["model"] == tries["direct"] == (500, 2)


# --------------------------------------------------------------------------------- of the broker


@contextlib.asynccontextmanager
async def _unknown_model(_here: Behind) -> AsyncIterator[dict[str, Any]]:
    yield {"model": "gpt-9"}


@contextlib.asynccontextmanager
async def _nonsense(_here: Behind) -> AsyncIterator[dict[str, Any]]:
    yield {"extra_headers": {"X-Mgpu-Priority": "first"}}


@contextlib.asynccontextmanager
async def _foreign_page(_here: Behind) -> AsyncIterator[dict[str, Any]]:
    yield {"extra_headers": {"Origin": "http://evil.example"}}


@contextlib.asynccontextmanager
async def _too_slow(here: Behind) -> AsyncIterator[dict[str, Any]]:
    with here.service.holding():
        yield {}


@contextlib.asynccontextmanager
async def _ended_by_an_operator(here: Behind) -> AsyncIterator[dict[str, Any]]:
    async def end() -> None:
        status = await here.broker.until("there", lambda s: s["requests"])
        await here.broker.ask("DELETE", f"/v1/requests/{status['requests'][0]['id']}")

    with here.service.holding():
        ending = asyncio.create_task(end())
        yield {}
        await ending


@contextlib.asynccontextmanager
async def _broken_off(here: Behind) -> AsyncIterator[dict[str, Any]]:
    here.service.instead = [None] * 3
    yield {}


@contextlib.asynccontextmanager
async def _draining(here: Behind) -> AsyncIterator[dict[str, Any]]:
    await here.broker.ask("POST", "/v1/drain")
    yield {}
    await here.broker.ask("POST", "/v1/resume")


@contextlib.asynccontextmanager
async def _busy(here: Behind) -> AsyncIterator[asyncio.Event]:
    """Keep the service at work until the event is set."""
    with here.service.holding() as go:
        client = here.client("openai", "front")
        first = asyncio.create_task(outcome(CALLS["openai"]["embeddings"], client))
        await eventually(lambda: here.service.working == 1)
        yield go
        go.set()
        await first


@contextlib.asynccontextmanager
async def _impatient(here: Behind) -> AsyncIterator[dict[str, Any]]:
    async with _busy(here):
        yield {"extra_headers": {"X-Mgpu-Max-Wait": "0"}}


@contextlib.asynccontextmanager
async def _full(here: Behind) -> AsyncIterator[dict[str, Any]]:
    client = here.client("openai", "front")
    async with _busy(here):
        second = asyncio.create_task(outcome(CALLS["openai"]["embeddings"], client))
        await here.broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)
        yield {}
    await second


@frozen
class Error:
    """One of the broker's: the exception's name in OpenAI's and in Anthropic's library.

    `tries`: how often it reaches the service where the library may try it three times.
    """

    code: str
    arranged: Any  # a context that gives what the call says besides
    openai: str
    anthropic: str
    tries: int = 0
    again: bool = False


REFUSED, LATER = "InternalServerError", "ServiceUnavailableError"
OF_THE_BROKER = [
    Error("no_consumer", _unknown_model, "NotFoundError", "NotFoundError"),
    Error("bad_request", _nonsense, "BadRequestError", "BadRequestError"),
    Error("forbidden", _foreign_page, "PermissionDeniedError", "PermissionDeniedError"),
    Error("upstream_timeout", _too_slow, REFUSED, "GatewayTimeoutError", tries=1),
    Error("cancelled", _ended_by_an_operator, REFUSED, LATER, tries=1),
    Error("upstream_disconnected", _broken_off, REFUSED, REFUSED, tries=3, again=True),
    Error("shutting_down", _draining, REFUSED, LATER, again=True),
    Error("queue_timeout", _impatient, REFUSED, LATER, again=True),
    Error("overloaded", _full, "RateLimitError", "RateLimitError", again=True),
]


def talk(library: str, client: Any, more: Mapping[str, Any]) -> Any:
    if library == "openai":
        return client.chat.completions.create(**{**CHAT, **more})
    return client.messages.create(**{**MESSAGE, **more})


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("wanted", OF_THE_BROKER, ids=[each.code for each in OF_THE_BROKER])
async def test_an_error_of_the_broker_is_one_of_the_library(
    here: Behind, library: str, wanted: Error
) -> None:
    raised = getattr(LIBRARIES[library], getattr(wanted, library))
    # Where trying again would only take time, it may not.
    client = here.client(library, "model", retries=0 if wanted.again and not wanted.tries else 2)
    async with wanted.arranged(here) as more:
        before = len(here.service.seen)
        with pytest.raises(raised) as caught:
            await talk(library, client, more)
        assert len(here.service.seen) - before == wanted.tries
    error = caught.value.body if library == "openai" else caught.value.body["error"]
    assert (error["code"], error["retryable"]) == (wanted.code, wanted.again)
    assert error["message"] in str(caught.value)
    if library == "openai":
        assert caught.value.code == wanted.code
    await here.at_rest()


@pytest.mark.parametrize("library", LIBRARIES)
async def test_one_that_breaks_off_is_tried_again_and_answers(here: Behind, library: str) -> None:
    here.service.instead = [None]
    told = await outcome(CALLS[library][TALKS[library]], here.client(library, "model", retries=2))
    assert isinstance(told, list)
    assert len(here.service.seen) == 2


async def refused(here: Behind, code: str) -> float:
    """Count the requests that were refused with this code."""
    metrics = (await here.broker.ask("GET", "/metrics")).body.decode()
    found = re.findall(rf'mgpu_requests_total{{.*outcome="{code}"}} (\S+)', metrics)
    return sum(float(each) for each in found)


async def until_refused(here: Behind, code: str, times: float) -> None:
    for _ in range(1_000):
        if await refused(here, code) >= times:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"nobody was refused: {code}")


@pytest.mark.parametrize("library", LIBRARIES)
async def test_one_that_is_full_is_tried_again_when_it_says(here: Behind, library: str) -> None:
    before = await refused(here, "overloaded")
    client = here.client(library, "model", retries=2)
    async with _full(here):
        call = asyncio.create_task(outcome(CALLS[library][TALKS[library]], client))
        await until_refused(here, "overloaded", before + 1)
        here.service.hold.set()
        assert isinstance(await call, list)


@pytest.mark.parametrize("library", LIBRARIES)
async def test_one_that_is_down_is_tried_again_until_it_is_up(tmp_path: Path, library: str) -> None:
    port = free_port()
    async with behind(tmp_path, url=f"http://127.0.0.1:{port}") as here:
        talk_ = CALLS[library][TALKS[library]]
        told = await outcome(talk_, here.client(library, "model"))
        assert told["status_code"] == 503
        assert "consumer_unreachable" in str(told["body"])
        again = outcome(talk_, here.client(library, "model", retries=2))
        call = asyncio.create_task(again)
        await until_refused(here, "consumer_unreachable", 2)
        async with apis(port=port):
            assert isinstance(await call, list)


@pytest.mark.parametrize(("library", "member"), [("openai", "user"), ("anthropic", "system")])
async def test_a_body_may_be_too_large(tmp_path: Path, library: str, member: str) -> None:
    async with behind(tmp_path, max_body_mib=1) as here:
        client = here.client(library, "model", retries=2)
        with pytest.raises(LIBRARIES[library].APIStatusError) as caught:
            await talk(library, client, {member: "x" * (2 << 20)})
        assert caught.value.status_code == 413
        assert "body_too_large" in str(caught.value.body)


# ----------------------------------------------------------------------------------- and Ollama's


async def test_errors_of_the_broker_as_ollamas(here: Behind) -> None:
    way = WAYS["ollama"][1]
    hurried = here.client("ollama", way, headers={"X-Mgpu-Max-Wait": "0"})
    client = here.client("ollama", way)
    with pytest.raises(ollama.ResponseError, match="ollama has no model none; it has") as caught:
        await client.chat(model="none", messages=[])
    assert caught.value.status_code == 404
    with here.service.holding():
        first = asyncio.create_task(client.generate(model=OLLAMA_MODEL, prompt="hi"))
        await eventually(lambda: here.service.working == 1)
        for call in ("chat", "chat streamed", "embed"):
            told = await outcome(CALLS["ollama"][call], hurried)
            assert (told["raised"], told["status_code"]) == (ollama.ResponseError, 503)
            assert "waited" in told["error"]
        first.cancel()
    await here.at_rest()


# ------------------------------------------------------------------------------------------ keys


KEYS = {"keys": [{"name": "me", "hash": hash_key("secret")}]}


async def test_a_key_of_the_broker_is_a_librarys_key(tmp_path: Path) -> None:
    async with behind(tmp_path, auth=KEYS) as here:
        for library, module in LIBRARIES.items():
            for way in WAYS[library][1:]:
                with pytest.raises(module.AuthenticationError) as caught:
                    await talk(library, here.client(library, way), {})
                error = caught.value.body if library == "openai" else caught.value.body["error"]
                assert error["code"] == "unauthorized", way
            client = here.client(library, "model", api_key="secret")
            told = await outcome(CALLS[library][TALKS[library]], client)
            assert isinstance(told, list)
        way = WAYS["ollama"][1]
        told = await outcome(CALLS["ollama"]["list"], here.client("ollama", way))
        assert (told["raised"], told["status_code"]) == (ollama.ResponseError, 401)

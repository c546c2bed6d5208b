"""A job that goes on after its answer is served until the service says that it is over."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from mgpu_effects.following import find_job
from mgpu_effects.gpu import SIMULATED_GPU
from mgpu_effects.jobs import MAX_COPY_BYTES, AnswerCopy
from mgpu_effects.settings import ConsumerSettings, JobSettings, Question, Step
from mgpu_effects.steps import with_value
from tests.support.brokers import lines, logged
from tests.support.clients import make_job
from tests.support.comfyui import ComfyUI, comfyui
from tests.support.facade import Answer, Facade, facade
from tests.support.gpu_service import NO_PROMPT, Card
from tests.support.upstream import Upstream, eventually

PROMPT = {"prompt": {"1": {"class_type": "SaveImage"}}}
FAILS = {"path": "/history/{id}", "when": "values(@)[0].status.status_str == 'error'"}


@pytest.fixture
async def service() -> AsyncIterator[ComfyUI]:
    async with comfyui() as service:
        yield service


@asynccontextmanager
async def broker_before(
    directory: Path,
    service: ComfyUI,
    *,
    others: dict[str, Any] | None = None,
    gpu: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    **changes: Any,
) -> AsyncIterator[Facade]:
    content = {
        "listen": "127.0.0.1:0",
        "gpu": {"sampler": "none", "total_mib": 16_000, **(gpu or {})},
        "probe": {"interval_s": 0.2},
        "scheduler": {"settle_timeout_s": 1, **(scheduler or {})},
        "routing": {"image": "comfyui", **dict.fromkeys(["tts"] if others else [], "voice")},
        "audio_proxy": "comfyui",
        "consumers": {"comfyui": service.settings(**changes), **(others or {})},
    }
    async with facade(directory, content) as broker:
        yield broker


async def paint(broker: Facade, **more: Any) -> Answer:
    return await broker.ask("POST", "/v1/image", body=json.dumps(PROMPT | more).encode())


async def followed(broker: Facade) -> str:
    """Wait until a request is served whose client has its answer, and give its id."""
    status = await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
    served = [row["id"] for row in status["requests"] if row["state"] == "serving"]
    return str(served[0])


async def asked_twice(service: ComfyUI) -> None:
    """Wait for a round of questions that began after this call."""
    before = service.times("GET /queue")
    await eventually(lambda: service.times("GET /queue") >= before + 2)


async def outcomes(broker: Facade, directory: Path, count: int) -> list[str]:
    """Wait until so many are over, and nobody is served any more."""
    await broker.until("over", lambda s: s["scheduler"]["in_flight"] == 0)
    await eventually(lambda: len(logged(directory / "log", "ServeDone")) == count)
    return [event["outcome"] for event in logged(directory / "log", "ServeDone")]


# ------------------------------------------------------------------------------ until it is over


async def test_the_client_is_answered_at_once_and_the_next_wait_for_the_job(
    tmp_path: Path, service: ComfyUI, upstream: Upstream
) -> None:
    voice = {"url": upstream.url, "paths": {"tts": {"path": "/say"}}}
    async with broker_before(tmp_path, service, others={"voice": voice}) as broker:
        first = await paint(broker)
        assert (first.status, first.complete) == (200, True)
        assert first.json()["prompt_id"] == service.running[0]
        await followed(broker)

        second = asyncio.create_task(paint(broker))
        spoken = asyncio.create_task(broker.ask("POST", "/v1/tts", body=b"hello"))
        await broker.until("both wait", lambda s: s["scheduler"]["queue_depth"] == 2)
        await asked_twice(service)
        assert (service.times("POST /prompt"), upstream.count("/say")) == (1, 0)
        assert not second.done()
        assert not spoken.done()

        service.end(service.running[0])
        assert (await second).status == 200
        await eventually(lambda: len(service.running) == 1)
        service.end(service.running[0])
        assert (await spoken).status == 200
        assert await outcomes(broker, tmp_path, 3) == ["ok"] * 3
    assert service.headers["Accept-Encoding"] == "identity"


async def test_the_connection_of_an_answered_client_is_free_for_more(
    tmp_path: Path, service: ComfyUI
) -> None:
    async with broker_before(tmp_path, service) as broker, broker.connect() as client:
        await client.send("POST", "/v1/image", body=json.dumps(PROMPT).encode())
        assert (await client.answer()).status == 200
        await client.send("GET", "/v1/status")
        assert (await client.answer()).json()["scheduler"]["in_flight"] == 1
        client.close()  # nothing that its client does has a say any more
        await asked_twice(service)
        assert len(service.running) == 1
        service.end(service.running[0])
        assert await outcomes(broker, tmp_path, 1) == ["ok"]
    assert "POST /interrupt" not in service.calls


async def test_a_job_may_be_over_before_it_is_asked_for(tmp_path: Path, service: ComfyUI) -> None:
    async with broker_before(tmp_path, service) as broker:
        service.hold = asyncio.Event()
        request = asyncio.create_task(paint(broker))
        await eventually(lambda: service.running)
        service.end(service.running[0])  # all of it was cached
        service.hold.set()
        assert (await request).status == 200
        assert await outcomes(broker, tmp_path, 1) == ["ok"]
    assert service.times("GET /queue") == 1


async def test_memory_stays_promised_to_the_job_until_it_took_it(
    tmp_path: Path, service: ComfyUI, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two may work at once here, but the card has no room for both."""
    card = Card(tmp_path)
    card.create(16_000)
    monkeypatch.setenv(SIMULATED_GPU, str(card.path))
    voice = {
        "url": upstream.url,
        "paths": {"tts": {"path": "/say"}},
        "vram_resident_mib": 6_000,
        "load": {"path": "/load"},
        "unload": {"path": "/unload"},
    }
    gpu = {"sampler": "simulated", "max_parallel": None, "poll_interval_s": 0.05}
    async with broker_before(tmp_path, service, others={"voice": voice}, gpu=gpu) as broker:
        await broker.ask("POST", "/v1/consumers/voice/unload")  # it counts as loaded at first
        await broker.until("out", lambda s: not s["consumers"]["voice"]["loaded"])
        assert (await paint(broker)).status == 200
        spoken = asyncio.create_task(broker.ask("POST", "/v1/tts", body=b"hello"))
        await broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)

        before = len(logged(tmp_path / "log", "GpuSample"))
        await eventually(lambda: len(logged(tmp_path / "log", "GpuSample")) > before + 2)
        assert upstream.count("/load") == 0  # 16,000 MiB are free, and they are spoken for

        card.take("comfyui", 13_000)
        service.end(service.running[0])
        await eventually(lambda: "POST /free" in service.calls)
        card.give_back("comfyui")
        assert (await spoken).status == 200
        assert await outcomes(broker, tmp_path, 2) == ["ok", "ok"]


async def test_after_a_first_picture_that_failed_there_is_room_for_the_next(
    tmp_path: Path, service: ComfyUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workflow that fails leaves its models in memory, and they are comfyui's own."""
    card = Card(tmp_path)
    card.create(16_000)
    monkeypatch.setenv(SIMULATED_GPU, str(card.path))
    gpu = {"sampler": "simulated", "poll_interval_s": 0.05}
    async with broker_before(tmp_path, service, gpu=gpu) as broker:
        assert (await paint(broker)).status == 200
        card.take("comfyui", 5_000)  # a small one
        await broker.until("seen", lambda s: s["gpu"][0]["used_mib"] == 5_000)
        service.end(service.running[0], "error")
        await outcomes(broker, tmp_path, 1)
        assert (await paint(broker)).status == 200
        service.end(service.running[0])
        await outcomes(broker, tmp_path, 2)


# ------------------------------------------------------------------------------------- how it ended


@pytest.mark.parametrize(
    ("failed", "status", "outcome"),
    [
        (FAILS, "success", "ok"),
        (FAILS, "error", "upstream_error"),
        ({"path": "/nothing", "when": "@"}, "success", "upstream_error"),
        (None, "error", "ok"),
    ],
)
async def test_a_job_counts_as_failed_where_the_service_says_so(
    tmp_path: Path, service: ComfyUI, failed: Any, status: str, outcome: str
) -> None:
    async with broker_before(tmp_path, service, job={"failed": failed}) as broker:
        await paint(broker)
        service.end(service.running[0], status)
        assert await outcomes(broker, tmp_path, 1) == [outcome]


async def test_a_job_that_somebody_deleted_is_over_and_failed(
    tmp_path: Path, service: ComfyUI
) -> None:
    async with broker_before(tmp_path, service) as broker:
        service.running.append("somebody-elses")
        await paint(broker)
        await asked_twice(service)
        service.pending.clear()
        assert await outcomes(broker, tmp_path, 1) == ["upstream_error"]


async def test_a_service_that_dies_takes_its_job_with_it(tmp_path: Path, service: ComfyUI) -> None:
    async with broker_before(tmp_path, service) as broker:
        await paint(broker)
        await asked_twice(service)
        await service.die()
        assert await outcomes(broker, tmp_path, 1) == ["upstream_error"]


@pytest.mark.parametrize(
    "instead",
    [
        web.Response(status=500, text="Server got itself in trouble"),
        web.Response(text="<html>"),
        web.json_response({"queue_running": None}),
    ],
)
async def test_a_question_without_an_answer_is_asked_again(
    tmp_path: Path, service: ComfyUI, instead: web.Response, caplog: pytest.LogCaptureFixture
) -> None:
    async with broker_before(tmp_path, service) as broker:
        await paint(broker)
        service.instead["/queue"] = instead
        await asked_twice(service)
        service.end(service.running[0])
        await asked_twice(service)
        assert logged(tmp_path / "log", "ServeDone") == []
        service.instead.clear()
        assert await outcomes(broker, tmp_path, 1) == ["ok"]
    assert caplog.text.count("cannot be asked for: /queue gives") == 1


async def test_a_question_that_hangs_is_asked_again(tmp_path: Path, service: ComfyUI) -> None:
    over = {**service.settings()["job"]["over"], "timeout_s": 0.05}
    async with broker_before(tmp_path, service, job={"over": [over]}) as broker:
        await paint(broker)
        service.hold_all = asyncio.Event()
        await asked_twice(service)
        service.end(service.running[0])
        service.hold_all.set()
        assert await outcomes(broker, tmp_path, 1) == ["ok"]


async def test_past_its_time_the_job_is_cancelled_and_given_up(
    tmp_path: Path, service: ComfyUI
) -> None:
    async with broker_before(tmp_path, service, job={"timeout_s": 0.2}) as broker:
        prompt_id = (await paint(broker)).json()["prompt_id"]
        assert await outcomes(broker, tmp_path, 1) == ["timeout"]
    assert service.calls[-2:] == ["POST /queue", "POST /interrupt"]
    assert service.bodies[-2:] == [{"delete": [prompt_id]}, {"prompt_id": prompt_id}]


# ---------------------------------------------------------------------------- operators and clients


@pytest.mark.parametrize("waits", [True, False])
async def test_an_operator_cancels_what_the_service_works_at(
    tmp_path: Path, service: ComfyUI, waits: bool
) -> None:
    async with broker_before(tmp_path, service) as broker:
        if waits:
            service.running.append("somebody-elses")
        prompt_id = (await paint(broker)).json()["prompt_id"]
        request = await followed(broker)

        answer = await broker.ask("DELETE", f"/v1/requests/{request}")

        assert answer.json()["cancelled"]
        # What was deleted is in no history, what was interrupted is: its models are in memory.
        assert await outcomes(broker, tmp_path, 1) == ["disconnected" if waits else "ok"]
        assert service.pending == []
    assert service.bodies[-2:] == [{"delete": [prompt_id]}, {"prompt_id": prompt_id}]


async def test_an_operator_cancels_before_the_service_has_said_what_the_job_is(
    tmp_path: Path, service: ComfyUI
) -> None:
    async with broker_before(tmp_path, service) as broker:
        service.hold = asyncio.Event()
        painting = asyncio.create_task(paint(broker))
        await eventually(lambda: service.running)
        (request,) = [one["id"] for one in (await broker.status())["requests"]]

        assert (await broker.ask("DELETE", f"/v1/requests/{request}")).json()["cancelled"]

        assert (await painting).json()["error"] == "cancelled"
        assert logged(tmp_path / "log", "ServeDone") == []  # it may be at work
        prompt_id = service.running[0]
        service.hold.set()
        await outcomes(broker, tmp_path, 1)
    assert service.bodies[-1] == {"prompt_id": prompt_id}
    assert service.running == []


@pytest.mark.parametrize("failed", [FAILS, None])
async def test_a_cancelled_job_is_no_failure_of_the_service(
    tmp_path: Path, service: ComfyUI, failed: Any
) -> None:
    async with broker_before(tmp_path, service, job={"failed": failed}) as broker:
        await paint(broker)
        await broker.ask("DELETE", f"/v1/requests/{await followed(broker)}")
        assert await outcomes(broker, tmp_path, 1) == ["disconnected"]


async def test_a_cancel_that_has_no_effect_is_followed_to_the_end(
    tmp_path: Path, service: ComfyUI
) -> None:
    cancel = {"path": "/no-such-thing"}
    async with broker_before(tmp_path, service, job={"cancel": cancel}) as broker:
        service.instead["/no-such-thing"] = web.Response(status=404)
        await paint(broker)
        request = await followed(broker)
        for times in (1, 2):
            await broker.ask("DELETE", f"/v1/requests/{request}")
            await eventually(lambda times=times: service.times("POST /no-such-thing") == times)
        await asked_twice(service)
        assert logged(tmp_path / "log", "ServeDone") == []
        service.end(service.running[0])
        assert await outcomes(broker, tmp_path, 1) == ["ok"]


@pytest.mark.parametrize(
    ("on_client_gone", "outcome"), [("drain", "ok"), ("close", "disconnected")]
)
async def test_a_client_that_leaves_before_its_answer(
    tmp_path: Path, service: ComfyUI, on_client_gone: str, outcome: str
) -> None:
    async with broker_before(tmp_path, service, on_client_gone=on_client_gone) as broker:
        service.hold = asyncio.Event()
        async with broker.connect() as client:
            await client.send("POST", "/v1/image", body=json.dumps(PROMPT).encode())
            await eventually(lambda: service.running)
        await eventually(lambda: logged(tmp_path / "log", "Cancel"))
        service.hold.set()
        if on_client_gone == "drain":
            await asked_twice(service)
            service.end(service.running[0])
        assert await outcomes(broker, tmp_path, 1) == [outcome]
    assert ("GET /queue" in service.calls) == (on_client_gone == "drain")
    assert "POST /interrupt" not in service.calls


async def test_a_job_whose_client_left_before_its_answer_is_cancelled(
    tmp_path: Path, service: ComfyUI
) -> None:
    async with broker_before(tmp_path, service) as broker:
        service.hold = asyncio.Event()
        async with broker.connect() as client:
            await client.send("POST", "/v1/image", body=json.dumps(PROMPT).encode())
            await eventually(lambda: service.running)
        await eventually(lambda: logged(tmp_path / "log", "Cancel"))
        assert "POST /interrupt" not in service.calls  # its id is not known yet
        service.hold.set()
        await outcomes(broker, tmp_path, 1)
    assert service.times("POST /interrupt") == 1
    assert service.running == []


# ----------------------------------------------------------------------- who waits for the work


async def waiting(
    broker: Facade, service: ComfyUI, query: str = "wait=1"
) -> "asyncio.Task[Answer]":
    """Begin to wait for a picture; it is being made when this returns."""
    body = json.dumps(PROMPT).encode()
    asked = asyncio.create_task(broker.ask("POST", f"/v1/image?{query}", body=body))
    await eventually(lambda: service.running)
    await asked_twice(service)
    assert not asked.done()
    return asked


async def test_who_waits_is_answered_with_the_finished_picture(
    tmp_path: Path, service: ComfyUI
) -> None:
    async with broker_before(tmp_path, service) as broker:
        asked = await waiting(broker, service, "seed=1&wait=1&x=wait")
        service.end(service.running[0])
        answer = await asked
        assert (answer.status, answer.headers["content-type"]) == (200, "image/png; charset=utf-8")
        assert answer.body == b"output:of/today/a b&c.png"
        assert answer.headers["x-mgpu-consumer"] == "comfyui"
        assert await outcomes(broker, tmp_path, 1) == ["ok"]
    assert service.calls[0] == "POST /prompt"


@pytest.mark.parametrize("query", ["wait=0", "awaited=1", ""])
async def test_who_does_not_wait_is_answered_at_once(
    tmp_path: Path, service: ComfyUI, query: str
) -> None:
    async with broker_before(tmp_path, service) as broker:
        body = json.dumps(PROMPT).encode()
        answer = await broker.ask("POST", f"/v1/image?{query}", body=body)
        assert answer.json()["prompt_id"] == service.running[0]
        service.end(service.running[0])  # else the broker's end would wait for it


async def test_a_picture_that_failed_is_an_error_for_who_waits(
    tmp_path: Path, service: ComfyUI
) -> None:
    async with broker_before(tmp_path, service, job={"failed": FAILS}) as broker:
        asked = await waiting(broker, service)
        service.end(service.running[0], "error")
        answer = await asked
        assert (answer.status, answer.error) == (502, "upstream_disconnected")
        assert "could not do its job" in answer.json()["message"]


async def test_what_the_service_refuses_reaches_who_waits_unchanged(
    tmp_path: Path, service: ComfyUI
) -> None:
    async with broker_before(tmp_path, service) as broker:
        answer = await broker.ask("POST", "/v1/image?wait=1", body=b"{}")
        assert (answer.status, answer.json()) == (400, NO_PROMPT)
        assert await outcomes(broker, tmp_path, 1) == ["ok"]


async def test_a_result_that_is_not_there_is_an_error(tmp_path: Path, service: ComfyUI) -> None:
    async with broker_before(tmp_path, service) as broker:
        asked = await waiting(broker, service)
        service.end(service.running[0])
        service.history.clear()
        service.instead["/history"] = web.json_response({})
        answer = await asked
        assert (answer.status, answer.error) == (502, "upstream_disconnected")


async def test_the_job_of_who_waits_no_longer_is_cancelled(
    tmp_path: Path, service: ComfyUI
) -> None:
    async with broker_before(tmp_path, service) as broker:
        async with broker.connect() as client:
            await client.send("POST", "/v1/image?wait=1", body=json.dumps(PROMPT).encode())
            await eventually(lambda: service.running)
            await asked_twice(service)
        await outcomes(broker, tmp_path, 1)
    assert service.times("POST /interrupt") == 1


async def test_who_waits_for_what_an_operator_cancels_is_told(
    tmp_path: Path, service: ComfyUI
) -> None:
    async with broker_before(tmp_path, service) as broker:
        asked = await waiting(broker, service)
        await broker.ask("DELETE", f"/v1/requests/{await followed(broker)}")
        answer = await asked
        assert (answer.status, answer.error) == (503, "cancelled")
        await outcomes(broker, tmp_path, 1)
    assert service.times("POST /interrupt") == 1


async def test_where_nobody_says_what_the_result_is_nobody_can_wait(
    tmp_path: Path, service: ComfyUI
) -> None:
    async with broker_before(tmp_path, service, job={"result": None}) as broker:
        answer = await broker.ask("POST", "/v1/image?wait=1", body=json.dumps(PROMPT).encode())
        assert (answer.status, answer.error) == (400, "bad_request")
        assert "job.result" in answer.json()["message"]
        answer = await broker.ask("POST", "/v1/image?wait=yes", body=b"{}")
        assert (answer.status, answer.error) == (400, "bad_request")
    assert service.calls == []


async def test_at_the_brokers_end_following_ends_and_the_job_goes_on(
    tmp_path: Path, service: ComfyUI
) -> None:
    async with broker_before(tmp_path, service, scheduler={"shutdown_grace_s": 0.1}) as broker:
        await paint(broker)
        await followed(broker)
    assert [e["outcome"] for e in logged(tmp_path / "log", "ServeDone")] == ["disconnected"]
    assert len(service.running) == 1
    assert "POST /interrupt" not in service.calls


async def test_a_job_has_its_grace_when_the_broker_ends(tmp_path: Path, service: ComfyUI) -> None:
    async with broker_before(tmp_path, service) as broker:
        await paint(broker)
        await followed(broker)

        async def end_late() -> None:
            await eventually(lambda: logged(tmp_path / "log", "Shutdown"))
            await asked_twice(service)
            service.end(service.running[0])

        late = asyncio.create_task(end_late())
    await late
    assert [e["outcome"] for e in logged(tmp_path / "log", "ServeDone")] == ["ok"]


# ------------------------------------------------------------------------------- what is no job


@pytest.mark.parametrize(
    "body",
    [
        b"queued",
        b"",
        b"\xff",
        b'{"number": 1}',
        b'{"prompt_id": null}',
        b'{"prompt_id": true}',
        b'{"prompt_id": ["a"]}',
        b'{"prompt_id": "a", "more": "%s"}' % (b"x" * MAX_COPY_BYTES),
        b"[" * 100_000,
    ],
    ids=range(9),
)
async def test_an_answer_without_an_id_ends_the_work_and_reaches_the_client(
    tmp_path: Path, service: ComfyUI, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    service.instead["/prompt"] = web.Response(body=body)
    async with broker_before(tmp_path, service) as broker:
        assert (await paint(broker)).body == body
        assert await outcomes(broker, tmp_path, 1) == ["ok"]
    assert caplog.text.count("without the id of a job") == 1
    assert "GET /queue" not in service.calls


async def test_a_refusal_is_the_end_of_it(
    tmp_path: Path, service: ComfyUI, caplog: pytest.LogCaptureFixture
) -> None:
    async with broker_before(tmp_path, service) as broker:
        assert (await paint(broker, prompt={})).status == 400
        assert await outcomes(broker, tmp_path, 1) == ["ok"]
    assert service.calls == ["POST /prompt"]
    assert "without the id" not in caplog.text


async def test_what_needs_no_lease_is_not_followed(tmp_path: Path, service: ComfyUI) -> None:
    service.instead["/audio/x"] = web.json_response({"prompt_id": "a"})
    async with broker_before(tmp_path, service) as broker:
        assert (await broker.ask("GET", "/audio/x")).json() == {"prompt_id": "a"}
        assert "GET /queue" not in service.calls
    assert lines(tmp_path / "log")
    assert logged(tmp_path / "log", "Request") == []


# ------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("prompt_id", ["a/b c", "it's", 'a"b`c\\', "{id}", "ä%2F?#", "\ud800"])
async def test_any_text_can_be_an_id(tmp_path: Path, service: ComfyUI, prompt_id: str) -> None:
    async with broker_before(tmp_path, service) as broker:
        await paint(broker, prompt_id=prompt_id)
        await asked_twice(service)
        assert service.running == [prompt_id]
        request = await followed(broker)
        service.end(prompt_id)
        failed = prompt_id == "\ud800"  # half a character can stand in no path
        assert await outcomes(broker, tmp_path, 1) == ["upstream_error" if failed else "ok"]
        assert request


@pytest.mark.parametrize(
    ("answer", "found"),
    [('{"id": "a"}', "a"), ('{"id": 17}', 17), ('{"id": ""}', ""), ('{"id": {}}', None)],
)
def test_an_id_is_text_or_a_number(answer: str, found: object) -> None:
    job, _ = make_job()
    job.copy = AnswerCopy(status=201)
    job.copy.add(answer.encode())
    settings = JobSettings(id="id", over=(Question(path="/", when="@"),))
    consumer = ConsumerSettings(name="a", url="http://127.0.0.1:1", job=settings)
    assert find_job(job, consumer) == found


def test_the_value_of_a_step_is_quoted_in_the_path_and_plain_in_texts() -> None:
    step = Step(path="/x/{id}?y={id}", body={"a": ["{id}", 1], "{id}": {"b": "-{id}-", "c": None}})
    filled = with_value(step, "id", "a/b")
    assert filled.path == "/x/a%2Fb?y=a%2Fb"
    assert filled.body == {"a": ["a/b", 1], "{id}": {"b": "-a/b-", "c": None}}
    assert with_value(Step(path="/", body="{id}"), "id", "a/b").body == "a/b"

"""The stand-in services, each as a real process: their shapes, and their vices."""

import asyncio
import contextlib
import io
import json
import random
import signal
import wave
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
from aiohttp import web

from mgpu_http.demo.card import DESKTOP_MIB, TOTAL_MIB
from mgpu_http.demo.services import comfyui, common, mvoice, ollama, whisper
from mgpu_http.demo.services.common import MAX_BODY_BYTES, OUT_OF_MEMORY_EXIT
from mgpu_http.demo.services.ollama import KEEP_ALIVE_S, RequestError, keep_alive
from mgpu_http.demo.services.sound import heard, spoken
from tests.support.demo_host import DemoHost, Service, demo_host, seed

USABLE_MIB = TOTAL_MIB - DESKTOP_MIB
WAV = spoken("some words to hear")
JOB: dict[str, Any] = {
    "prompt": {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}},
    }
}
AnyService = TypeVar("AnyService", bound=common.Service)
FREE = {"unload_models": True, "free_memory": True}


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[DemoHost]:
    async with demo_host(tmp_path) as host:
        yield host


def form(field: str, content: bytes) -> aiohttp.FormData:
    data = aiohttp.FormData()
    data.add_field(field, content, filename="a.wav")
    return data


def seconds(sound: bytes) -> float:
    with wave.open(io.BytesIO(sound)) as file:
        return file.getnframes() / file.getframerate()


def first_draw(name: str, fits: Callable[[float], bool]) -> str:
    return seed(name, lambda draws: fits(draws[0]))


@contextlib.asynccontextmanager
async def serving(
    kind: type[AnyService], name: str, host: DemoHost
) -> AsyncIterator[tuple[str, AnyService]]:
    """Run a service in this process."""
    card = await host.join(name)
    async with asyncio.TaskGroup() as tasks:
        service = kind(card, random.Random(1), tasks)
        await service.prepare()
        runner = common.make_runner(service)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        await service.begin()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}", service
        finally:
            await runner.cleanup()


# -------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", ["mvoice", "whisper-server"])
async def test_a_load_that_does_not_fit_kills_the_process(host: DemoHost, name: str) -> None:
    await host.join(mib=USABLE_MIB - 1_000)
    service = await host.start(name)
    assert await service.ended() == OUT_OF_MEMORY_EXIT
    assert "CUDA out of memory" in await service.log()
    [(what, _)] = host.journal(name)
    assert what == "out_of_memory"
    await host.until("what it had taken is free again", lambda: host.held(name) == 0)


async def test_two_loads_at_once_collide_half_way(host: DemoHost) -> None:
    names = {"mvoice": mvoice.LOAD_PEAK_MIB, "whisper-server": whisper.RESIDENT_MIB}
    await host.join(mib=USABLE_MIB - max(names.values()))  # enough for either alone
    services = dict(zip(names, await asyncio.gather(*map(host.start, names)), strict=True))
    await host.until("one died", lambda: refused(host, names))
    [name, *_] = refused(host, names)
    [(_, piece_mib)] = host.journal(name)
    assert 0 < piece_mib < names[name] / 2
    assert await services[name].ended() == OUT_OF_MEMORY_EXIT


def refused(host: DemoHost, names: Iterable[str]) -> list[str]:
    return [name for name in names if "out_of_memory" in dict(host.journal(name))]


async def test_a_body_may_not_be_of_any_size(host: DemoHost) -> None:
    service = await host.start("ollama")
    body = io.BytesIO(bytes(MAX_BODY_BYTES + 1))
    assert (await service.ask("POST", "/api/chat", data=body)).status == 413


# ------------------------------------------------------------------------------------------ mvoice


async def loaded_mvoice(host: DemoHost, chance: str | None = None) -> Service:
    service = await host.start("mvoice", chance)
    await host.until("loaded", lambda: host.journal("mvoice"))
    return service


async def test_mvoice_speaks_and_hears(host: DemoHost) -> None:
    service = await loaded_mvoice(host)
    short = await service.ask("POST", "/tts", json={"text": "good morning to you"})
    long = await service.ask("POST", "/tts", json={"text": "good morning to you " * 5})
    assert (short.status, short.headers["Content-Type"]) == (200, "audio/wav")
    assert seconds(long.body) > seconds(short.body) > 0
    assert (await service.ask("GET", short.headers["X-Audio"])).body == short.body
    assert (await service.ask("GET", "/audio/none.wav")).status == 404
    for body in (short.body, form("file", short.body)):
        answer = await service.ask("POST", "/stt", data=body)
        assert answer.json == {"text": heard(short.body)}


async def test_mvoice_says_what_is_wrong_with_a_request(host: DemoHost) -> None:
    service = await host.start("mvoice")
    bad = {"/tts": (b"{", b"[]", b'{"text": ""}'), "/stt": (b"", b"RIFF")}
    for path, bodies in bad.items():
        for body in bodies:
            answer = await service.ask("POST", path, data=body)
            assert answer.status == 400
            assert "must be" in answer.json["error"]


async def test_mvoice_needs_more_to_load_than_what_stays(host: DemoHost) -> None:
    service = await host.start("mvoice")
    await host.until("at its peak", lambda: host.held("mvoice") == mvoice.LOAD_PEAK_MIB)
    await host.until("settled", lambda: host.held("mvoice") == mvoice.RESIDENT_MIB)
    assert (await service.ask("POST", "/load")).status == 200  # it is loaded, and does nothing
    assert host.journal("mvoice") == [("load", mvoice.RESIDENT_MIB)]


async def test_mvoice_answers_an_unload_before_it_is_done(
    host: DemoHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, so that the work which it waits for can be made to last for ever."""
    monkeypatch.setattr(mvoice, "WORK_S", (3600.0, 3600.0))
    monkeypatch.setattr(common, "FINISH_S", 0.1)
    async with serving(mvoice.MVoice, "mvoice", host) as (url, service):
        await host.until("loaded", lambda: host.journal("mvoice"))
        work = asyncio.create_task(host.session.post(url + "/tts", json={"text": "words"}))
        await host.until("at work", service._turn.locked)
        async with host.session.post(url + "/unload") as answer:
            assert answer.status == 200
        assert service.held_mib == mvoice.RESIDENT_MIB
        assert host.journal("mvoice") == [("load", mvoice.RESIDENT_MIB)]
    with pytest.raises(aiohttp.ClientError):
        await work
    assert host.journal("mvoice")[-1] == ("unload", mvoice.RESIDENT_MIB)


async def test_an_unloaded_mvoice_works_once_it_is_loaded_again(host: DemoHost) -> None:
    service = await loaded_mvoice(host)
    assert (await service.ask("POST", "/unload")).status == 200
    await host.until("free", lambda: host.held("mvoice") == 0)
    assert host.journal("mvoice")[-1] == ("unload", mvoice.RESIDENT_MIB)
    answer = await service.ask("POST", "/tts", json={"text": "words"})
    assert (answer.status, answer.json) == (503, {"error": "the model is not loaded"})
    assert (await service.ask("GET", "/health")).json == {"status": "ok", "loaded": False}
    assert (await service.ask("POST", "/load")).status == 200
    assert (await service.ask("POST", "/tts", json={"text": "words"})).status == 200


async def test_a_load_of_mvoice_that_fails_holds_nothing(host: DemoHost) -> None:
    unlucky = first_draw("mvoice", lambda draw: draw < mvoice.LOAD_FAILURE_RATE)
    service = await host.start("mvoice", unlucky)
    await host.until("failed", lambda: host.journal("mvoice"))
    assert host.journal("mvoice") == [("load_failed", mvoice.LOAD_PEAK_MIB)]
    await host.until("free", lambda: host.held("mvoice") == 0)
    assert (await service.ask("POST", "/tts", json={"text": "words"})).status == 503


async def test_a_load_of_mvoice_that_fails_is_a_500(host: DemoHost) -> None:
    # The first draw is that of the load at its start, and the second that of the next load.
    rate = mvoice.LOAD_FAILURE_RATE
    unlucky = seed("mvoice", lambda draws: draws[0] >= rate > draws[1])
    service = await loaded_mvoice(host, unlucky)
    await service.ask("POST", "/unload")
    assert (await service.ask("POST", "/load")).status == 500


async def test_work_of_mvoice_fails_now_and_then(host: DemoHost) -> None:
    # Draws: the load at its start, how long the work takes, whether it fails.
    rate = mvoice.WORK_FAILURE_RATE
    unlucky = seed("mvoice", lambda draws: min(draws[0], draws[4]) >= 0.05 and draws[2] < rate)
    service = await loaded_mvoice(host, unlucky)
    assert (await service.ask("POST", "/tts", json={"text": "words"})).status == 500
    assert (await service.ask("POST", "/tts", json={"text": "words"})).status == 200


async def test_mvoice_lets_go_when_it_is_stopped(host: DemoHost) -> None:
    service = await loaded_mvoice(host)
    service.process.terminate()
    assert await service.ended() == 0
    await host.until("free", lambda: host.free_mib == USABLE_MIB)
    mib = mvoice.RESIDENT_MIB
    assert host.journal("mvoice") == [("load", mib), ("unload", mib)]


# ---------------------------------------------------------------------------------- whisper-server


async def test_whisper_server_is_loaded_when_its_socket_opens(host: DemoHost) -> None:
    service = await host.start("whisper-server")
    assert host.journal("whisper-server") == [("load", whisper.RESIDENT_MIB)]
    health = await service.ask("GET", "/health")
    assert (health.status, health.json) == (200, {"status": "ok"})


async def test_whisper_server_hears(host: DemoHost) -> None:
    service = await host.start("whisper-server")
    answer = await service.ask("POST", "/inference", data=form("file", WAV))
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.json["text"].strip() == heard(WAV)
    await host.until("rests", lambda: host.held("whisper-server") == whisper.RESIDENT_MIB)


async def test_whisper_server_says_nothing_of_what_is_wrong(host: DemoHost) -> None:
    service = await host.start("whisper-server")
    unbound = {"Content-Type": "multipart/form-data"}
    bodies: list[dict[str, Any]] = [
        {"data": form("audio", WAV)},  # another field
        {"data": form("file", b"no sound")},
        {"data": form("file", b"")},
        {"data": WAV},  # no form
        {"json": {"file": "x"}},
        {},
        {"data": b"garbage", "headers": unbound},
        {"data": b"garbage", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
    ]
    for body in bodies:
        answer = await service.ask("POST", "/inference", **body)
        assert (answer.status, answer.body) == (400, b"Invalid request"), body
    assert (await service.ask("POST", "/v1/audio/transcriptions")).status == 404


async def test_a_stopped_whisper_server_finishes_what_it_has_begun_with(host: DemoHost) -> None:
    service = await host.start("whisper-server")
    work = [
        asyncio.create_task(service.ask("POST", "/inference", data=form("file", WAV)))
        for _ in range(2)
    ]
    at_work = whisper.RESIDENT_MIB + whisper.WORK_MIB
    await host.until("at work", lambda: host.held("whisper-server") == at_work)
    service.process.send_signal(signal.SIGTERM)
    running, *_ = await asyncio.gather(*work, return_exceptions=True)
    assert not isinstance(running, BaseException)
    assert running.status == 200
    assert await service.ended() == 0
    assert host.journal("whisper-server")[-1] == ("unload", whisper.RESIDENT_MIB)
    with pytest.raises(aiohttp.ClientConnectionError):
        await service.ask("GET", "/health")


async def test_a_client_that_goes_ends_its_inference(
    host: DemoHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, so that its work can be made to last for ever."""
    monkeypatch.setattr(whisper, "WORK_S", (3600.0, 3600.0))
    async with serving(whisper.WhisperServer, "whisper-server", host) as (url, service):
        path = f"{url}/inference"
        gone = asyncio.create_task(host.session.post(path, data=form("file", WAV)))
        await host.until("at work", lambda: service.held_mib > whisper.RESIDENT_MIB)
        monkeypatch.setattr(whisper, "WORK_S", (0.0, 0.0))
        gone.cancel()
        async with host.session.post(path, data=form("file", WAV)) as answer:
            assert answer.status == 200


# ------------------------------------------------------------------------------------------ ollama


async def ask_chat(service: Service, model: str, **more: Any) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False}
    answer = await service.ask("POST", "/api/chat", json={**body, **more})
    assert answer.status == 200
    return answer.json


async def test_ollama_streams_a_line_per_token(host: DemoHost) -> None:
    service = await host.start("ollama")
    body = {"model": "chat:latest", "messages": [{"role": "user", "content": "hi"}]}
    answer = await service.ask("POST", "/api/chat", json=body)
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    *tokens, last = map(json.loads, answer.body.splitlines())
    assert len(tokens) == last["eval_count"] > 1
    assert all(line["message"]["content"] and not line["done"] for line in tokens)
    assert (last["done"], last["done_reason"]) == (True, "stop")
    assert last["model"] == "chat:latest"
    whole = await service.ask(
        "POST", "/api/generate", json={"model": "chat", "prompt": "hi", "stream": False}
    )
    assert whole.json["done"] is True
    assert len(whole.json["response"].split()) == whole.json["eval_count"]


async def test_ollama_tells_what_it_has_and_what_is_loaded(host: DemoHost) -> None:
    service = await host.start("ollama")
    assert (await service.ask("GET", "/")).body == b"Ollama is running"
    assert "version" in (await service.ask("GET", "/api/version")).json
    tags = (await service.ask("GET", "/api/tags")).json["models"]
    assert {model["name"] for model in tags} == {"chat:latest", "code:latest"}
    assert (await service.ask("GET", "/api/ps")).json == {"models": []}
    loaded = await ask_chat(service, "chat", messages=[], keep_alive=-1)
    assert loaded["done_reason"] == "load"
    [model] = (await service.ask("GET", "/api/ps")).json["models"]
    assert model["size"] == model["size_vram"] == ollama.MODELS_MIB["chat"] * 2**20


async def test_ollama_refuses(host: DemoHost) -> None:
    service = await host.start("ollama")
    for body, status, error in (
        (b"", 400, "missing request body"),
        (b"{}", 400, "model is required"),
        (b'{"model": "none"}', 404, "model 'none' not found"),
        (b'{"model": "chat", "keep_alive": "soon"}', 400, 'time: invalid duration "soon"'),
    ):
        answer = await service.ask("POST", "/api/chat", data=body)
        assert (answer.status, answer.json) == (status, {"error": error})


async def test_ollama_keeps_a_model_as_long_as_it_is_told_to(host: DemoHost) -> None:
    service = await host.start("ollama")
    size_mib = ollama.MODELS_MIB["chat"]
    await ask_chat(service, "chat", keep_alive="100ms")
    await host.until("expired", lambda: len(host.journal("ollama")) == 2)
    await ask_chat(service, "chat", keep_alive=-1)
    told = await ask_chat(service, "chat", messages=[], keep_alive=0)
    assert told["done_reason"] == "unload"
    await host.until("unloaded", lambda: len(host.journal("ollama")) == 4)
    await host.until("free", lambda: host.held("ollama") == 0)
    whats = ["load", "expire", "load", "unload"]
    assert host.journal("ollama") == [(what, size_mib) for what in whats]


async def test_ollama_drops_what_it_used_least_recently_to_make_place(host: DemoHost) -> None:
    service = await host.start("ollama")
    await host.join(mib=USABLE_MIB - 2_500)
    chat_mib, code_mib = ollama.MODELS_MIB["chat"], ollama.MODELS_MIB["code"]
    await ask_chat(service, "chat", keep_alive=-1)
    await ask_chat(service, "code", keep_alive=-1)
    assert host.journal("ollama") == [("load", chat_mib), ("evict", chat_mib), ("load", code_mib)]


async def test_ollama_runs_on_the_processor_where_there_is_no_place(host: DemoHost) -> None:
    service = await host.start("ollama")
    await host.join(mib=USABLE_MIB - 1_000)
    await ask_chat(service, "chat", keep_alive=-1)
    assert host.journal("ollama") == [("load", 0)]
    [model] = (await service.ask("GET", "/api/ps")).json["models"]
    assert model["size_vram"] == 0


async def test_ollama_dies_where_the_memory_goes_while_it_loads(host: DemoHost) -> None:
    service = await host.start("ollama")
    rival = await host.join()
    work = asyncio.create_task(ask_chat(service, "chat"))
    await host.until("it looked and has begun to load", lambda: host.held("ollama") > 0)
    await rival.hold(host.free_mib - 100)
    with pytest.raises(aiohttp.ClientError):
        await work
    assert await service.ended() == OUT_OF_MEMORY_EXIT
    assert [what for what, _ in host.journal("ollama")] == ["out_of_memory"]


@pytest.mark.parametrize(
    ("said", "kept_s"),
    [
        (None, KEEP_ALIVE_S),
        (0, 0),
        (-1, float("inf")),
        ("-1s", float("inf")),
        ("1h30m", 5400),
        ("250ms", 0.25),
    ],
)
def test_keep_alive(said: object, kept_s: float) -> None:
    assert keep_alive(said) == kept_s


@pytest.mark.parametrize("said", ["", "5", "5 m", "m5", "-"])
def test_a_keep_alive_that_is_no_duration_is_refused(said: str) -> None:
    with pytest.raises(RequestError):
        keep_alive(said)


# ----------------------------------------------------------------------------------------- comfyui


async def submit(service: Service, **more: Any) -> str:
    answer = await service.ask("POST", "/prompt", json={**JOB, **more})
    assert answer.status == 200
    assert answer.json.keys() == {"prompt_id", "number", "node_errors"}
    prompt_id: str = answer.json["prompt_id"]
    return prompt_id


async def queue(service: Service) -> tuple[list[str], list[str]]:
    """Give the ids that run and that wait."""
    lists = (await service.ask("GET", "/queue")).json
    running, pending = ([item[1] for item in lists[key]] for key in QUEUE_KEYS)
    return running, pending


QUEUE_KEYS = ("queue_running", "queue_pending")


async def followed(service: Service, prompt_id: str) -> Any:
    """Give its entry in the history, once it is there."""
    async with asyncio.timeout(20):
        while True:
            history = (await service.ask("GET", f"/history/{prompt_id}")).json
            if history:
                return history[prompt_id]
            await asyncio.sleep(0.02)


async def test_comfyui_refuses(host: DemoHost) -> None:
    service = await host.start("comfyui")
    for body, kind in (
        (b"{}", "no_prompt"),
        (b"[]", "no_prompt"),
        (b'{"prompt": {}}', "prompt_no_outputs"),
        (b'{"prompt": {"1": {"class_type": "EmptyImage"}}}', "prompt_no_outputs"),
        (b'{"prompt": {"1": {"inputs": {}}}}', "missing_node_type"),
        (json.dumps({**JOB, "prompt_id": "dup"}).encode(), "invalid_prompt_id"),
    ):
        answer = await service.ask("POST", "/prompt", data=body)
        assert (answer.status, answer.json["node_errors"]) == (400, {})
        error = answer.json["error"]
        assert error.keys() == {"type", "message", "details", "extra_info"}
        assert error["type"] == kind
    assert await queue(service) == ([], [])


async def test_comfyui_gets_itself_in_trouble_over_what_is_no_object(host: DemoHost) -> None:
    service = await host.start("comfyui")
    for body in (b"", b"{not json", b"null", b'{"prompt": null}'):
        answer = await service.ask("POST", "/prompt", data=body)
        assert answer.status == 500
        assert answer.body.startswith(b"500 Internal Server Error")
    for path in ("/free", "/queue"):
        assert (await service.ask("POST", path, data=b"")).status == 500


async def test_comfyui_answers_at_once_works_afterwards_and_stays_loaded(host: DemoHost) -> None:
    service = await host.start("comfyui")
    assert host.held("comfyui") == 0
    data = json.dumps(JOB).encode()
    answer = await service.ask("POST", "/api/prompt", data=data, headers={"Content-Type": "a/b"})
    assert answer.json["node_errors"] == {}
    prompt_id = answer.json["prompt_id"]
    assert (await service.ask("GET", f"/history/{prompt_id}")).json == {}
    assert (await service.ask("GET", "/prompt")).json == {"exec_info": {"queue_remaining": 1}}
    ended = await followed(service, prompt_id)
    assert ended.keys() == {"prompt", "outputs", "status", "meta"}
    status = ended["status"]
    assert (status["status_str"], status["completed"]) == ("success", True)
    kinds = [kind for kind, _ in status["messages"]]
    assert kinds == ["execution_start", "execution_cached", "execution_success"]
    [image] = ended["outputs"]["2"]["images"]
    assert image["filename"].endswith(".png")
    assert host.held("comfyui") == comfyui.CONTEXT_MIB + comfyui.MODELS_MIB
    assert (await service.ask("GET", "/history")).json == {prompt_id: ended}
    [device] = (await service.ask("GET", "/system_stats")).json["devices"]
    assert device["vram_total"] == TOTAL_MIB * 2**20
    assert device["vram_free"] == host.free_mib * 2**20

    assert (await service.ask("POST", "/free", json={})).status == 200  # asks for nothing
    assert (await service.ask("POST", "/free", json={"free_memory": "false"})).status == 200
    await host.until("unloaded", lambda: host.held("comfyui") == comfyui.CONTEXT_MIB)


async def test_free_is_only_a_flag_until_the_job_is_over(host: DemoHost) -> None:
    service = await host.start("comfyui")
    prompt_id = await submit(service)
    loaded_mib = comfyui.CONTEXT_MIB + comfyui.MODELS_MIB
    await host.until("loaded", lambda: host.journal("comfyui"))
    answer = await service.ask("POST", "/free", json=FREE)
    assert (answer.status, answer.body) == (200, b"")
    assert host.held("comfyui") == loaded_mib
    assert (await followed(service, prompt_id))["status"]["completed"]
    await host.until("unloaded", lambda: host.held("comfyui") == comfyui.CONTEXT_MIB)
    mib = comfyui.MODELS_MIB
    assert host.journal("comfyui") == [("load", mib), ("unload", mib)]


async def test_jobs_of_comfyui_are_put_ahead_dropped_and_interrupted(host: DemoHost) -> None:
    service = await host.start("comfyui")
    first, second, third = [await submit(service) for _ in range(3)]
    ahead = await submit(service, front=True)
    assert await queue(service) == ([first], [second, third, ahead])
    await service.ask("POST", "/queue", json={"delete": [third, first]})  # one of them runs
    await service.ask("POST", "/interrupt", json={"prompt_id": ahead})  # it doesn't run yet
    assert await queue(service) == ([first], [second, ahead])
    await service.ask("POST", "/interrupt", json={"prompt_id": first})
    status = (await followed(service, first))["status"]
    assert (status["status_str"], status["completed"]) == ("error", False)
    assert status["messages"][-1][0] == "execution_interrupted"
    assert await queue(service) == ([ahead], [second])
    await service.ask("POST", "/queue", json={"clear": True})
    assert (await followed(service, ahead))["status"]["completed"]
    history = (await service.ask("GET", "/history")).json
    assert list(history) == [first, ahead]


async def test_comfyui_takes_only_so_many_jobs(host: DemoHost) -> None:
    service = await host.start("comfyui")
    answers = [
        await service.ask("POST", "/prompt", json=JOB) for _ in range(comfyui.MAX_PENDING + 2)
    ]
    assert {answer.status for answer in answers[: comfyui.MAX_PENDING]} == {200}
    assert answers[-1].status == 503
    assert (await service.ask("POST", "/queue", json={"clear": True})).status == 200
    assert (await queue(service))[1] == []


async def test_a_job_of_comfyui_fails_now_and_then(host: DemoHost) -> None:
    # Draws: how long the job takes, whether it fails.
    unlucky = seed("comfyui", lambda draws: draws[1] < comfyui.JOB_FAILURE_RATE)
    service = await host.start("comfyui", unlucky)
    ended = await followed(service, await submit(service))
    status = ended["status"]
    assert (status["status_str"], status["completed"], ended["outputs"]) == ("error", False, {})
    kind, told = status["messages"][-1]
    assert kind == "execution_error"
    assert told["node_type"] == "SaveImage"
    assert told["exception_message"]


async def test_a_job_of_comfyui_that_finds_no_memory_kills_it(host: DemoHost) -> None:
    await host.join(mib=10_000)
    service = await host.start("comfyui")
    await submit(service)
    assert await service.ended() == OUT_OF_MEMORY_EXIT
    assert [what for what, _ in host.journal("comfyui")] == ["out_of_memory"]


async def test_a_stopped_comfyui_does_not_wait_for_its_job(host: DemoHost) -> None:
    service = await host.start("comfyui")
    await submit(service)
    await host.until("at work", lambda: host.journal("comfyui"))
    service.process.terminate()
    assert await service.ended() == 0
    assert host.journal("comfyui")[-1] == ("unload", comfyui.MODELS_MIB)
    await host.until("all of it is free", lambda: host.free_mib == USABLE_MIB)

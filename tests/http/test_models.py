"""Several models of one server, each loaded and unloaded by itself, under one budget."""

import asyncio
import json

import pytest

from tests.support.facade import Address
from tests.support.gpu_host import at_rest, counts, gpu_host, ready

MIB = {"small": 4_000, "middle": 7_000, "large": 12_000}
PATHS = {"llm": {"path": "/v1/chat/completions"}, "stt": {"path": "/v1/audio/transcriptions"}}
ROUTER = {
    "paths": PATHS,
    "unload": {"path": "/models/unload", "body": {"model": "{model}"}},
    "max_concurrency": 4,
    "models": {
        "small": {"vram_resident_mib": 4_000, "aliases": ["gpt-mini", "voice"]},
        "middle": {"vram_resident_mib": 7_000},
        "large": {"vram_resident_mib": 12_000},
    },
}
ROUTING = {"llm": "router", "stt": "router"}


def asks(model: object, **more: object) -> bytes:
    return json.dumps({"messages": [], "model": model, **more}).encode()


def consumers(models=None, **changes):
    return {"router": {**ROUTER, **({"models": models} if models else {}), **changes}}


@pytest.fixture
def host(tmp_path):
    with gpu_host(tmp_path, total_mib=16_000) as host:
        host.start_router("router", mib=MIB, autoload=True)
        yield host


PRESET = {key: ROUTER[key] for key in ("models", "max_concurrency")} | {"preset": "llama-router"}


@pytest.mark.parametrize("router", [ROUTER, PRESET], ids=["in full", "preset"])
async def test_models_of_one_server_make_room_for_each_other(host, router):
    with host.serve(consumers={"router": router}, routing={"llm": "router"}) as broker:
        await ready(broker)
        for model in ("small", "middle", "large", "small"):
            answer = await broker.ask("POST", "/v1/llm", body=asks(model))
            assert (answer.status, answer.headers["x-mgpu-consumer"]) == (200, f"router/{model}")
        status = await at_rest(broker)
    work = [line.split(" ", 2)[2] for line in host.calls()]
    assert work == [
        "/v1/chat/completions small",
        "/v1/chat/completions middle",
        # 16,000 MiB less 11,000: both have to go for the large one, which fills the card.
        *sorted(["/models/unload small", "/models/unload middle"], key=work.index),
        "/v1/chat/completions large",
        "/models/unload large",
        "/v1/chat/completions small",
    ]
    assert counts(status)[0] == 3
    assert {name: row["loaded"] for name, row in status["consumers"].items()} == {
        "router/large": False,
        "router/middle": False,
        "router/small": True,
    }


async def test_the_server_works_for_so_many_at_once_whatever_their_models(host):
    upstream = host.services["router"]
    with host.serve(consumers=consumers(max_concurrency=2), routing=ROUTING) as broker:
        await ready(broker)
        slow = ("X-Upstream: delay=0.3",)
        asked = [
            broker.ask("POST", "/v1/llm", *slow, body=asks(model)) for model in ("small", "middle")
        ]
        answers = await asyncio.gather(
            *asked, *(broker.ask("POST", "/v1/llm", *slow, body=asks("small")) for _ in range(3))
        )
        assert {answer.status for answer in answers} == {200}
    assert upstream.stats()["most_working"] == 2


async def test_another_name_is_the_services_own_when_it_gets_there(host):
    models = {"fast": {"upstream": "small", "aliases": ["gpt-mini"], "vram_resident_mib": 4_000}}
    with host.serve(consumers=consumers(models), routing=ROUTING) as broker:
        await ready(broker)
        body = b'{ "temperature": 1e0, "model" :"gpt-mini","messages":[{"model":"fast"}]}'
        for sent in (body, body.replace(b"gpt-mini", b"fast"), body.replace(b"gpt-mini", b"small")):
            answer = await broker.ask("POST", "/v1/llm", body=sent)
            assert answer.headers["x-mgpu-consumer"] == "router/fast"
            assert answer.json()["body"].encode() == body.replace(b"gpt-mini", b"small")


async def test_a_form_names_its_model_as_well(host):
    models = {"fast": {"upstream": "small", "vram_resident_mib": 4_000}}
    form = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n\r\n%s\r\n'
        b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nfast\r\n--x--\r\n'
    ) % (b"sound" * 300_000)  # too large to be kept in memory
    kind = "Content-Type: multipart/form-data; boundary=x"
    with host.serve(consumers=consumers(models), routing=ROUTING) as broker:
        await ready(broker)
        answer = await broker.ask("POST", "/v1/stt", kind, body=form)
    assert (answer.status, answer.headers["x-mgpu-consumer"]) == (200, "router/fast")
    assert answer.json()["size"] == len(form) + 1  # "small" for "fast"
    assert host.calls() == ["router POST /v1/audio/transcriptions small"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (asks("huge"), 404, "router has no model huge; it has: small, middle, large"),
        (b'{"messages": []}', 404, "the request names no model; it has: small"),
        (asks(5), 404, "the request names no model"),
        (b"hello", 400, "this is neither"),
    ],
)
async def test_a_request_that_names_no_model_is_told_which_there_are(host, body, status, words):
    with host.serve(consumers=consumers(), routing=ROUTING) as broker:
        answer = await broker.ask("POST", "/v1/llm", body=body)
    assert answer.status == status
    assert words in answer.json()["message"]


async def test_a_model_that_nobody_named_is_met_and_measured(host):
    models = {"small": {"vram_resident_mib": 4_000}, "*": {}}
    changes = {"vram_resident_mib": "auto"}
    with host.serve(consumers=consumers(models, **changes), routing=ROUTING) as broker:
        await ready(broker)
        answer = await broker.ask("POST", "/v1/llm", body=asks("middle"))
        assert (answer.status, answer.headers["x-mgpu-consumer"]) == (200, "router/middle")
        status = await broker.until(
            "measured", lambda s: s["consumers"]["router/middle"]["gpu_resident_mib"] == 7_000
        )
        assert sorted(status["consumers"]) == ["router/middle", "router/small"]
        for wrong in ("a b", "*", "x" * 201):
            assert (await broker.ask("POST", "/v1/llm", body=asks(wrong))).status == 400


async def test_a_model_that_nobody_named_is_not_taken_for_loaded(tmp_path):
    """With a load and an unload of its own it is, until somebody looked; and work would get a 400.

    That somebody looks does not wait for the next round.
    """
    with gpu_host(tmp_path, total_mib=16_000) as host:
        host.start_router("router", mib=MIB)
        models = {"small": {"vram_resident_mib": 4_000}, "*": {"vram_resident_mib": 7_000}}
        rounds = {"interval_s": 60, "timeout_s": 5}
        told = consumers(models, **OWN_LOADS)
        with host.serve(consumers=told, routing=ROUTING, probe=rounds) as broker:
            await ready(broker)
            for model in ("small", "middle"):
                answer = await broker.ask("POST", "/v1/llm", body=asks(model))
                assert answer.status == 200, answer.body
            status = await at_rest(broker)
        assert counts(status) == (0, 2)


async def test_one_model_is_steered_by_its_name(host):
    with host.serve(consumers=consumers(), routing=ROUTING) as broker:
        await ready(broker)
        for model in ("small", "middle"):
            await broker.ask("POST", "/v1/llm", body=asks(model))
        at = "/v1/consumers/router"
        assert (await broker.ask("POST", f"{at}/pin?model=gpt-mini")).json()["consumer"] == (
            "router/small"
        )
        both = (await broker.ask("POST", f"{at}/unload")).json()["consumers"]
        assert sorted(both) == ["router/large", "router/middle", "router/small"]
        await broker.until("out", lambda s: not s["consumers"]["router/middle"]["loaded"])
        refused = await broker.ask("POST", f"{at}/load")
        assert "?model=ID, one of router/small" in refused.json()["message"]
        refused = await broker.ask("POST", f"{at}/unload?model=huge")
        assert (refused.status, refused.error) == (404, "no_consumer")


OWN_LOADS = {
    "load": {"path": "/models/load", "body": {"model": "{model}"}},
    "residency": {
        "path": "/models",
        "resident": "data[?id == {model} && status.value == 'loaded']",
    },
}


async def test_a_load_is_over_when_the_service_says_that_it_is(tmp_path):
    """It answers a load before it is done: work that came then would be refused with a 500."""
    with gpu_host(tmp_path, total_mib=16_000) as host:
        host.start_router("router", mib=MIB, load_s=1)
        with host.serve(consumers=consumers(**OWN_LOADS), routing=ROUTING) as broker:
            await ready(broker)
            for model in ("small", "large", "small"):
                answer = await broker.ask("POST", "/v1/llm", body=asks(model))
                assert answer.status == 200, answer.body
            await at_rest(broker)


async def test_what_works_is_drained_before_it_is_unloaded(tmp_path):
    """Unloaded at work, the service cuts its stream, and calls it loaded for a long time still."""
    with gpu_host(tmp_path, total_mib=16_000) as host:
        host.start_router("router", mib=MIB)
        with host.serve(consumers=consumers(**OWN_LOADS), routing=ROUTING) as broker:
            await ready(broker)
            stream = broker.ask(
                "POST", "/v1/llm", "X-Upstream: do=stream chunks=5 gap=0.2", body=asks("middle")
            )
            streamed = asyncio.create_task(stream)
            await broker.until("at work", lambda s: s["consumers"]["router/middle"]["active"])
            answer = await broker.ask("POST", "/v1/llm", body=asks("large"))
            assert answer.status == 200
            assert (await streamed).body.count(b"data: ") == 5


async def test_a_model_that_was_unloaded_past_the_broker_is_loaded_again(tmp_path):
    with gpu_host(tmp_path, total_mib=16_000) as host:
        router = host.start_router("router", mib=MIB)
        with host.serve(consumers=consumers(**OWN_LOADS), routing=ROUTING) as broker:
            await ready(broker)
            await broker.ask("POST", "/v1/llm", body=asks("small"))
            await Address(router.port).ask(
                "POST", "/models/unload", "Content-Type: application/json", body=asks("small")
            )
            await broker.until("out", lambda s: not s["consumers"]["router/small"]["loaded"])
            assert (await broker.ask("POST", "/v1/llm", body=asks("small"))).status == 200


async def test_what_is_unloaded_at_work_ends_as_the_service_ends_it(tmp_path):
    """Its stream looks complete, and who comes meanwhile waits for the model to be loaded anew."""
    with gpu_host(tmp_path, total_mib=16_000) as host:
        router = host.start_router("router", mib=MIB, autoload=True)
        with host.serve(consumers=consumers(), routing=ROUTING) as broker:
            await ready(broker)
            await broker.ask("POST", "/v1/llm", body=asks("small"))
            order = "X-Upstream: do=stream chunks=900 gap=0.1"
            stream = broker.ask("POST", "/v1/llm", order, body=asks("small"))
            streamed = asyncio.create_task(stream)
            await broker.until("at work", lambda _: router.stats()["active"])
            kind = "Content-Type: application/json"
            await Address(router.port).ask("POST", "/models/unload", kind, body=asks("small"))
            later = asyncio.create_task(broker.ask("POST", "/v1/llm", body=asks("small")))
            broken_off = await streamed
            assert (broken_off.status, broken_off.complete) == (200, True)
            assert broken_off.body.endswith(b"proxy error: Failed to read connection")
            assert (await later).status == 200


async def test_a_model_that_finds_no_memory_is_an_error_of_its_service(tmp_path):
    with gpu_host(tmp_path, total_mib=6_000) as host:
        host.start_router("router", mib=MIB, autoload=True)
        models = {"large": {"vram_resident_mib": 4_000}}  # it takes more
        with host.serve(consumers=consumers(models), routing=ROUTING) as broker:
            await ready(broker)
            answer = await broker.ask("POST", "/v1/llm", body=asks("large"))
            assert (answer.status, answer.json()["error"]["message"]) == (
                500,
                "model name=large failed to load",
            )

"""The traps that services set for whoever sits in front of them, over HTTP.

Each has a scenario that goes well with the broker as it is, and the same with the guard taken out:
then what the guard is there for happens.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mgpu_core import completions, memory, swaps
from mgpu_core.state import Swap
from mgpu_core.transitions import Turn
from mgpu_effects import presets
from tests.support.comfyui import ComfyUI, comfyui
from tests.support.dev_http import free_port
from tests.support.facade import Address, Answer, Facade, facade
from tests.support.gpu_host import ROOT, WORKFLOW, gpu_host
from tests.support.stand_ins.base import StandIn
from tests.support.stand_ins.host import Host, Rival, host, probed
from tests.support.stand_ins.kokoro import Kokoro
from tests.support.stand_ins.ollama import CONTEXT_MIB, Ollama
from tests.support.stand_ins.process import command
from tests.support.stand_ins.speaches import Speaches
from tests.support.stand_ins.tabbyapi import KEY, TabbyApi
from tests.support.stand_ins.vllm import Vllm
from tests.support.stand_ins.webui import Forge
from tests.support.stand_ins.whisper import MODEL, Whisper
from tests.support.upstream import eventually

FORM = "Content-Type: multipart/form-data; boundary=x"
SOUND = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF1234\r\n'
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\none\r\n--x--\r\n'
)

guarded = pytest.mark.parametrize("guard", [True, False], ids=["guarded", "unguarded"])


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[Host]:
    async with host(tmp_path) as at:
        yield at


async def out(broker: Facade, name: str) -> None:
    await broker.ask("POST", f"/v1/consumers/{name}/unload")
    await broker.until("out", lambda s: not s["consumers"][name]["loaded"])


async def speak(broker: Address) -> Answer:
    return await broker.ask("POST", "/v1/tts", body=b'{"text": "Hello."}')


# ------------------------------------------------------------------------------ ComfyUI: POST /free


@asynccontextmanager
async def pictures_in(
    at: Host,
    scheduler: dict[str, Any] | None = None,
    *,
    frees_s: float = 0.05,
    probe_s: float = 0.1,
    **keys: Any,
) -> AsyncIterator[tuple[Facade, ComfyUI, Rival]]:
    """Have ComfyUI hold most of the card, idle, and a rival that wants it."""
    async with comfyui(card=at.card, frees_s=frees_s) as service:
        job = {**presets.preset("comfyui").consumer["job"], "poll_s": 0.02}
        keys = {"job": job, **keys}
        await at.add(service, preset="comfyui", vram_resident_mib=service.mib, **keys)
        rival = await at.add_rival()
        async with at.broker(
            image="comfyui", tts="rival", scheduler=scheduler, probe_s=probe_s
        ) as broker:
            await probed(broker)
            await out(broker, "rival")
            assert (await broker.ask("POST", "/v1/image", body=WORKFLOW)).status == 200
            service.end(service.running[0])
            await broker.until("drawn", lambda s: s["scheduler"]["in_flight"] == 0)
            await probed(broker)
            yield broker, service, rival


@guarded
async def test_free_is_answered_long_before_it_gives_memory_back(
    at: Host, monkeypatch: pytest.MonkeyPatch, *, guard: bool
) -> None:
    """The guard: a swap waits until the card shows the memory."""

    def believe(d: Any, swap: Swap) -> bool:
        return swaps._load(d, d.turn(swap, Turn.ROOM))

    if not guard:
        monkeypatch.setattr(swaps, "_settle", believe)
    frees_s = 0.4 if guard else 30
    async with pictures_in(at, frees_s=frees_s, unload_again_s=None) as (broker, service, rival):
        answer = await speak(broker)
        assert service.times("POST /free") == 1
        if guard:
            assert (answer.status, rival.held_mib()) == (200, rival.mib)
        else:
            assert (answer.error, rival.held_mib()) == ("load_failed", 0)


@guarded
async def test_free_during_a_prompt_would_wait_for_its_end(at: Host, *, guard: bool) -> None:
    """The guard: `busy`; somebody draws on the page, past the broker."""
    keys = {"unload_again_s": None, **({} if guard else {"busy": None})}
    scheduler = {"settle_timeout_s": 0.3}
    async with pictures_in(at, scheduler, probe_s=0.5, **keys) as (broker, service, rival):
        await Address(int(service.url.rpartition(":")[2])).ask("POST", "/prompt", body=WORKFLOW)
        await probed(broker)
        spoken = asyncio.create_task(speak(broker))
        if guard:
            await broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)
            await probed(broker)
            assert service.times("POST /free") == 0
            service.end(service.running[0])
            assert ((await spoken).status, service.freed) == (200, 1)
            assert rival.held_mib() == rival.mib
        else:
            row = await broker.until("told", lambda s: s["consumers"]["comfyui"]["leaky"])
            assert (service.flagged, service.freed, len(service.running)) == (True, 0, 1)
            assert row["scheduler"]["in_flight"] == 0
            spoken.cancel()


@guarded
async def test_free_while_its_worker_is_at_something_else_is_lost(at: Host, *, guard: bool) -> None:
    """The guard: `unload_again_s`. The flag that nobody saw stays, and no memory comes free."""
    keys = {} if guard else {"unload_again_s": None}
    scheduler = {"settle_timeout_s": 0.5, "queue_timeout_s": 1.5 if not guard else 20}
    async with pictures_in(at, scheduler, **keys) as (broker, service, rival):
        service.collecting = True  # behind another /free, or garbage
        spoken = asyncio.create_task(speak(broker))
        await eventually(lambda: service.flagged)
        service.collecting = False
        answer = await spoken
        if guard:
            assert (answer.status, rival.held_mib()) == (200, rival.mib)
            assert (service.times("POST /free"), service.freed) == (2, 1)
        else:
            assert (answer.error, at.card.held_mib) == ("queue_timeout", {"comfyui": service.mib})
            assert (service.times("POST /free"), service.freed) == (1, 0)


# --------------------------------------------------------------------- ComfyUI: its empty histories

HISTORY = "/history/{id}"
# Two that ask only the history: it is over when it is there; it is over when it is not there.
BY_HISTORY = {"path": HISTORY, "when": "@ != `{}`"}
BY_NO_HISTORY = {"path": HISTORY, "when": "@ == `{}`"}
OVER = presets.preset("comfyui").consumer["job"]["over"]


@asynccontextmanager
async def waiting_behind_a_page(at: Host, over: Any) -> AsyncIterator[tuple[Facade, ComfyUI, str]]:
    """Give the id of a prompt of ours that waits for one that somebody sent past the broker."""
    async with comfyui() as service:
        job = {**presets.preset("comfyui").consumer["job"], "poll_s": 0.02, "over": over}
        await at.add(service, preset="comfyui", job=job)
        async with at.broker(image="comfyui") as broker:
            await probed(broker)
            await Address(int(service.url.rpartition(":")[2])).ask("POST", "/prompt", body=WORKFLOW)
            answer = await broker.ask("POST", "/v1/image", body=WORKFLOW)
            assert service.pending == [answer.json()["prompt_id"]]
            yield broker, service, service.pending[0]


async def asked_again(service: ComfyUI, path: str) -> None:
    before = service.times(f"GET {path}")
    await eventually(lambda: service.times(f"GET {path}") >= before + 2)


@pytest.mark.parametrize("over", [OVER, BY_NO_HISTORY], ids=["guarded", "unguarded"])
async def test_a_prompt_that_waits_is_in_no_history_and_is_not_over(at: Host, over: Any) -> None:
    """The guard: the queue is asked first."""
    async with waiting_behind_a_page(at, over) as (broker, service, ours):
        if over is OVER:
            await asked_again(service, "/queue")
            assert (await broker.status())["scheduler"]["in_flight"] == 1
            service.end(service.running[0])  # the page's
            service.end(ours)
        status = await broker.until("over", lambda s: s["scheduler"]["in_flight"] == 0)
        assert (service.pending == [ours]) is (over is not OVER)
    assert status["scheduler"]["total_jobs"] == 1


@pytest.mark.parametrize("over", [OVER, BY_HISTORY], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("how", ["deleted", "restarted"])
async def test_a_prompt_that_is_gone_is_in_no_history_and_is_over(
    at: Host, over: Any, how: str
) -> None:
    """The guard: as before. Else it holds its slot for as long as `job.timeout_s`."""
    async with waiting_behind_a_page(at, over) as (broker, service, ours):
        service.pending.clear()
        if how == "restarted":
            service.running.clear()
            service.history.clear()
        if over is OVER:
            await broker.until("over", lambda s: s["scheduler"]["in_flight"] == 0)
        else:
            await asked_again(service, f"/history/{ours}")
            assert (await broker.status())["scheduler"]["in_flight"] == 1


# -------------------------------------------------------- Speaches: a 409 that orphans the model


@guarded
async def test_a_model_in_use_that_is_told_to_go_is_an_orphan(at: Host, *, guard: bool) -> None:
    """The guard: `on_client_gone: drain`. It works on when its client has left."""
    keys = {} if guard else {"on_client_gone": "close"}
    models = {"one": {"vram_resident_mib": 8_000}}
    service = await at.add(
        Speaches(at.card, {"one": 8_000}), preset="speaches", models=models, **keys
    )
    rival = await at.add_rival()
    async with at.broker(stt="speaches", tts="rival") as broker:
        await probed(broker)
        await out(broker, "rival")
        service.go.clear()
        async with broker.connect() as client:
            await client.send("POST", "/v1/stt", FORM, body=SOUND)
            await eventually(lambda: service.working == 1)
            (job,) = broker.broker._executor._jobs.values()
        await asyncio.wait_for(job.gone.wait(), 10)
        spoken = asyncio.create_task(speak(broker))
        if guard:
            await broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)
            await probed(broker)
            assert at.times("speaches DELETE /api/ps/one") == 0
            service.go.set()
            assert (await spoken).status == 200
            assert (service.orphans, service.held_mib("/one")) == ([], 0)
            assert rival.held_mib() == rival.mib
        else:
            await eventually(lambda: service.orphans == ["one"])
            service.go.set()
            await eventually(lambda: service.working == 0)
            assert (service.listed, service.held_mib("/one")) == ([], 8_000)
            spoken.cancel()


# ------------------------------------------------ whisper.cpp: a load that failed spoils its health

LARGE = '--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nlarge.bin\r\n--x--\r\n'
LOAD = {
    "path": "/load",
    "headers": {"Content-Type": "multipart/form-data; boundary=x"},
    "body": LARGE,
}


def driven(at: Host, **keys: Any) -> None:
    """Have the broker start and stop it."""
    port = free_port()
    run = {"command": command("whisper-server", port, at.directory), "cwd": str(ROOT)}
    at.consumers["whisper-server"] = {
        "url": f"http://127.0.0.1:{port}",
        "preset": "whisper-server",
        "vram_resident_mib": 2_100,
        "driver": {"process": {**run, "grace_s": 4}},
        **keys,
    }


async def looked_at(broker: Facade) -> None:
    """Wait for a probe that began after this call, whatever it saw."""
    for _ in range(2):
        before = (await broker.status())["consumers"]["whisper-server"]["last_probe"]
        broker.broker._watch.probe("whisper-server")
        await broker.until(
            "probed",
            lambda s, before=before: s["consumers"]["whisper-server"]["last_probe"] > before,
        )


def spoilt(status: Any) -> bool:
    row = status["consumers"]["whisper-server"]
    return (row["healthy"], row["error"]) == (False, "http_404")


async def hear(broker: Address) -> Answer:
    return await broker.ask("POST", "/v1/stt", FORM, body=SOUND)


@guarded
async def test_a_load_that_fails_is_told_at_once_and_tried_again_later(
    at: Host, monkeypatch: pytest.MonkeyPatch, *, guard: bool
) -> None:
    """The guard: only an answer that says success is one. It works on with its old model."""
    monkeypatch.setattr(completions, "FIRST_COOLDOWN_US", 100_000)
    driven(at, load=LOAD if guard else {**LOAD, "ok": [200, 400]})
    async with at.broker(stt="whisper-server") as broker:
        answer = await hear(broker)
        if not guard:
            assert (answer.status, answer.headers["x-model"]) == (200, "tiny.bin")
            return
        assert (answer.status, answer.error) == (503, "load_failed")
        assert "whisper-server failed to load (http_400)" in answer.json()["message"]
        await broker.until("spoilt", spoilt)

        (at.directory / "models" / "large.bin").write_bytes(MODEL)
        await eventually(lambda: _cooled_down(broker))
        answer = await hear(broker)
        assert (answer.status, answer.headers["x-model"]) == (200, "large.bin")
        await broker.until("well", lambda s: s["consumers"]["whisper-server"]["healthy"])


def _cooled_down(broker: Facade) -> bool:
    cooldown = broker.broker.state.consumers["whisper-server"].load_cooldown
    return cooldown is None or cooldown.until < broker.broker._clock.now()


@guarded
async def test_a_health_that_is_spoilt_for_ever_ends_with_its_process(
    at: Host, *, guard: bool
) -> None:
    """The guard: a driver. Without one it is refused, at once and with a reason, for ever."""
    if guard:
        driven(at)
    else:
        await at.add(Whisper(at.card), preset="whisper-server", vram_resident_mib=2_100)
    async with at.broker(stt="whisper-server") as broker:
        assert (await hear(broker)).status == 200
        port = int(at.consumers["whisper-server"]["url"].rpartition(":")[2])
        assert (await Address(port).ask("POST", "/load", FORM, body=SOUND)).status == 400
        await broker.until("spoilt", spoilt)
        if guard:
            assert (await hear(broker)).status == 200  # it works all the same
            await out(broker, "whisper-server")
            assert (await hear(broker)).status == 200
            await broker.until("well", lambda s: s["consumers"]["whisper-server"]["healthy"])
        else:
            for _ in range(2):
                answer = await hear(broker)
                assert (answer.status, answer.error) == (503, "consumer_unreachable")
                assert "http_404" in answer.json()["message"]
                await looked_at(broker)


# ----------------------------------------------------------- Ollama: sizes without the CUDA context


@guarded
async def test_sizes_without_the_context_would_sell_it_twice(at: Host, *, guard: bool) -> None:
    """The guard: `residency` without `mib`. The card holds what is declared, as it shows it."""
    residency = presets.preset("ollama").consumer["residency"]
    assert "mib" not in residency
    if not guard:
        residency = {**residency, "mib": "sum(models[?name == {model}].size_vram)"}
    models = {"one": {"vram_resident_mib": 5_600}}
    ollama = await at.add(
        Ollama(at.card, {"one": 5_600}), preset="ollama", models=models, residency=residency
    )
    rival = await at.add_rival(10_500)
    blind = {"sampler": "none", "total_mib": 16_000}  # 16,100 would be more than there is
    async with at.broker(llm="ollama", tts="rival", gpu=blind) as broker:
        await out(broker, "rival")
        chat = await broker.ask("POST", "/v1/llm", body=b'{"model": "one", "messages": []}')
        assert (chat.status, ollama.held_mib("/one")) == (200, 5_600)
        assert ollama.sizes_mib["one"] == 5_600 - CONTEXT_MIB
        await probed(broker)
        answer = await speak(broker)
        if guard:
            assert (answer.status, ollama.held_mib("/one"), rival.held_mib()) == (200, 0, 10_500)
        else:
            assert (answer.error, ollama.held_mib("/one"), rival.held_mib()) == (
                "load_failed",
                5_600,
                0,
            )


# ------------------------------------------------------------------- unloads that cancel what works

CHAT = b'{"model": "one", "messages": []}'
# How each is loaded at first, by its own work; and its preset's keys beside.
CANCELLING = {
    "kokoro": (Kokoro, {}),
    "tabbyapi": (
        TabbyApi,
        {
            "load": {"path": "/v1/model/load", "body": {"model_name": "one"}},
            "headers": {"x-admin-key": KEY},
        },
    ),
    "vllm": (Vllm, {}),
}


def nobody_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out the guard: who serves is waited for."""
    monkeypatch.setattr(memory, "at_work", lambda _d, _name: False)
    monkeypatch.setattr(swaps, "at_work", lambda _d, _name: False)


@guarded
@pytest.mark.parametrize("name", CANCELLING)
async def test_what_works_for_us_is_not_unloaded(
    name: str, at: Host, monkeypatch: pytest.MonkeyPatch, *, guard: bool
) -> None:
    make, keys = CANCELLING[name]
    service: StandIn = make(at.card)
    await at.add(service, preset=name, vram_resident_mib=service.mib, **keys)
    rival = await at.add_rival(14_500)
    (kind,) = presets.preset(name).consumer["paths"]
    own = "image" if kind == "tts" else "tts"
    if not guard:
        nobody_is_at_work(monkeypatch)
    # Two at once on the card: else the slot alone would hold the rival back.
    async with at.broker(gpu={"max_parallel": 2}, **{kind: name, own: "rival"}) as broker:
        await probed(broker)
        await out(broker, "rival")
        service.go.clear()
        working = asyncio.create_task(broker.ask("POST", f"/v1/{kind}", body=CHAT))
        await eventually(lambda: service.working == 1)
        await probed(broker)
        asked = asyncio.create_task(broker.ask("POST", f"/v1/{own}", body=b"{}"))
        if guard:
            await broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)
            await probed(broker)
            assert (service.working, service.broken) == (1, 0)
            service.go.set()
            assert ((await working).status, (await asked).status) == (200, 200)
            assert rival.held_mib() == rival.mib
        else:
            await eventually(lambda: service.broken == 1)
            answer = await working
            assert answer.status >= 500 or not answer.complete
            await asked


@guarded
async def test_what_a_page_draws_past_the_broker_is_not_unloaded(at: Host, *, guard: bool) -> None:
    """The guard: `busy`. Forge's unload does not wait for the job under way."""
    service = Forge(at.card, loaded=True)
    keys = {} if guard else {"busy": None}
    await at.add(service, preset="forge", vram_resident_mib=service.mib, **keys)
    rival = await at.add_rival()
    async with at.broker(image="forge", tts="rival", probe_s=0.5) as broker:
        await probed(broker)
        await out(broker, "rival")
        assert (await broker.ask("POST", "/v1/image", body=b"{}")).status == 200
        service.go.clear()
        drawn = asyncio.create_task(
            Address(service.port).ask("POST", "/sdapi/v1/txt2img", body=b"{}")
        )
        await eventually(lambda: service.working == 1)
        await probed(broker)
        spoken = asyncio.create_task(speak(broker))
        if guard:
            await broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)
            await probed(broker)
            assert (service.working, service.broken) == (1, 0)
            service.go.set()
            assert ((await drawn).status, (await spoken).status) == (200, 200)
            assert rival.held_mib() == rival.mib
        else:
            await eventually(lambda: service.broken == 1)
            with pytest.raises((OSError, EOFError)):
                await drawn
            await spoken


@guarded
async def test_a_model_that_streams_is_not_unloaded_by_its_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, guard: bool
) -> None:
    """Told to unload while it works, the router takes it down in mid-stream."""
    if not guard:
        nobody_is_at_work(monkeypatch)
    mib = {"small": 9_000, "large": 12_000}
    router = {
        "paths": {"llm": {"path": "/v1/chat/completions"}},
        "unload": {"path": "/models/unload", "body": {"model": "{model}"}},
        "max_concurrency": 4,
        "models": {name: {"vram_resident_mib": each} for name, each in mib.items()},
    }
    with gpu_host(tmp_path) as gpu:
        url = gpu.start_router("router", mib=mib, autoload=True, lingers_s=0.3).url
        content = {
            "listen": "127.0.0.1:0",
            "gpu": {"sampler": "simulated", "poll_interval_s": 0.05, "max_parallel": 2},
            "probe": {"interval_s": 0.1},
            "routing": {"llm": "router"},
            "consumers": {"router": {"url": url, **router}},
        }
        async with facade(tmp_path, content) as broker:
            await probed(broker)
            body = b'{"model": "%s", "messages": []}'
            unload = "router POST /models/unload small"
            async with broker.connect() as client:
                await client.send("POST", "/v1/llm", "X-Upstream: do=never", body=body % b"small")
                await eventually(lambda: "router/small" in gpu.card.held_mib)
                await probed(broker)
                asked = asyncio.create_task(broker.ask("POST", "/v1/llm", body=body % b"large"))
                if guard:
                    await broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)
                    await probed(broker)
                    assert unload not in gpu.calls()
                else:
                    await eventually(lambda: unload in gpu.calls())
            answer = await asked
            assert (answer.status, "router/large" in gpu.card.held_mib) == (200, True)
            assert unload in gpu.calls()

"""What each preset states of its service, through the broker and against a stand-in for it.

tests/effects/test_stand_ins.py holds the stand-ins against what real servers were recorded to
answer; llama-router is in test_models.py, ComfyUI's jobs in tests/effects/test_following.py.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from mgpu_effects import presets
from mgpu_effects.calls import control_session
from mgpu_effects.config_file import load_settings
from mgpu_effects.probes import ProbeFacts
from mgpu_effects.services import Services
from mgpu_effects.settings import (
    KINDS,
    ConsumerSettings,
    ResidencySettings,
    SchedulerSettings,
)
from mgpu_effects.units import units
from tests.support.comfyui import comfyui
from tests.support.dev_http import free_port
from tests.support.facade import Address, Facade, write_config
from tests.support.gpu_host import ROOT, WORKFLOW
from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn
from tests.support.stand_ins.faster_whisper import FasterWhisper
from tests.support.stand_ins.host import Host, host, probed
from tests.support.stand_ins.koboldcpp import KoboldCpp
from tests.support.stand_ins.kokoro import Kokoro
from tests.support.stand_ins.llama_server import LlamaServer
from tests.support.stand_ins.lm_studio import LmStudio
from tests.support.stand_ins.mvoice import Mvoice
from tests.support.stand_ins.ollama import Ollama
from tests.support.stand_ins.piper import Piper
from tests.support.stand_ins.process import command
from tests.support.stand_ins.speaches import Speaches
from tests.support.stand_ins.tabbyapi import KEY, TabbyApi
from tests.support.stand_ins.vllm import Vllm
from tests.support.stand_ins.webui import Automatic1111, Forge
from tests.support.stand_ins.whisper import Whisper
from tests.support.upstream import eventually

JSON = "application/json"
FORM = "multipart/form-data; boundary=x"
SOUND = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF1234\r\n'
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\none\r\n--x--\r\n'
)
MODEL = {"models": {"one": {"vram_resident_mib": 6_000}}}
CHAT = (
    JSON,
    json.dumps({"model": "one", "messages": [{"role": "user"}], "stream": False}).encode(),
)
SPEECH = (JSON, json.dumps({"model": "one", "input": "Hello.", "voice": "af_heart"}).encode())
TEXT = (JSON, b'{"text": "Hello."}')
PICTURE = (JSON, b'{"prompt": "a cat"}')


@dataclass(frozen=True)
class Case:
    """A preset, what stands in for its service, and work of each of its kinds."""

    make: Callable[[Card], StandIn]
    work: dict[str, tuple[str, bytes]]
    beside: dict[str, Any] = field(default_factory=dict)
    what: str = ""  # which of its models holds the memory

    @property
    def model(self) -> bool:
        return "models" in self.beside


TABBY_LOAD = {"path": "/v1/model/load", "body": {"model_name": "one"}}
TABBY = {"load": TABBY_LOAD, "headers": {"x-admin-key": KEY}}
CASES = {
    # Two that nobody can ask: they are loaded from their start, as the broker takes them to be.
    "automatic1111": Case(lambda card: Automatic1111(card, loaded=True), {"image": PICTURE}),
    "mvoice": Case(lambda card: Mvoice(card, loaded=True), {"tts": TEXT, "stt": (FORM, SOUND)}),
    "forge": Case(Forge, {"image": PICTURE}),
    "koboldcpp": Case(KoboldCpp, {"llm": CHAT}),
    "kokoro": Case(Kokoro, {"tts": SPEECH}),
    "lm-studio": Case(lambda card: LmStudio(card, {"one": 6_000}), {"llm": CHAT}, MODEL, "/one"),
    "ollama": Case(lambda card: Ollama(card, {"one": 6_000}), {"llm": CHAT}, MODEL, "/one"),
    "speaches": Case(
        lambda card: Speaches(card, {"one": 6_000}),
        {"stt": (FORM, SOUND), "tts": SPEECH},
        MODEL,
        "/one",
    ),
    "tabbyapi": Case(TabbyApi, {"llm": CHAT}, TABBY),
    "vllm": Case(Vllm, {"llm": CHAT}),
}
# Those that a driver starts and stops: nothing else brings them in or out.
DRIVEN = {
    "faster-whisper-server": Case(FasterWhisper, {"stt": (FORM, SOUND)}),
    "llama-server": Case(LlamaServer, {"llm": CHAT}),
    "piper": Case(Piper, {"tts": TEXT}, {"gpu": 0}),
    "whisper-server": Case(Whisper, {"stt": (FORM, SOUND)}, {"models": ["one"]}),
}
ELSEWHERE = {"comfyui", "llama-router", "ollama-own-lru"}

every = pytest.mark.parametrize("name", CASES)
driven = pytest.mark.parametrize("name", DRIVEN)
both = pytest.mark.parametrize("name", CASES | DRIVEN)


def test_there_is_a_case_for_each_preset():
    assert set(presets.names()) == CASES.keys() | DRIVEN.keys() | ELSEWHERE


@pytest.mark.parametrize("name", CASES | DRIVEN)
def test_there_is_work_for_each_kind_that_it_has_a_path_for(name):
    kinds = [kind for kind in presets.preset(name).consumer["paths"] if kind in KINDS]
    assert list((CASES | DRIVEN)[name].work) == kinds


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[Host]:
    async with host(tmp_path) as at:
        yield at


async def add(at: Host, name: str, **beside: Any) -> StandIn:
    case = (CASES | DRIVEN)[name]
    service = case.make(at.card)
    mib = {} if case.model or "gpu" in beside else {"vram_resident_mib": service.mib}
    await at.add(service, preset=name, **mib, **case.beside, **beside)
    return service


async def ask(broker: Address, kind: str, work: tuple[str, bytes], path: str = "") -> Any:
    head, body = f"Content-Type: {work[0]}", work[1]
    return await broker.ask("POST", path or f"/v1/{kind}", head, body=body)


# ----------------------------------------------------------- what it says of itself, and its steps


@asynccontextmanager
async def services_of(
    at: Host, name: str, limits: SchedulerSettings | None = None
) -> AsyncIterator[tuple[Services, ConsumerSettings]]:
    """Give what carries the broker's orders out, and the one unit of the preset."""
    settings = load_settings(write_config(at.directory, {"consumers": at.consumers}))
    settings = evolve(settings, scheduler=limits or settings.scheduler)
    async with control_session() as session:
        services = Services(session, on_exit=lambda _name: None)
        services.configure(settings)
        (unit,) = units(settings).values()
        yield services, unit


async def looked_at(services: Services, unit: ConsumerSettings) -> ProbeFacts:
    async def nobody() -> Any:
        raise AssertionError

    return (await services.probe(unit.server, 5, nobody))[unit.name]


@every
async def test_its_state_is_told_and_its_steps_do_what_they_say(name: str, at: Host) -> None:
    case, service = CASES[name], await add(at, name)
    if name == "vllm":  # it claims its memory at its start
        await service.sleep(_Asks({"level": "1"}))
    kind, work = next(iter(case.work.items()))
    path = presets.preset(name).consumer["paths"][kind]["path"]
    async with services_of(at, name) as (services, unit):
        tells = isinstance(unit.residency, ResidencySettings)

        async def told(*, resident: bool, busy: bool = False) -> None:
            facts = await looked_at(services, unit)
            expected = (True, resident if tells else None, busy if unit.busy else None, None)
            assert (facts.healthy, facts.resident, facts.busy, facts.error) == expected
            assert facts.vram_mib is None

        await told(resident=False)
        if unit.load:
            assert await services.load(unit.name) is None
        if not unit.load or name == "forge":
            assert (await ask(Address(service.port), kind, work, path)).status == 200
        assert service.held_mib(case.what) == service.mib
        await told(resident=True)
        service.go.clear()
        asked = asyncio.create_task(ask(Address(service.port), kind, work, path))
        await eventually(lambda: service.working == 1)
        await told(resident=True, busy=True)
        service.go.set()
        assert (await asked).status == 200
        await told(resident=True)
        assert await services.unload(unit.name, "routes") is None
        await eventually(lambda: service.held_mib(case.what) == service.residue_mib)
        await told(resident=False)
        assert unit.vram_residue_mib == service.residue_mib
        await service.refuse()
        facts = await looked_at(services, unit)
        assert (facts.healthy, facts.failure) == (False, "refused")


class _Asks:
    """As much of a request as a stand-in looks at."""

    def __init__(self, query: dict[str, str]) -> None:
        self.query = query


# ------------------------------------------------------------------------ through the whole broker


@every
async def test_it_serves_makes_room_and_comes_back(name: str, at: Host) -> None:
    case, service = CASES[name], await add(at, name)
    rival = await at.add_rival(14_500)
    kinds = dict.fromkeys(case.work, name)
    own = "image" if "tts" in kinds else "tts"
    async with at.broker(**kinds, **{own: "rival"}) as broker:
        await probed(broker)
        await out(broker, "rival")
        for kind, work in case.work.items():
            answer = await ask(broker, kind, work)
            assert (answer.status, answer.complete) == (200, True), answer.body
            path = presets.preset(name).consumer["paths"][kind]["path"]
            assert at.calls[-1] == f"{name} POST {path}"
        assert service.held_mib(case.what) == service.mib

        assert (await ask(broker, own, TEXT)).status == 200
        assert service.held_mib(case.what) == service.residue_mib
        assert rival.held_mib() == rival.mib

        for kind, work in case.work.items():
            answer = await ask(broker, kind, work)
            assert answer.status == 200, answer.body
        # Some refuse connections for a moment when they load.
        status = await broker.until(
            "well", lambda s: all(row["error"] is None for row in s["consumers"].values())
        )
    assert service.held_mib(case.what) == service.mib
    assert (service.broken, rival.broken) == (0, 0)
    assert not any(row["leaky"] for row in status["consumers"].values())


async def out(broker: Facade, name: str) -> None:
    """Have it unloaded: with a load of its own it counts as loaded at the start."""
    await broker.ask("POST", f"/v1/consumers/{name}/unload")
    await broker.until("out", lambda s: not s["consumers"][name]["loaded"])


@both
async def test_when_its_client_leaves_its_work_ends_or_is_waited_for(name: str, at: Host) -> None:
    case, service = (CASES | DRIVEN)[name], await add(at, name)
    kind, (content, body) = next(iter(case.work.items()))
    async with at.broker(**{kind: name}) as broker:
        await probed(broker)
        service.go.clear()
        async with broker.connect() as client:
            await client.send("POST", f"/v1/{kind}", f"Content-Type: {content}", body=body)
            await eventually(lambda: service.working == 1)
            (job,) = broker.broker._executor._jobs.values()
        await asyncio.wait_for(job.gone.wait(), 10)
        if presets.preset(name).consumer.get("on_client_gone") == "drain":
            await asyncio.sleep(0.1)  # in which the call would be closed
            assert (service.working, (await broker.status())["scheduler"]["in_flight"]) == (1, 1)
            service.go.set()
            await broker.until("over", lambda s: s["scheduler"]["in_flight"] == 0)
            assert service.finished == 1
        else:
            await eventually(lambda: service.working == 0)
            assert service.finished == 0
            await broker.until("over", lambda s: s["scheduler"]["in_flight"] == 0)
        service.go.set()
        assert (await ask(broker, kind, case.work[kind])).status == 200


@driven
async def test_a_driver_brings_it_in_and_out(name: str, at: Host) -> None:
    case, port = DRIVEN[name], free_port()
    probe = case.make(Card(at.directory))  # only to know its size
    at.card.give_back(probe.name)
    process = {"command": command(name, port, at.directory), "cwd": str(ROOT), "grace_s": 4}
    at.consumers[name] = {
        "url": f"http://127.0.0.1:{port}",
        "preset": name,
        "driver": {"process": process},
        "vram_resident_mib": probe.mib,
        **case.beside,
    }
    rival = await at.add_rival(15_000)
    (kind,) = case.work
    own = "image" if kind == "tts" else "tts"
    async with at.broker(**{kind: name, own: "rival"}) as broker:
        await out(broker, "rival")
        for path in ("", *presets.preset(name).consumer["paths"].keys() - set(KINDS)):
            assert (await ask(broker, kind, case.work[kind], path)).status == 200
        assert at.card.held_mib == {probe.name: probe.mib}
        status = await probed(broker)
        row = status["consumers"][name]
        assert (row["healthy"], row["loaded"], row["error"]) == (True, True, None)
        assert (await ask(broker, own, TEXT)).status == 200
        assert at.card.held_mib == {"rival": rival.mib}


# -------------------------------------------------------------------------- what only some of them


async def test_ollama_by_itself_is_only_asked_to_work(at: Host) -> None:
    ollama = await at.add(Ollama(at.card, {"one": 6_000}), preset="ollama-own-lru")
    await at.add_rival(9_000)
    async with at.broker(llm="ollama", tts="rival") as broker:
        status = await probed(broker)
        assert status["consumers"]["ollama"]["healthy"]
        await out(broker, "rival")
        assert (await ask(broker, "llm", CHAT)).status == 200
        assert (await ask(broker, "tts", TEXT)).status == 200
    assert [call for call in at.calls if "ollama" in call] == ["ollama POST /api/chat"]
    assert ollama.held_mib("/one") == 6_000


async def test_an_unload_of_ollama_is_over_when_its_requests_are(at: Host) -> None:
    service = await add(at, "ollama")
    async with services_of(at, "ollama") as (services, unit):
        service.go.clear()
        asked = asyncio.create_task(ask(Address(service.port), "llm", CHAT, "/api/chat"))
        await eventually(lambda: service.working == 1)
        unloaded = asyncio.create_task(services.unload(unit.name, "routes"))
        await eventually(lambda: "ollama POST /api/generate" in at.calls)
        assert (await looked_at(services, unit)).resident
        assert not unloaded.done()
        service.go.set()
        assert ((await asked).status, await unloaded) == (200, None)
    assert service.held_mib("/one") == 0


async def test_faster_whisper_server_that_is_silent_at_its_work_is_not_down(at: Host) -> None:
    service = await add(at, "faster-whisper-server")
    async with at.broker(stt="faster-whisper-server", probe_timeout_s=0.3) as broker:
        await probed(broker)
        service.go.clear()
        asked = asyncio.create_task(ask(broker, "stt", (FORM, SOUND)))
        await eventually(lambda: service.working == 1)
        await probed(broker)
        row = (await broker.status())["consumers"]["faster-whisper-server"]
        assert row["healthy"]
        service.go.set()
        assert (await asked).status == 200


async def test_comfyui_is_in_its_jobs_for_their_whole_length(tmp_path: Path, at: Host) -> None:
    async with comfyui(card=at.card) as pictures:
        poll = {**presets.preset("comfyui").consumer["job"], "poll_s": 0.02}
        await at.add(pictures, preset="comfyui", vram_resident_mib=pictures.mib, job=poll)
        rival = await at.add_rival()
        async with at.broker(image="comfyui", tts="rival") as broker:
            await probed(broker)
            await out(broker, "rival")
            drawn = asyncio.create_task(broker.ask("POST", "/v1/image?wait=1", body=WORKFLOW))
            await eventually(lambda: pictures.running)
            spoken = asyncio.create_task(ask(broker, "tts", TEXT))
            await broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)
            await eventually(lambda: broker.broker.state.consumers["comfyui"].busy_seen)
            assert pictures.times("POST /free") == 0
            pictures.end(pictures.running[0])
            picture, sound = await drawn, await spoken
        assert (picture.status, picture.body) == (200, b"output:of/today/a b&c.png")
        assert sound.status == 200
        assert (pictures.times("POST /free"), pictures.freed) == (1, 1)
        assert at.card.held_mib == {"comfyui": 500, "rival": rival.mib}


@pytest.mark.parametrize("status", [200, 204])
async def test_speaches_says_by_its_version_how_it_unloaded(status: int, at: Host) -> None:
    service = await add(at, "speaches")
    service.unloaded_status = status
    async with services_of(at, "speaches") as (services, unit):
        for _ in range(2):  # the second time it is there already, or gone already
            assert await services.load(unit.name) is None
        for _ in range(2):
            assert await services.unload(unit.name, "routes") is None
    assert service.held_mib("/one") == 0


@pytest.mark.parametrize("status", [400, 503])
async def test_tabbyapi_without_a_model_is_told_from_one_that_fails(status: int, at: Host) -> None:
    service = await add(at, "tabbyapi")
    service.absent_status = status
    async with services_of(at, "tabbyapi") as (services, unit):
        facts = await looked_at(services, unit)
        assert (facts.resident, facts.error) == (False, None)
        assert await services.unload(unit.name, "routes") is None
        assert await services.load(unit.name) is None
        assert (await looked_at(services, unit)).resident


# What each needs, and how its lack shows: of the service, or of what stands beside the preset.
LACKS = [
    ("kokoro", lambda card: Kokoro(card, may_unload=False), {}, {"unload": "http_403"}),
    (
        "vllm",
        lambda card: Vllm(card, dev_mode=False),
        {},
        {"unload": "http_404", "load": "http_404"},
    ),
    (
        "tabbyapi",
        lambda card: TabbyApi(card, loaded=True),
        {"load": TABBY_LOAD},
        {"unload": "http_401", "load": "http_401"},
    ),
    # Answered as if it was done; but its residency says that it is not.
    (
        "koboldcpp",
        lambda card: KoboldCpp(card, loaded=True, admin=False),
        {},
        {"unload": "timeout"},
    ),
    ("koboldcpp", lambda card: KoboldCpp(card, admin=False), {}, {"load": "timeout"}),
]


@pytest.mark.parametrize(("name", "make", "beside", "errors"), LACKS)
async def test_what_it_needs_and_lacks_shows(
    name: str, make: Any, beside: dict[str, Any], errors: dict[str, str], at: Host
) -> None:
    service = await at.add(make(at.card), preset=name, **beside)
    held_mib = service.held_mib()
    limits = SchedulerSettings(load_timeout_s=0.5, unload_timeout_s=0.5)
    async with services_of(at, name, limits) as (services, unit):
        for what, error in errors.items():
            order = services.load(unit.name) if what == "load" else services.unload(name, "routes")
            assert await order == error
    assert service.held_mib() == held_mib


async def test_a_second_instance_in_lm_studio_is_not_unloaded_and_not_believed_to_be(
    at: Host,
) -> None:
    service = await add(at, "lm-studio")
    limits = SchedulerSettings(unload_timeout_s=0.5)
    async with services_of(at, "lm-studio", limits) as (services, unit):
        for _ in range(2):
            assert await services.load(unit.name) is None
        assert await services.unload(unit.name, "routes") == "timeout"
        assert (await looked_at(services, unit)).resident
    assert at.card.held_mib == {"lm-studio/one:2": service.models["one"]}


async def test_koboldcpp_that_starts_anew_for_long_is_waited_for(
    at: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses connections while it loads: that is not to be taken for the end of the load."""
    monkeypatch.setattr("mgpu_effects.services.UNTOLD_S", 0.1)
    service = await add(at, "koboldcpp")
    service.restart_s = 0.5
    async with services_of(at, "koboldcpp") as (services, unit):
        assert await services.load(unit.name) is None
        assert service.loaded
        assert service.held_mib() == service.mib


@pytest.mark.parametrize("name", ["automatic1111", "forge"])
async def test_a_picture_that_only_begins_is_work(name: str, at: Host) -> None:
    service = await add(at, name)
    service.begins = True
    service.take()
    async with services_of(at, name) as (services, unit):
        assert (await looked_at(services, unit)).busy is False
        service.go.clear()
        asked = asyncio.create_task(
            ask(Address(service.port), "image", PICTURE, "/sdapi/v1/txt2img")
        )
        await eventually(lambda: service.working == 1)
        assert (await looked_at(services, unit)).busy is True
        service.go.set()
        await asked

"""The six scenarios of core.md section 5: `mgpu serve`, services that hold memory, real HTTP.

tests/core/test_scenarios.py has the same for the core alone.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu_host import (
    COMFYUI,
    MVOICE,
    OLLAMA,
    WORKFLOW,
    GpuHost,
    at_rest,
    counts,
    gpu_host,
    ready,
    sampled_anew,
)
from tests.support.gpu_service import NO_PROMPT

ROUTING = {"tts": "mvoice", "llm": "ollama", "image": "comfyui"}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[GpuHost]:
    with gpu_host(tmp_path, total_mib=16_000) as host:
        yield host


def residency(status: Any) -> dict[str, tuple[str, str]]:
    return {
        name: (consumer["residency"], consumer["residency_source"])
        for name, consumer in status["consumers"].items()
    }


async def test_scenario_1_residency_at_the_start(host: GpuHost) -> None:
    consumers = {
        "managed": {"vram_managed": True},
        "both": {"load": {"path": "/load"}, "unload": {"path": "/unload"}},
        "lazy": {"unload": {"path": "/free"}},
        "unit": {"systemd_unit": "no-such-unit.service"},
        "plain": {},
    }
    for name in consumers:
        host.start(name)
    with host.serve(consumers=consumers, probe={"interval_s": 60}) as broker:
        status = await broker.status()  # before or after the first probes: it makes no difference
        await ready(broker)
        probed = await broker.status()
    expected = {
        "managed": "resident",
        "both": "resident",
        "lazy": "absent",
        "unit": "resident",
        "plain": "resident",
    }
    for said in (status, probed):
        assert {name: how for name, (how, _) in residency(said).items()} == expected
    sources = {name: source for name, (_, source) in residency(probed).items()}
    # That the unit's process answers is all that there is to see of it.
    assert sources == {**dict.fromkeys(expected, "assumed"), "unit": "probe"}
    assert host.calls() == []


async def test_scenario_2_a_resident_target_needs_no_unload(host: GpuHost) -> None:
    host.start("mvoice", mib=2_345)
    host.start("comfyui", mib=13_000, lazy=True)
    host.card.take("a game", 600)  # 55 MiB are left
    consumers = {"mvoice": MVOICE, "comfyui": COMFYUI}
    with host.serve(consumers=consumers, routing={"tts": "mvoice"}) as broker:
        await ready(broker)
        answer = await broker.ask("POST", "/v1/tts", body=b"hello")
        status = await at_rest(broker)
    assert (answer.status, answer.json()["body"]) == (200, "hello")
    assert status["gpu"][0]["free_mib"] == 55
    assert host.calls() == ["mvoice POST /tts"]
    assert counts(status) == (0, 0)


async def test_scenario_3_one_unload_one_load(host: GpuHost) -> None:
    host.start("mvoice", mib=2_800, loaded=False)
    host.start("comfyui", mib=13_000, loaded=False, lazy=True, free_s=0.3)
    routing = {"tts": "mvoice", "image": "comfyui"}
    consumers = {"mvoice": {**MVOICE, "vram_resident_mib": 2_800}, "comfyui": COMFYUI}
    with host.serve(consumers=consumers, routing=routing) as broker:
        await ready(broker)
        await broker.ask("POST", "/v1/consumers/mvoice/unload")  # it counts as loaded at first
        await broker.until("out", lambda s: not s["consumers"]["mvoice"]["loaded"])
        assert (await broker.ask("POST", "/v1/image", body=WORKFLOW)).status == 200
        await sampled_anew(broker)
        before = counts(await broker.status())
        seen = len(host.calls())

        answer = await broker.ask("POST", "/v1/tts", body=b"hello")
        status = await at_rest(broker)
    assert (answer.status, answer.json()["body"]) == (200, "hello")
    # /free only sets a flag; had it been believed, mvoice would have run out of memory.
    assert host.calls()[seen:] == ["comfyui POST /free", "mvoice POST /load", "mvoice POST /tts"]
    assert before == (1, 0)  # the operator's
    assert counts(status) == (2, 1)
    assert host.card.held_mib == {"mvoice": 2_800}
    assert residency(status)["comfyui"] == ("absent", "command")
    assert residency(status)["mvoice"] == ("resident", "command")


async def test_scenario_4_who_may_stay_beside_the_target_is_never_the_victim(
    host: GpuHost,
) -> None:
    host.start("mvoice", mib=2_345, loaded=False)
    host.start("ollama", mib=2_000)
    host.start("comfyui", mib=13_000, loaded=False, lazy=True)
    # Not `vram_managed`, which alone would spare it: it could be unloaded like anybody else.
    ollama = {
        "paths": OLLAMA["paths"],
        "vram_resident_mib": 2_000,
        "load": {"path": "/load"},
        "unload": {"path": "/unload"},
    }
    consumers = {
        "mvoice": {**MVOICE, "can_coexist_with": ["ollama"]},
        "ollama": ollama,
        "comfyui": {**COMFYUI, "can_coexist_with": ["ollama"]},
    }
    with host.serve(consumers=consumers, routing=ROUTING) as broker:
        await ready(broker)
        await broker.ask("POST", "/v1/consumers/mvoice/unload")
        await broker.until("out", lambda s: not s["consumers"]["mvoice"]["loaded"])
        assert (await broker.ask("POST", "/v1/llm", body=b"{}")).status == 200
        assert (await broker.ask("POST", "/v1/image", body=WORKFLOW)).status == 200
        await sampled_anew(broker)
        status = await at_rest(broker)
        used = {name: consumer["last_used"] for name, consumer in status["consumers"].items()}
        assert used["ollama"] < used["comfyui"]
        seen = len(host.calls())

        assert (await broker.ask("POST", "/v1/tts", body=b"hello")).status == 200
        status = await at_rest(broker)
    assert host.calls()[seen:] == ["comfyui POST /free", "mvoice POST /load", "mvoice POST /tts"]
    assert counts(status) == (2, 1)
    assert host.card.held_mib == {"ollama": 2_000, "mvoice": 2_345}


async def test_scenario_5_the_live_case(host: GpuHost) -> None:
    host.start("mvoice", mib=2_345)
    host.start("comfyui", mib=13_000, loaded=False, lazy=True)
    host.start("ollama", mib=1_000)
    consumers = {"mvoice": MVOICE, "comfyui": COMFYUI, "ollama": OLLAMA}
    with host.serve(consumers=consumers, routing=ROUTING) as broker:
        await ready(broker)
        assert residency(await broker.status()) == {
            "mvoice": ("resident", "assumed"),
            "comfyui": ("absent", "assumed"),
            "ollama": ("resident", "assumed"),
        }
        image = await broker.ask("POST", "/v1/image", body=b"{}")
        evicted = counts(await at_rest(broker))
        await sampled_anew(broker)  # it shows that comfyui took nothing
        speech = await broker.ask("POST", "/v1/tts", body=b"hello")
        status = await at_rest(broker)
    assert (image.status, json.loads(image.body)) == (400, NO_PROMPT)
    assert image.headers["x-mgpu-consumer"] == "comfyui"
    assert "x-should-retry" not in image.headers  # it is no error of the broker's
    assert evicted == (1, 0)
    assert (speech.status, speech.json()["body"]) == (200, "hello")
    assert host.calls() == [
        "mvoice POST /unload",
        "comfyui POST /prompt",
        "mvoice POST /load",
        "mvoice POST /tts",
    ]
    assert counts(status) == (1, 1)
    assert host.card.held_mib == {"ollama": 1_000, "mvoice": 2_345}


async def test_scenario_6_without_a_gpu_the_static_budget_decides(host: GpuHost) -> None:
    host.start("mvoice", mib=2_345)
    host.start("comfyui", mib=13_000, loaded=False, lazy=True)
    host.start("ollama")
    consumers = {"mvoice": MVOICE, "comfyui": COMFYUI, "ollama": OLLAMA}
    laptop = {"sampler": "none", "total_mib": 15_000}
    with host.serve(consumers=consumers, routing=ROUTING, gpu=laptop) as broker:
        await ready(broker)
        for path, body in (("tts", b"a"), ("image", WORKFLOW), ("llm", b"{}"), ("tts", b"b")):
            assert (await broker.ask("POST", f"/v1/{path}", body=body)).status == 200
        status = await at_rest(broker)
    (gpu,) = status["gpu"]
    assert (gpu["error"], gpu["at"], gpu["free_mib"]) == ("no_gpu", None, None)
    assert gpu["total_mib"] == 15_000
    assert host.calls() == [
        "mvoice POST /tts",
        "mvoice POST /unload",
        "comfyui POST /prompt",
        "ollama POST /api/chat",
        "comfyui POST /free",
        "mvoice POST /load",
        "mvoice POST /tts",
    ]
    assert counts(status) == (2, 1)
    assert host.card.held_mib == {"ollama": 0, "mvoice": 2_345}

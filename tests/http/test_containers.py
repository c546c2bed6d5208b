"""A whole `mgpu serve` whose services run in containers, on a card that they share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.dev_http import free_port
from tests.support.engine import Engine
from tests.support.gpu_host import (
    COMFYUI,
    MVOICE,
    WORKFLOW,
    GpuHost,
    at_rest,
    gpu_host,
    sampled_anew,
    service_command,
)
from tests.support.upstream import Upstream


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    engine = Engine(folder)
    yield engine
    engine.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[GpuHost]:
    with gpu_host(tmp_path, total_mib=15_000) as host:
        yield host


@pytest.mark.parametrize("command", ["docker", "podman"])
async def test_an_unload_that_frees_nothing_ends_in_a_stop_and_the_next_load_in_a_start(
    engine: Engine, host: GpuHost, command: str
) -> None:
    port = free_port()
    engine.has(
        "voice",
        "created",
        tuple(service_command(host, "mvoice", mib=2_800, loaded=False, port=port)),
    )
    host.start("comfyui", mib=13_000, loaded=False, lazy=True)
    voice = {
        **MVOICE,
        "url": f"http://127.0.0.1:{port}",
        "vram_resident_mib": 2_800,
        "driver": {"container": {"name": "voice", "engine": command}},
    }
    with host.serve(
        consumers={"mvoice": voice, "comfyui": COMFYUI},
        routing={"tts": "mvoice", "image": "comfyui"},
        scheduler={"settle_timeout_s": 0.5},
    ) as broker:
        assert (await broker.ask("POST", "/v1/tts", body=b"one")).status == 200
        Upstream(None, port).rule("/unload", leak=1)  # type: ignore[arg-type]
        await sampled_anew(broker)
        assert (await broker.ask("POST", "/v1/image", body=WORKFLOW)).status == 200
        assert host.card.held_mib == {"comfyui": 13_000}
        await sampled_anew(broker)
        assert (await broker.ask("POST", "/v1/tts", body=b"two")).status == 200
        status = await at_rest(broker)
    assert status["consumers"]["mvoice"]["leaky"] is False
    assert engine.calls == [[command, verb, "voice"] for verb in ("start", "stop", "start")]
    assert host.calls() == [
        "mvoice POST /load",
        "mvoice POST /tts",
        "mvoice POST /unload",
        "comfyui POST /prompt",
        "comfyui POST /free",
        "mvoice POST /load",
        "mvoice POST /tts",
    ]

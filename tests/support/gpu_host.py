"""A host with one simulated card, services that hold memory on it, and `mgpu serve` before them.

with gpu_host(tmp_path, total_mib=16_000) as host:
    host.start("mvoice", mib=2_345)
    with host.serve(consumers={"mvoice": MVOICE}, routing={"tts": "mvoice"}) as broker:
        answer = await broker.ask("POST", "/v1/tts", body=b"text")
    assert host.calls() == ["mvoice POST /tts"]
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from mgpu_effects.gpu import SIMULATED_GPU
from tests.support.facade import Address, ServeProcess, serve_process
from tests.support.gpu_service import Card, Habits, journal
from tests.support.router import Models
from tests.support.upstream import READY_S, Upstream

ROOT = Path(__file__).parents[2]

# What the broker is told of three services; `url` comes from the host.
MVOICE = {
    "paths": {"tts": {"path": "/tts"}, "stt": {"path": "/stt"}},
    "vram_resident_mib": 2_345,
    "vram_load_mib": 2_800,
    "load": {"path": "/load"},
    "unload": {"path": "/unload"},
}
COMFYUI = {
    "paths": {"image": {"path": "/prompt"}},
    "vram_resident_mib": 13_000,
    "unload": {"path": "/free", "body": {"unload_models": True, "free_memory": True}},
}
OLLAMA = {"paths": {"llm": {"path": "/api/chat"}}, "vram_managed": True}

WORKFLOW = json.dumps({"prompt": {"1": {"class_type": "SaveImage"}}}).encode()


@dataclass
class GpuHost:
    directory: Path
    card: Card
    services: dict[str, Upstream] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def start(self, name: str, **habits: Any) -> Upstream:
        """Run a service; see `Habits`. Ended before, it starts again on its old port."""
        port = self.services[name].port if name in self.services else 0
        return self._run(name, service_command(self, name, **{"port": port, **habits}))

    def start_router(self, name: str, **models: Any) -> Upstream:
        """Run a server of several models; see `Models`."""
        told = json.dumps(asdict(Models(name=name, directory=str(self.directory), **models)))
        return self._run(name, [sys.executable, "-m", "tests.support.router", told])

    def start_apis(self, name: str, **habits: Any) -> Upstream:
        """Run a service that OpenAI's and Anthropic's clients speak to; see `gpu_apis`."""
        told = json.dumps(asdict(Habits(name=name, directory=str(self.directory), **habits)))
        return self._run(name, [sys.executable, "-m", "tests.support.gpu_apis", told])

    def _run(self, name: str, command: list[str]) -> Upstream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        self._stack.callback(_end, process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"{name} ended with {process.wait(READY_S)}"
        self.services[name] = Upstream(process, int(line))
        return self.services[name]

    def kill(self, name: str) -> None:
        """Let it crash; the driver of a card frees what a dead process held."""
        self.services[name].kill()
        self.card.give_back(name)

    def calls(self) -> list[str]:
        """Give all requests but probes, of all services, in the order in which they came."""
        path = journal(self.directory)
        return path.read_text().splitlines() if path.exists() else []

    @contextlib.contextmanager
    def serve(
        self, *, consumers: Mapping[str, Any], gpu: Mapping[str, Any] | None = None, **changes: Any
    ) -> Iterator[ServeProcess]:
        """Run `mgpu serve` before these consumers, with the card in sight."""
        urls = {name: {"url": service.url} for name, service in self.services.items()}
        content = {
            "listen": "127.0.0.1:0",
            "gpu": {"sampler": "simulated", "poll_interval_s": 0.1, **(gpu or {})},
            "probe": {"interval_s": 0.2, "timeout_s": 5},
            "consumers": {name: {**urls.get(name, {}), **keys} for name, keys in consumers.items()},
            **changes,
        }
        with serve_process(self.directory, content) as broker:
            yield broker


@contextlib.contextmanager
def gpu_host(directory: Path, total_mib: int = 16_000) -> Iterator[GpuHost]:
    card = Card(directory)
    card.create(total_mib)
    host = GpuHost(directory, card)
    with mock.patch.dict(os.environ, {SIMULATED_GPU: str(card.path)}), host._stack:
        yield host


def service_command(host: GpuHost, name: str, **habits: Any) -> list[str]:
    """Give the command that runs a service, for a process driver too (in the directory `ROOT`)."""
    told = json.dumps(asdict(Habits(name=name, directory=str(host.directory), **habits)))
    return [sys.executable, "-m", "tests.support.gpu_service", told]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(READY_S)
    assert process.stdout is not None
    process.stdout.close()


# --------------------------------------------------------------------------- looking at a broker


async def ready(broker: Address) -> None:
    """Wait until every service was probed and the card was read, or failed to be."""
    await broker.until(
        "ready",
        lambda s: (
            all(consumer["healthy"] for consumer in s["consumers"].values())
            and all(gpu["at"] or gpu["error"] for gpu in s["gpu"])
        ),
    )


async def sampled_anew(broker: Address) -> None:
    """Wait for a reading of the card that began after this call."""
    for _ in range(2):  # the next one may have begun already
        before = (await broker.status())["gpu"][0]["at"]
        await broker.until("sampled", lambda s, before=before: s["gpu"][0]["at"] > before)


def counts(status: Any) -> tuple[int, int]:
    """Give `(evictions, loads)`."""
    return status["scheduler"]["evictions"], status["scheduler"]["loads"]


def assert_clean(status: Any) -> None:
    """Nobody waits, nobody is served, nothing is owed."""
    assert status["requests"] == []
    assert (status["scheduler"]["queue_depth"], status["scheduler"]["in_flight"]) == (0, 0)
    for name, consumer in status["consumers"].items():
        left = (consumer["active"], consumer["waiting"], consumer["owed"])
        assert left == (0, 0, False), name


async def at_rest(broker: Address) -> Any:
    """Give the status once everything is over, and make sure that nothing is left in it."""
    status = await broker.until("at rest", lambda s: not s["requests"])
    assert_clean(status)
    return status

"""A host with one simulated card, stand-ins that hold its memory, and the broker before them.

async with host(tmp_path) as host:
    kokoro = await host.add(Kokoro(host.card), preset="kokoro", vram_resident_mib=2_500)
    async with host.broker(tts="kokoro") as broker:
        answer = await broker.ask("POST", "/v1/tts", body=b"{}")
"""

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from mgpu_effects.gpu import SIMULATED_GPU
from tests.support.comfyui import ComfyUI
from tests.support.facade import Facade, facade
from tests.support.gpu_host import ready
from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn, card
from tests.support.stand_ins.mvoice import Mvoice

S = TypeVar("S", bound=StandIn | ComfyUI)


class Rival(Mvoice):
    """Somebody else who wants the card; its work is speech or a picture."""

    name = "rival"


class Host:
    def __init__(self, directory: Path, card: Card) -> None:
        self.directory, self.card = directory, card
        self.calls: list[str] = []  # of all stand-ins, in order
        self.consumers: dict[str, Any] = {}
        self._stack = contextlib.AsyncExitStack()

    async def add(self, service: S, **keys: Any) -> S:
        """Have the service run, and the broker know it by these keys."""
        if isinstance(service, StandIn):
            service.calls = self.calls
            await service.listen()
            self._stack.push_async_callback(_end, service)
        name = service.name if isinstance(service, StandIn) else "comfyui"
        self.consumers[name] = {"url": service.url, **keys}
        return service

    async def add_rival(self, mib: int = 10_000, **keys: Any) -> Rival:
        known = {"paths": {kind: {"path": "/tts"} for kind in ("tts", "image")}}
        known |= {"load": {"path": "/load"}, "unload": {"path": "/unload"}}
        rival = Rival(self.card, mib)
        return await self.add(rival, **{**known, "vram_resident_mib": mib, **keys})

    @contextlib.asynccontextmanager
    async def broker(
        self,
        *,
        probe_s: float = 0.1,
        probe_timeout_s: float = 2,
        gpu: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        **routing: str,
    ) -> AsyncIterator[Facade]:
        """Run the broker; `KIND="NAME"` says who does what.

        Who was seen at work past the broker is taken to be so for two times `probe_s`.
        """
        content = {
            "listen": "127.0.0.1:0",
            "gpu": {"sampler": "simulated", "poll_interval_s": 0.05, **(gpu or {})},
            "probe": {"interval_s": probe_s, "timeout_s": probe_timeout_s},
            "scheduler": {"shutdown_grace_s": 0, **(scheduler or {})},
            "routing": routing,
            "consumers": self.consumers,
        }
        async with facade(self.directory, content) as broker:
            yield broker

    def times(self, call: str) -> int:
        return self.calls.count(call)


async def _end(service: StandIn) -> None:
    service.go.set()
    await service.refuse()


@contextlib.asynccontextmanager
async def host(directory: Path, total_mib: int = 16_000) -> AsyncIterator[Host]:
    made = Host(directory, card(directory, total_mib))
    environment = mock.patch.dict(os.environ, {SIMULATED_GPU: str(made.card.path)})
    with environment:
        async with made._stack:
            yield made


async def probed(broker: Facade) -> Any:
    """Give the status when each consumer was probed after this call, and the card read."""
    await ready(broker)
    for _ in range(2):  # the next look may have begun already
        before = await broker.status()
        probes = {name: row["last_probe"] for name, row in before["consumers"].items()}
        for name in probes:
            broker.broker._watch.probe(name)
        broker.broker._watch.sample()
        at = before["gpu"][0]["at"]
        status = await broker.until(
            "looked at",
            lambda s, probes=probes, at=at: (
                all(s["consumers"][each]["last_probe"] > probes[each] for each in probes)
                and (at is None or s["gpu"][0]["at"] > at)
            ),
        )
    return status

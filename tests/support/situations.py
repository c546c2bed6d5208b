"""One of config/examples/ as a user runs it: stand-ins for its services, simulated cards for its
cards, the broker before them.

    async with situation(tmp_path, "two-gpus") as at:
        pictures = await at.draws()
        async with at.broker() as broker:
            answer = await broker.ask("POST", "/v1/image?wait=1", body=WORKFLOW)

The file is read as it is. What a host of tests can't have is replaced: addresses, samplers, how
often is looked, the commands of drivers, and where the log goes. At the end of `broker` everything
has to be in order: see `Situation.broker`.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from ruamel.yaml import YAML

from mgpu_core.replay import Record, Replay
from mgpu_core.state import State
from mgpu_effects import presets
from mgpu_effects.event_log import Segment, read
from mgpu_effects.gpu import SIMULATED_GPU
from tests.support.comfyui import ComfyUI, comfyui
from tests.support.dev_http import free_port
from tests.support.facade import Address, Answer, Facade, facade, write_config
from tests.support.gpu_host import ROOT, WORKFLOW, at_rest
from tests.support.gpu_service import Card, journal
from tests.support.router import Models, Router
from tests.support.stand_ins.base import StandIn
from tests.support.stand_ins.process import command
from tests.support.upstream import eventually

EXAMPLES = ROOT / "config" / "examples"
PICTURE = b"output:of/today/a b&c.png"
DESKTOP = "the desktop"
S = TypeVar("S", bound=StandIn)


class Situation:
    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.content: Any = YAML(typ="safe", pure=True).load(EXAMPLES / f"{name}.yaml")
        self.consumers: dict[str, Any] = self.content["consumers"]
        self.calls: list[str] = []  # of the stand-ins of this process but ComfyUI, in order
        self._gpus = self.content.get("gpus") or [self.content["gpu"]]
        Card(directory).create(*(gpu.get("total_mib", 0) for gpu in self._gpus))
        for index, gpu in enumerate(self._gpus):
            self.card(index).take(DESKTOP, gpu.get("reserved_mib", 0))
        self._stack = contextlib.AsyncExitStack()

    def card(self, *gpus: int) -> Card:
        return Card(self.directory, gpus or (0,))

    # ------------------------------------------------------------------------- its services

    async def add(self, service: S) -> S:
        """Have a service run in this process."""
        service.calls = self.calls
        await service.listen()
        self._stack.push_async_callback(service.refuse)
        self.consumers[service.name]["url"] = service.url
        return service

    async def draws(self) -> ComfyUI:
        """Have ComfyUI run, with as much memory for its work as the file says."""
        keys = self.consumers["comfyui"]
        mib, card = keys["vram_resident_mib"], self.card(keys.get("gpu", 0))
        service = await self._stack.enter_async_context(comfyui(card=card, mib=mib))
        job = {**presets.preset("comfyui").consumer["job"], "poll_s": 0.05}
        keys |= {"url": service.url, "job": job}
        return service

    async def routes(self, **mib: int) -> None:
        """Have a llama.cpp router run, with models of these sizes."""
        router = Router(Models("router", str(self.directory), mib, autoload=True))
        server = await asyncio.start_server(router.connection, "127.0.0.1", 0)
        self._stack.callback(server.close)
        port = server.sockets[0].getsockname()[1]
        self.consumers["router"]["url"] = f"http://127.0.0.1:{port}"

    def starts(self, name: str, **habits: Any) -> Address:
        """Have the broker run a service, by a process driver as the file has it, or in the place of
        a unit; gives where it will be.
        """
        keys, made = self.consumers[name], self.command(name, **habits)
        keys.pop("systemd_unit", None)
        process = keys.get("driver", {"process": {}})["process"]
        process |= {"command": made[0], "cwd": str(ROOT)}
        keys["driver"] = {"process": process}
        return made[1]

    def command(self, name: str, **habits: Any) -> tuple[list[str], Address]:
        """Give the command of a service that is yet to be started, and where it will be."""
        there = Address(free_port())
        self.consumers[name]["url"] = there.url
        return command(name, there.port, self.directory, **habits), there

    def router_calls(self) -> list[str]:
        """Give what the router was told and asked to do, in order."""
        path = journal(self.directory)
        return path.read_text().splitlines() if path.exists() else []

    # --------------------------------------------------------------------------- the broker

    @contextlib.asynccontextmanager
    async def broker(self) -> AsyncIterator[Facade]:
        """Run it. At the end nobody ever found too little memory, the status agrees with what the
        services hold, and the log, replayed, leads to the state that the broker is in.
        """
        async with facade(self.directory, self._on_a_test_host()) as broker:
            yield broker
            await self._status_agrees(broker)
        assert self.card().refused == []
        assert replayed(self.directory / "log") == broker.broker.state

    async def reconfigure(self, broker: Facade, consumer: str | None = None, **keys: Any) -> None:
        """Change keys of a consumer, or of the scheduler, while the broker runs."""
        part = self.consumers[consumer] if consumer else self.content["scheduler"]
        part |= keys
        write_config(self.directory, self._on_a_test_host())
        assert (await broker.ask("POST", "/v1/reload")).status == 200

    def _on_a_test_host(self) -> dict[str, Any]:
        for gpu in self._gpus:
            gpu["poll_interval_s"] = 0.05
            gpu.setdefault("sampler", "simulated")
        return self.content | {
            "listen": "127.0.0.1:0",
            "probe": {"interval_s": 0.2, "timeout_s": 5},
            "scheduler": {**self.content.get("scheduler", {}), "shutdown_grace_s": 0},
        }

    async def seen(self, broker: Facade) -> Any:
        """Give the status once nothing goes on and the cards were seen as they are now."""
        cards = self._cards()

        def so(status: Any) -> bool:
            free = [(row["free_mib"], row["error"]) for row in status["gpu"]]
            as_they_are = free in ([(card.free_mib, None) for card in cards], [(None, "no_gpu")])
            moving = {"loading", "unloading"} & {
                row["residency"] for row in status["consumers"].values()
            }
            return as_they_are and not (moving or status["requests"] or self._promised(broker))

        return await broker.until("seen", so)

    def _promised(self, broker: Facade) -> bool:
        """Without a sampler there is nothing that could end a promise."""
        return bool(broker.broker.state.promises and broker.broker.state.cards)

    def _cards(self) -> list[Card]:
        return [self.card(index) for index in range(len(self._gpus))]

    async def _status_agrees(self, broker: Facade) -> None:
        """Who is loaded holds what it is said to hold; who is not, no more than its residue."""
        await self.seen(broker)
        status, cards = await at_rest(broker), self._cards()
        for name, row in status["consumers"].items():
            held_mib = [card.held_mib.get(name, 0) for card in cards]
            told = (row["loaded"], row["gpu_resident_mib"], row["leaky"])
            if row["loaded"]:
                assert told == (True, sum(held_mib), False), name
            else:
                assert told == (False, 0, False), name
                consumer = broker.broker.state.config.consumers[name]
                assert max(held_mib) <= consumer.vram_residue_mib, name


@contextlib.asynccontextmanager
async def situation(directory: Path, name: str) -> AsyncIterator[Situation]:
    at = Situation(directory, name)
    with mock.patch.dict(os.environ, {SIMULATED_GPU: str(at.card().path)}):
        async with at._stack:
            yield at


def replayed(log: Path) -> State | None:
    """Decide everything in a log again, as it was decided; gives the state at its end."""
    replay = Replay()
    for item in read(log):
        if isinstance(item, Segment):
            replay.begin(item.state)
            continue
        assert isinstance(item, Record), item
        assert replay.state is not None
        assert (difference := replay.step(item)) is None, difference
    return replay.state


# ------------------------------------------------------------------------------- its clients


@contextlib.asynccontextmanager
async def meanwhile(asked: "asyncio.Task[Answer]") -> AsyncIterator["asyncio.Task[Answer]"]:
    """Whatever goes wrong in the block, nothing waits for the answer any more."""
    try:
        yield asked
    finally:
        asked.cancel()


@contextlib.asynccontextmanager
async def drawing(broker: Facade, pictures: ComfyUI) -> AsyncIterator[None]:
    """Ask for a picture, which is drawn for the length of the block and not cut by anybody."""
    asked = asyncio.create_task(broker.ask("POST", "/v1/image?wait=1", body=WORKFLOW))
    async with meanwhile(asked):
        await eventually(lambda: pictures.running)
        freed = pictures.times("POST /free")
        yield
        assert pictures.times("POST /free") == freed
        pictures.end(pictures.running[0])
        answer = await asked
    assert (answer.status, answer.body) == (200, PICTURE)
    assert answer.headers["x-mgpu-consumer"] == "comfyui"

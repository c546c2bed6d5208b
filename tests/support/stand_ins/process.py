"""A stand-in in a process of its own, for a driver to start and to stop.

python -m tests.support.stand_ins.process NAME PORT DIRECTORY HABITS: the cards are in that
directory; the habits, in JSON, are what the stand-in takes, and `gpus`, on which of the cards.
POST /-/hold and /-/go are for the tests: from the one to the other its work does not end.
"""

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn
from tests.support.stand_ins.faster_whisper import FasterWhisper
from tests.support.stand_ins.llama_server import LlamaServer
from tests.support.stand_ins.piper import Piper
from tests.support.stand_ins.vllm import Vllm
from tests.support.stand_ins.whisper import Whisper

KINDS: dict[str, type[StandIn]] = {
    "faster-whisper-server": FasterWhisper,
    "llama-server": LlamaServer,
    "piper": Piper,
    "vllm": Vllm,
    "whisper-server": Whisper,
}


def command(name: str, port: int, directory: Path, **habits: Any) -> list[str]:
    """Give the command that runs one, in the repository's root."""
    told = [name, str(port), str(directory), json.dumps(habits)]
    return [sys.executable, "-m", "tests.support.stand_ins.process", *told]


def control(service: StandIn) -> list[web.RouteDef]:
    async def hold(_request: web.Request) -> web.Response:
        service.go.clear()
        return web.Response()

    async def go(_request: web.Request) -> web.Response:
        service.go.set()
        return web.Response()

    return [web.post("/-/hold", hold), web.post("/-/go", go)]


async def main(name: str, port: int, directory: Path, habits: dict[str, Any]) -> None:
    card = Card(directory, tuple(habits.pop("gpus", [0])))
    service = KINDS[name](card, **habits)
    service.loaded or service.take()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await service.listen(port, control(service))
    await ended.wait()
    service.go.set()
    await service.die()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])))

"""A stand-in in a process of its own, for a driver to start and to stop.

python -m tests.support.stand_ins.process NAME PORT DIRECTORY: the card is in that directory.
"""

import asyncio
import signal
import sys
from pathlib import Path

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn
from tests.support.stand_ins.faster_whisper import FasterWhisper
from tests.support.stand_ins.llama_server import LlamaServer
from tests.support.stand_ins.piper import Piper
from tests.support.stand_ins.whisper import Whisper

KINDS: dict[str, type[StandIn]] = {
    "faster-whisper-server": FasterWhisper,
    "llama-server": LlamaServer,
    "piper": Piper,
    "whisper-server": Whisper,
}


def command(name: str, port: int, directory: Path) -> list[str]:
    """Give the command that runs one, in the repository's root."""
    return [
        sys.executable,
        "-m",
        "tests.support.stand_ins.process",
        name,
        str(port),
        str(directory),
    ]


async def main(name: str, port: int, directory: Path) -> None:
    service = KINDS[name](Card(directory))
    service.loaded or service.take()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await service.listen(port)
    await ended.wait()
    service.go.set()
    await service.die()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))

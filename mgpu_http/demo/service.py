"""One stand-in service, in a process of its own.

python -m mgpu_http.demo.service NAME PORT DIR SEED

NAME is one of `SERVICES`, DIR the directory of its card (`card.py`), and SEED decides, with the
name, about everything that is left to chance. It prints "ready" when it listens on 127.0.0.1 and
ends on SIGTERM as the real one does. It dies with `OUT_OF_MEMORY_EXIT` where it takes more memory
than is free.
"""

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

from aiohttp import web

from mgpu_http.demo.card import CardConnection
from mgpu_http.demo.services import SERVICES
from mgpu_http.demo.services.common import Service, make_runner


async def main(name: str, port: int, directory: Path, seed: str) -> None:
    card = await CardConnection.open(directory, name)
    async with asyncio.TaskGroup() as tasks:
        chance = random.Random(f"{seed} {name}")  # noqa: S311 - the same again, no secret
        service = SERVICES[name](card, chance, tasks)
        runner = make_runner(service)
        tasks.create_task(stop_on_sigterm(service, runner))
        await runner.setup()
        await service.prepare()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        print("ready", flush=True)  # noqa: T201 - whoever started it waits for that
        await service.begin()


async def stop_on_sigterm(service: Service, runner: web.AppRunner) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await stopping.wait()
    if service.finishes_requests:
        await runner.cleanup()
    await service.end()
    os._exit(0)  # connections break


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]))

"""Record the incidents of docs/debugging.md anew: `make examples`, three minutes.

Each log is written by `mgpu serve` with the configuration `was.yaml` beside it, before processes
that hold memory on a simulated card. The page then gets the new numbers, and what commands print of
the new logs; what it says about them is for people to read again.
"""

import asyncio
import gzip
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from ruamel.yaml import YAML

from tests.incidents.page import EXAMPLES, PAGE, log_of, marks, renumbered, rewritten
from tests.support.facade import Address, ServeProcess
from tests.support.gpu_host import GpuHost, at_rest, gpu_host, ready

CARD_MIB = 16_384
PATIENCE_S = 90
LEFT_S = 0.5  # between an answer and the next request of whoever got it
PATHS = {"tts": "/v1/tts", "stt": "/v1/stt", "llm": "/v1/llm", "image": "/v1/image"}
BODY = b'{"prompt": "1"}'  # nothing lazy works without


async def ask(broker: Address, kind: str, work_s: float) -> None:
    async with broker.connect() as client:
        await client.send("POST", f"{PATHS[kind]}?delay={work_s}", body=BODY)
        answer = await client.answer(limit_s=PATIENCE_S)
    assert answer.status == 200, answer
    await asyncio.sleep(LEFT_S)


async def unload(broker: Address, name: str) -> None:
    """Say that it is out: at its start the broker believes that who has both routes is in."""
    await broker.ask("POST", f"/v1/consumers/{name}/unload")
    await broker.until("out", lambda s: not s["consumers"][name]["loaded"])


async def end(broker: ServeProcess) -> None:
    """End it as systemd does, so that its log is whole."""
    await at_rest(broker)
    broker.signal(signal.SIGTERM)
    await broker.exit_code()


async def slow(host: GpuHost) -> None:
    """Two scripts have documents summed up, one by one; somebody wants to hear something."""
    host.start("piper", mib=2_500).rule("/load", delay=1.5)
    host.start("llama", mib=14_000, loaded=False).rule("/load", delay=3)
    with serve(host, "slow") as broker:
        await ready(broker)
        await unload(broker, "llama")

        async def summaries(first_s: float, count: int) -> None:
            await asyncio.sleep(first_s)
            for _ in range(count):
                await ask(broker, "llm", 9)

        scripts = [asyncio.create_task(summaries(1 + n * 4.5, 6)) for n in range(2)]
        await asyncio.sleep(7)
        await ask(broker, "tts", 0.8)
        await asyncio.gather(*scripts)
        await end(broker)


async def evicted(host: GpuHost) -> None:
    """Questions; at night a recording to write down and a picture; then questions again."""
    host.start("llama", mib=9_000, loaded=False).rule("/load", delay=8)
    host.start("whisper", mib=5_000).rule("/load", delay=1)
    host.start("sdxl", mib=6_000, loaded=False).rule("/load", delay=1)
    with serve(host, "evicted") as broker:
        await ready(broker)
        await unload(broker, "llama")
        await unload(broker, "sdxl")
        for _ in range(3):
            for _ in range(3):
                await ask(broker, "llm", 1)
            await ask(broker, "stt", 1.5)
            await ask(broker, "image", 3)
        await ask(broker, "llm", 1)
        await end(broker)


async def leaky(host: GpuHost) -> None:
    """A picture, then a question, for which the pictures' memory does not come free."""
    host.start("llama", mib=9_000, loaded=False).rule("/load", delay=3)
    sdxl = host.start("sdxl", mib=12_000, loaded=False, lazy=True)
    sdxl.rule("/free", leak=1)
    with serve(host, "leaky") as broker:
        await ready(broker)
        await unload(broker, "llama")
        await ask(broker, "image", 3)
        question = asyncio.create_task(ask(broker, "llm", 1))
        await asyncio.sleep(30)  # then somebody loses patience, and restarts it
        host.kill("sdxl")
        host.start("sdxl", mib=12_000, loaded=False, lazy=True)
        await question
        await end(broker)


INCIDENTS: dict[str, Callable[[GpuHost], Awaitable[None]]] = {
    "slow": slow,
    "evicted": evicted,
    "leaky": leaky,
}


def serve(host: GpuHost, name: str) -> AbstractContextManager[ServeProcess]:
    """Run the broker as `was.yaml` says, but for the addresses and the card."""
    settings = YAML(typ="safe").load(EXAMPLES / name / "was.yaml")
    consumers = settings.pop("consumers")
    for consumer in consumers.values():
        del consumer["url"]
    gpu = {**settings.pop("gpu"), "poll_interval_s": 2}
    return host.serve(consumers=consumers, gpu=gpu, probe={"interval_s": 5}, **settings)


async def record(name: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        with gpu_host(Path(place), total_mib=CARD_MIB) as host:
            await INCIDENTS[name](host)
        (segment,) = (Path(place) / "log").glob("events-*.jsonl")
        log = segment.read_bytes()
    log_of(name).write_bytes(gzip.compress(log, mtime=0))
    print(f"{name}: {segment.name}", flush=True)


async def main(names: Sequence[str]) -> None:
    for name in names:
        old = marks(name)
        await record(name)
        again = dict(zip(old, marks(name), strict=True))
        PAGE.write_text(renumbered(name, PAGE.read_text(), again))
    PAGE.write_text(rewritten(PAGE.read_text()))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:] or list(INCIDENTS)))

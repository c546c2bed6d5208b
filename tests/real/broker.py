"""The broker as users run it: `mgpu serve` with config.yaml, and what they ask of it over HTTP."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import environment
from watch import Watch

CONFIG = Path(__file__).with_name("config.yaml")
READY_S = 30
CALL_S = 90
STOP_S = 45  # beyond shutdown_grace_s, which is 30
OUTPUT_LINES = 60


class CheckError(Exception):
    """Something is not as it must be; the message says what."""


def check(condition: object, otherwise: str) -> None:
    if not condition:
        raise CheckError(otherwise)


def words(text: str) -> list[str]:
    """What was said: neither case nor punctuation can be heard."""
    return re.findall(r"[a-z0-9']+", text.lower())


class Answer:
    """A whole answer, and how long it took on the way to the service."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes, took_s: float) -> None:
        self.body = body
        self.took_s = took_s
        self.queued_s = int(response.headers["X-Mgpu-Queue-Ms"]) / 1000
        self.loading_s = int(response.headers["X-Mgpu-Load-Ms"]) / 1000
        self.consumer = response.headers["X-Mgpu-Consumer"]


class Client:
    """Speaks and listens through the broker."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def speak(self, text: str) -> Answer:
        """Give the WAV of the text."""
        answer = await self._post("/v1/tts", json={"text": text})
        said = answer.body
        size = int.from_bytes(said[4:8], "little") + 8
        check(said[:4] == b"RIFF" and size == len(said), f"{len(said)} bytes are no whole WAV")
        check(answer.consumer == "piper", f"/v1/tts was answered by {answer.consumer}")
        return answer

    async def listen(self, wav: bytes) -> tuple[str, Answer]:
        """Give the text that is heard in the WAV."""
        form = aiohttp.FormData()
        form.add_field("file", wav, filename="speech.wav", content_type="audio/wav")
        form.add_field("temperature", "0")  # else it tries doubtful passages again, by chance
        answer = await self._post("/v1/stt", data=form)
        check(answer.consumer == "whisper", f"/v1/stt was answered by {answer.consumer}")
        heard: str = json.loads(answer.body)["text"]
        return heard.strip(), answer

    async def status(self) -> dict[str, Any]:
        async with self._session.get("/v1/status") as response:
            status: dict[str, Any] = await response.json()
            return status

    async def _post(self, path: str, **request: Any) -> Answer:
        began = time.monotonic()
        async with self._session.post(path, **request) as response:
            body = await response.read()
            check(response.status == 200, f"POST {path}: {response.status} {body[:500]!r}")
            return Answer(response, body, time.monotonic() - began)


class Broker:
    """The process of the broker."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], output: Path) -> None:
        self.url = url
        self.process = process
        self._output = output

    async def ready(self, client: Client) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            check(self.process.poll() is None, f"mgpu serve ended: {self.process.returncode}")
            with contextlib.suppress(aiohttp.ClientConnectionError):
                await client.status()
                return
            await asyncio.sleep(0.05)
        raise CheckError(f"mgpu serve did not answer within {READY_S} s")

    def stop(self) -> int:
        """Ask it to end, insist in the end, and give its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def last_words(self) -> str:
        lines = self._output.read_text(errors="replace").splitlines()
        return "\n".join(lines[-OUTPUT_LINES:])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def running_broker(folder: Path) -> Iterator[tuple[Broker, Watch]]:
    """Start it on free ports, with its logs in `folder`; nothing lives on after the block."""
    port, piper, whisper = free_ports(3)
    voice, model = environment.models()
    variables: Mapping[str, object] = {
        "REAL_BROKER_PORT": port,
        "REAL_PIPER_PORT": piper,
        "REAL_WHISPER_PORT": whisper,
        "REAL_PYTHON": environment.PYTHON,
        "REAL_VOICE": voice,
        "REAL_MODEL": model,
        "REAL_LOG_DIR": folder / "events",
    }
    mgpu = shutil.which("mgpu", path=str(Path(sys.executable).parent))
    check(mgpu, f"no mgpu command beside {sys.executable}")
    watch = Watch({"piper": piper, "whisper": whisper})
    output = folder / "broker.log"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [str(mgpu), "serve", "--config", str(CONFIG)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {name: str(value) for name, value in variables.items()},
            start_new_session=True,  # a Ctrl-C is for us; we end the broker in order
        )
    watch.start()
    broker = Broker(f"http://127.0.0.1:{port}", process, output)
    try:
        yield broker, watch
    finally:
        if process.poll() is None:
            broker.stop()
        watch.stop()
        watch.kill_all()

"""The servers that are compared, each as a process of its own, and what they are asked for."""

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import TypeAlias

from attrs import frozen

START_S = 20.0
END_S = 10.0
# Kinds of work, by what the upstream does for them.
KINDS = {"/answer": "llm", "/stream": "tts", "/upload": "stt", "/download": "image"}
SERVICE = "worker"

Started: TypeAlias = tuple["subprocess.Popen[bytes]", int]


@frozen
class Target:
    """A server that answers what the upstream answers; `path` translates the upstream's paths."""

    name: str
    port: int
    pid: int
    broker: bool = False

    def path(self, upstream: str) -> str:
        return f"/v1/{KINDS[upstream]}" if self.broker else upstream


@contextlib.contextmanager
def servers() -> Iterator[Mapping[str, Target]]:
    """Run the upstream, and before it the two baselines and the broker."""
    with contextlib.ExitStack() as stack:

        def start(name: str, *command: str, port: str = r"(\d+)", broker: bool = False) -> Target:
            process, number = stack.enter_context(_process(command, port))
            return Target(name, number, process.pid, broker)

        direct = start("direct", "mgpu_http.bench.upstream")
        url = f"http://127.0.0.1:{direct.port}"
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="mgpu-bench-")))
        config = directory / "consumers.yaml"
        config.write_text(json.dumps(_configuration(url, directory)))
        targets = (
            direct,
            start("bare Hypercorn", "mgpu_http.bench.baselines", "bare", url),
            start("plain proxy", "mgpu_http.bench.baselines", "proxy", url),
            start(
                "mgpu",
                *("mgpu_http.cli", "serve", "--config", str(config)),
                port=r"listening on http://127\.0\.0\.1:(\d+)",
                broker=True,
            ),
        )
        yield {target.name: target for target in targets}


def _configuration(url: str, directory: Path) -> Mapping[str, object]:
    """A service that is loaded and does many things at once: nothing ever waits for memory."""
    worker = {
        "url": url,
        "health": {"path": "/health"},
        "paths": {kind: {"path": path} for path, kind in KINDS.items()},
        "vram_resident_mib": 8192,
        "max_concurrency": 64,
    }
    return {
        "listen": "127.0.0.1:0",
        "max_body_mib": 2048,
        "gpu": {"sampler": "none", "total_mib": 16384},
        "event_log": {"dir": str(directory / "log")},
        "routing": dict.fromkeys(KINDS.values(), SERVICE),
        "consumers": {SERVICE: worker},
    }


@contextlib.contextmanager
def _process(command: tuple[str, ...], port: str) -> Iterator[Started]:
    """Run a module until it has told its port. It writes into a file: nobody reads on."""
    with NamedTemporaryFile("w+", prefix="mgpu-bench-") as output:
        process = subprocess.Popen(  # noqa: S603 - our own modules
            [sys.executable, "-m", *command], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield process, _told(process, Path(output.name), port)
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _told(process: "subprocess.Popen[bytes]", output: Path, port: str) -> int:
    deadline = time.monotonic() + START_S
    while not (found := re.search(port, output.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise OSError(f"a server did not start: {output.read_text()}")
        time.sleep(0.02)
    return int(found[1])

"""The machine of the demo: its directory, its configuration, and its processes.

Every process is the leader of a group of its own and carries `MGPU_DEMO` with the directory, so
that whatever happens to the demo, its next run finds and ends what an earlier one left.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import define, field, frozen
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from mgpu_effects.drivers.driver import wait_until_ready
from mgpu_effects.drivers.group import ProcessGroup, end_leftovers, spawn
from mgpu_effects.event_log import default_dir
from mgpu_effects.gpu import SIMULATED_GPU
from mgpu_effects.settings import Settings
from mgpu_http.demo.report import Half

MARK = "MGPU_DEMO"
RESTART_S = 1.0
READY_S = 30.0
END_S = 8.0
KILLED_S = 5.0
_POLL_S = 0.05
_TAIL_LINES = 20
_LOCK = "demo.lock"
_SHIPPED = Path(__file__).with_name("consumers.yaml")
_HEAD = """\
# The configuration of `mgpu demo`, made anew by each run from the one that is shipped. Changed:
# - listen, and the url of each consumer: ports that were free
# - gpu.sampler and gpu.poll_interval_s: a simulated card, looked at often
# - probe.interval_s, scheduler: shorter times, for a run of seconds
# - routing.stt and whisper-server's driver: it hears instead of the voice, as a process that the
#   broker starts and stops, for a demo has no unit of systemd
# - event_log.dir: in the directory of the demo
"""
CHANGES: Mapping[str, Mapping[str, object]] = {
    "gpu": {"sampler": "simulated", "poll_interval_s": 0.25},
    "probe": {"interval_s": 1},
    "scheduler": {
        "restore_after_s": 5,
        "queue_timeout_s": 90,
        "shutdown_grace_s": 2,
    },
}


class DemoError(Exception):
    """The demo can't go on; the message is for the user."""


@frozen
class Place:
    """The directory of the demo. It holds one run: the next one begins by emptying it."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "consumers.yaml"

    @property
    def events(self) -> Path:
        return self.path / "events"

    def half(self, half: Half) -> Path:
        return self.path / half

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Hold it for this run, emptied. Raises DemoError where that can't or mustn't be done."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (self.path / _LOCK).exists() and any(self.path.iterdir()):
                raise DemoError(f"{self.path} holds other things: name a directory of its own")
            lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DemoError(f"cannot use {error.filename}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._empty()
            yield
        except BlockingIOError as error:
            raise DemoError(
                f"another demo runs in {self.path}: wait for its end, or name another --dir"
            ) from error
        finally:
            os.close(lock)

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()


def default_place() -> Place:
    return Place(
        default_dir({k: v for k, v in os.environ.items() if k != "STATE_DIRECTORY"}) / "demo"
    )


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def service_command(name: str, url: str, directory: Path, seed: int) -> tuple[str, ...]:
    """Give what follows `python -m`."""
    port = url.rpartition(":")[2]
    return ("mgpu_http.demo.service", name, port, str(directory), str(seed))


def write_config(place: Place, seed: int) -> None:
    """Write the shipped configuration with what a demo has to change; the comments stay."""
    shipped = _SHIPPED.read_text(encoding="utf-8").splitlines(keepends=True)
    yaml = YAML()
    yaml.width = 4096
    settings = yaml.load("".join(line for line in shipped if "$schema=" not in line))
    consumers = settings["consumers"]
    listen, *ports = free_ports(1 + len(consumers))
    settings["listen"] = f"127.0.0.1:{listen}"
    for port, consumer in zip(ports, consumers.values(), strict=True):
        consumer["url"] = f"http://127.0.0.1:{port}"
    settings["routing"]["stt"] = "whisper-server"
    for section, changed in CHANGES.items():
        for key, value in changed.items():
            _put(settings.setdefault(section, CommentedMap()), key, value)
    settings["event_log"] = {"dir": str(place.events)}
    whisper = consumers["whisper-server"]
    name, directory = "whisper-server", place.half(Half.WITH)
    service = service_command(name, whisper["url"], directory, seed)
    at = list(whisper).index("systemd_unit")
    del whisper["systemd_unit"]
    whisper.insert(at, "driver", {"process": {"command": [sys.executable, "-m", *service]}})
    with place.config.open("w", encoding="utf-8") as file:
        file.write(_HEAD)
        yaml.dump(settings, file)


def _put(mapping: Any, key: str, value: object) -> None:
    """Change it where it is, else put it behind the first key: the comments keep their places."""
    if key in mapping:
        mapping[key] = value
    else:
        mapping.insert(1, key, value)


@frozen
class World:
    """One half's processes. `broken` ends, with the reason, when card or broker went away."""

    directory: Path
    services: Mapping[str, "Program"]
    broken: asyncio.Task[str]


@define(eq=False)
class Program:
    """One process of the demo, which can be started again after its end."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    log: logging.Logger
    says: str = "ready"
    _tail: deque[str] = field(init=False, factory=lambda: deque(maxlen=_TAIL_LINES))
    _group: ProcessGroup | None = field(init=False, default=None)

    @property
    def running(self) -> bool:
        return self._group is not None and not self._group.exited.done()

    async def start(self) -> None:
        """Return when it says that it is ready. Raises DemoError with what it said instead."""
        self._tail.clear()
        try:
            group = await spawn(self.command, self.env, None, self.log, self._tail)
        except OSError as error:
            raise DemoError(f"{self.name} does not start: {error.strerror}") from error
        self._group = group

        async def ready() -> bool:
            return any(self.says in line for line in self._tail)

        async def ended() -> str | None:
            return f"it ended with {group.exited.result()}" if group.exited.done() else None

        if why := await wait_until_ready(ready, ended, READY_S, _POLL_S):
            await self.end()
            raise DemoError(f"{self.name} did not start: {why}. It said:\n{self.last_words()}")

    async def ended(self) -> None:
        if self._group is not None:
            await asyncio.wait((self._group.exited,))

    async def keep_running(self) -> None:
        """Start it again whenever it ends, as `Restart=always` of systemd does."""
        while True:
            await self.ended()
            await self.end()
            await asyncio.sleep(RESTART_S)
            with contextlib.suppress(DemoError):  # its log has it, and it is tried again
                await self.start()

    async def end(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        group.ending = True
        group.signal(signal.SIGTERM)
        if not await group.gone(END_S):
            group.signal(signal.SIGKILL)
            await group.gone(KILLED_S)
        await group.drain()

    def last_words(self) -> str:
        return "\n".join(f"  {line}" for line in self._tail) or "  nothing"


@contextlib.asynccontextmanager
async def world(place: Place, settings: Settings, half: Half, seed: int) -> AsyncIterator[World]:
    """Run one half's processes: card and services, and in the half `with` the broker before them.

    What the broker's configuration has it start itself is left to it. Raises DemoError.
    """
    directory = place.half(half)
    directory.mkdir()
    with _logs(directory) as log:
        env = {
            SIMULATED_GPU: str(directory / "card.json"),
            MARK: str(place.path),
            "PYTHONUNBUFFERED": "1",
        }

        def program(name: str, command: Sequence[str], says: str = "ready") -> Program:
            return Program(name, (sys.executable, "-m", *command), env, log(name), says)

        gpu = settings.gpus[0]
        sizes = (str(gpu.total_mib), str(gpu.reserved_mib))
        card = program("card", ("mgpu_http.demo.card", str(directory), *sizes))
        services = {
            name: program(name, service_command(name, consumer.url, directory, seed))
            for name, consumer in settings.consumers.items()
            if half is Half.WITHOUT or consumer.driver is None
        }
        serve = ("mgpu_http.cli", "serve", "--config", str(place.config))
        fronts = [program("broker", serve, "listening on")] if half is Half.WITH else []
        async with _running(place, [card], list(services.values()), fronts) as broken:
            yield World(directory, services, broken)


@contextlib.asynccontextmanager
async def _running(
    place: Place, cards: list[Program], services: list[Program], fronts: list[Program]
) -> AsyncIterator[asyncio.Task[str]]:
    """Start them in this order and end them in the other. Gives the end of card or broker."""
    await end_leftovers(str(place.path), KILLED_S, MARK)  # of a demo that was killed
    tasks: list[asyncio.Task[Any]] = []
    try:
        for stage in (cards, services, fronts):
            await _start(stage)
        tasks += [asyncio.create_task(program.keep_running()) for program in services]
        broken = asyncio.create_task(_first_ended([*cards, *fronts]))
        tasks.append(broken)
        yield broken
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stage in (fronts, services, cards):
            await asyncio.gather(*(program.end() for program in stage))
        # A broker that had to be killed may have left what it had started.
        await end_leftovers(str(place.path), KILLED_S, MARK)


async def _start(programs: Sequence[Program]) -> None:
    """Start them at once. Raises the first DemoError, when each has started or failed to."""
    starts = (program.start() for program in programs)
    for result in await asyncio.gather(*starts, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


async def _first_ended(programs: Sequence[Program]) -> str:
    """Wait until one of them ends that must not, and give its last words."""
    waits = {asyncio.create_task(program.ended()): program for program in programs}
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waits:
            task.cancel()
    program = waits[done.pop()]
    return f"{program.name} ended before the demo did. It said last:\n{program.last_words()}"


@contextlib.contextmanager
def _logs(directory: Path) -> Iterator[Callable[[str], logging.Logger]]:
    """Give a maker of loggers, each with a file of its own, closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(name: str) -> logging.Logger:
            handler = logging.FileHandler(directory / f"{name}.log")
            stack.callback(handler.close)
            logger = logging.Logger(name)  # noqa: LOG001 - its lines belong in no other log
            logger.addHandler(handler)
            return logger

        yield make

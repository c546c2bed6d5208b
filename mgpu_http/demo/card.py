"""The memory of one simulated card, owned by one process as a driver owns a real one.

python -m mgpu_http.demo.card DIR TOTAL_MIB DESKTOP_MIB

It listens on the socket DIR/card.sock: one connection is one process on the card, and when that
ends, its memory comes free by itself. It writes two files:

DIR/card.json      what the sampler `simulated` reads, and `held`: MiB by name
DIR/journal.jsonl  a line per happening: `{"at": monotonic seconds, "service", "what", "mib"}`

What happens: `load`, `unload` (told to, or stopped), `evict` (made place by itself), `expire` (held
long enough without use), `load_failed`, as a service says, with the size of the model (0: it is not
on the card); `out_of_memory`, with what was refused, and `crash`, with what was held by a process
that went without a word, as the card sees.

The protocol is a JSON object per line and one in answer, which always has `free_mib`; an `error` in
it is a refusal.
"""

import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import define, field

TOTAL_MIB = 16_384
DESKTOP_MIB = 768
RELEASE_S = (0.3, 0.8)  # memory that is let go of is seen free this much later


class OutOfMemory(Exception):  # noqa: N818 - the name that everybody knows it by
    """More was wanted than is free; nothing was taken."""

    def __init__(self, wanted_mib: int, free_mib: int) -> None:
        super().__init__(f"{wanted_mib} MiB more wanted, {free_mib} MiB free")
        self.wanted_mib = wanted_mib
        self.free_mib = free_mib


class CardConnection:
    """A process's hold on the card. Calls are carried out in the order in which they are made."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.total_mib = 0
        self._reader = reader
        self._writer = writer
        self._order = asyncio.Lock()

    @classmethod
    async def open(cls, directory: Path, name: str) -> "CardConnection":
        """Raises OSError where no card listens."""
        reader, writer = await asyncio.open_unix_connection(socket_path(directory))
        connection = cls(reader, writer)
        connection.total_mib = (await connection._ask(do="join", name=name))["total_mib"]
        return connection

    async def hold(self, mib: int) -> int:
        """Hold so much from now on, all in all; give what is free then. Raises OutOfMemory."""
        answer = await self._ask(do="hold", mib=mib)
        if "error" in answer:
            raise OutOfMemory(answer["wanted_mib"], answer["free_mib"])
        return int(answer["free_mib"])

    async def free_mib(self) -> int:
        return int((await self._ask(do="look"))["free_mib"])

    async def say(self, what: str, mib: int) -> None:
        """Write it into the journal."""
        await self._ask(do="say", what=what, mib=mib)

    async def leave(self) -> None:
        """Give everything back and go: without this it is a crash."""
        await self._ask(do="leave")
        self.close()

    def close(self) -> None:
        """Go without a word."""
        self._writer.close()

    async def _ask(self, **request: Any) -> Mapping[str, Any]:
        # A caller that is cancelled must not leave its answer to the next one.
        return await asyncio.shield(self._exchange(request))

    async def _exchange(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        async with self._order:
            self._writer.write(json.dumps(request).encode() + b"\n")
            line = await self._reader.readline()
        if not line:
            raise ConnectionError("the card is gone")
        answer: Mapping[str, Any] = json.loads(line)
        return answer


@define(eq=False)
class Process:
    """One on the card: what it holds, and what the card shows of that."""

    name: str
    held_mib: int = 0
    shown_mib: int = 0  # more, for a while after it let go of some
    releasing: asyncio.TimerHandle | None = None


@define(eq=False)
class Card:
    directory: Path
    total_mib: int
    desktop_mib: int
    _random: random.Random = field(factory=lambda: random.Random(0))  # noqa: S311 - a delay
    _processes: list[Process] = field(factory=list)

    @property
    def free_mib(self) -> int:
        shown_mib = sum(process.shown_mib for process in self._processes)
        return self.total_mib - self.desktop_mib - shown_mib

    def join(self, name: str) -> Process:
        process = Process(name)
        self._processes.append(process)
        self.write()
        return process

    def hold(self, process: Process, mib: int) -> None:
        """Growth is seen at once, the rest late. Raises OutOfMemory."""
        wanted_mib = mib - process.shown_mib
        if wanted_mib > self.free_mib:
            self.note(process.name, "out_of_memory", wanted_mib)
            raise OutOfMemory(wanted_mib, self.free_mib)
        process.held_mib = mib
        process.shown_mib = max(mib, process.shown_mib)
        if mib < process.shown_mib:
            self._release_later(process, lambda: None)
        self.write()

    def leave(self, process: Process) -> None:
        process.held_mib = 0
        self._release_later(process, lambda: self._processes.remove(process))

    def note(self, name: str, what: str, mib: int) -> None:
        line = {"at": time.monotonic(), "service": name, "what": what, "mib": mib}
        with (self.directory / "journal.jsonl").open("a") as journal:
            journal.write(json.dumps(line) + "\n")

    def write(self) -> None:
        held: dict[str, int] = {}
        for process in self._processes:
            held[process.name] = held.get(process.name, 0) + process.shown_mib
        gpu = {
            "index": 0,
            "total_mib": self.total_mib,
            "used_mib": self.total_mib - self.free_mib,
            "free_mib": self.free_mib,
        }
        new = self.directory / "card.json.new"
        new.write_text(json.dumps({"gpus": [gpu], "held": held}))
        new.replace(self.directory / "card.json")

    def _release_later(self, process: Process, then: Callable[[], None]) -> None:
        def release() -> None:
            process.shown_mib = process.held_mib
            then()
            self.write()

        if process.releasing is not None:
            process.releasing.cancel()
        delay_s = self._random.uniform(*RELEASE_S)
        process.releasing = asyncio.get_running_loop().call_later(delay_s, release)


class CardServer:
    """Speaks for the card: one connection for each process on it."""

    def __init__(self, card: Card) -> None:
        self._card = card

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        process = self._card.join(json.loads(await reader.readline())["name"])
        self._answer(writer, {"total_mib": self._card.total_mib})
        expected = False  # its end
        try:
            async for line in reader:
                request = json.loads(line)
                answer = self._carry_out(process, request)
                expected = request["do"] == "leave" or "error" in answer
                self._answer(writer, answer)
        except ConnectionError:
            pass  # how a killed process may leave
        finally:
            writer.close()
            if not expected:
                self._card.note(process.name, "crash", process.held_mib)
            self._card.leave(process)

    def _carry_out(self, process: Process, request: Mapping[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "hold":
                try:
                    self._card.hold(process, request["mib"])
                except OutOfMemory as error:
                    return {"error": "out_of_memory", "wanted_mib": error.wanted_mib}
            case "say":
                self._card.note(process.name, request["what"], request["mib"])
        return {}

    def _answer(self, writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
        answer["free_mib"] = self._card.free_mib
        writer.write(json.dumps(answer).encode() + b"\n")


def socket_path(directory: Path) -> Path:
    return directory / "card.sock"


async def main(directory: Path, total_mib: int, desktop_mib: int) -> None:
    card = Card(directory, total_mib, desktop_mib)
    card.write()
    path = socket_path(directory)
    await asyncio.start_unix_server(CardServer(card).connection, path)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("ready", flush=True)  # noqa: T201 - whoever started it waits for that
    await ended.wait()
    path.unlink(missing_ok=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))

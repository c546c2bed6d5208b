"""A stand-in for a GPU service, in a process of its own, that holds memory on a simulated card.

It is an upstream (`upstream.py`: the same orders and rules) with habits by its `Habits`. It writes
every request but probes in a journal that all services of a host share, and its `stats` have the
targets that were `finished`: their answers went out whole.

`/load`             takes its memory (500 if there is not enough), unless a rule gives a status
`/unload`, `/free`  gives it back, or says so only: the rule `leak=1`
`/state`            is a probe too: is it `loaded`, with how many `mib`, how much is it `working` at
any other           is work: 503 while it is not loaded. A `lazy` one takes its memory for it, once
                    it found a workflow in it (else 400, as ComfyUI)
"""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.support.upstream import IDLE_S, Request, Server

NO_PROMPT = {
    "error": {
        "type": "no_prompt",
        "message": "No prompt provided",
        "details": "No prompt provided",
        "extra_info": {},
    },
    "node_errors": {},
}


@dataclass(frozen=True)
class Habits:
    name: str
    directory: str  # where the card and the journal of its host are
    mib: int = 0
    loaded: bool = True  # from its start
    lazy: bool = False
    load_mib: int = 0  # while `/load` is answered, where that is more
    work_mib: int = 0  # while it works, where that is more
    residue_mib: int = 0  # what an unload leaves
    free_s: float = 0  # how long after an accepted unload the memory comes free
    port: int = 0  # 0: a free one


class Card:
    """A card, or several of which as much is taken on each: a view of the file that the sampler
    `simulated` reads, changed by many processes.
    """

    def __init__(self, directory: Path, gpus: tuple[int, ...] = (0,)) -> None:
        self.path = directory / "card.json"
        self._gpus = gpus

    def create(self, *total_mib: int) -> None:
        """Make the file, with all cards of the host."""
        cards = [{"total_mib": each, "held": {}, "pids": {}} for each in total_mib]
        self._write({"cards": cards, "refused": []})

    def take(self, name: str, mib: int) -> bool:
        """Hold so much for a name, once, in this process; False: there is not enough, and nothing
        is taken.
        """
        with self._changing() as host:
            mine = [host["cards"][gpu] for gpu in self._gpus]
            enough = all(_free_mib(card, beside=name) >= mib for card in mine)
            for card in mine if enough else ():
                card["held"][name], card["pids"][name] = mib, os.getpid()
            if not enough:
                host["refused"].append(name)
        return enough

    def give_back(self, name: str) -> None:
        with self._changing() as host:
            for gpu in self._gpus:
                host["cards"][gpu]["held"].pop(name, None)

    def fail(self, code: str | None) -> None:
        """From now on every reading fails with this code; None: no more."""
        with self._changing() as host:
            host.pop("error", None)
            if code is not None:
                host["error"] = code

    @property
    def held_mib(self) -> dict[str, int]:
        """By name; of the first one, where it is several."""
        held: dict[str, int] = self._read()["cards"][self._gpus[0]]["held"]
        return held

    @property
    def free_mib(self) -> int:
        cards = self._read()["cards"]
        return min(_free_mib(cards[gpu]) for gpu in self._gpus)

    @property
    def refused(self) -> list[str]:
        """Who found too little memory, each time, on all cards of the host."""
        refused: list[str] = self._read()["refused"]
        return refused

    def _read(self) -> Any:
        return json.loads(self.path.read_text())

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        with self.path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            host = self._read()
            yield host
            self._write(host)

    def _write(self, host: dict[str, Any]) -> None:
        cards = list(enumerate(host["cards"]))
        readings = [
            {
                "index": index,
                "total_mib": card["total_mib"],
                "used_mib": card["total_mib"] - _free_mib(card),
                "free_mib": _free_mib(card),
            }
            for index, card in cards
        ]
        processes = [
            {"index": index, "pid": card["pids"][name], "mib": mib}
            for index, card in cards
            for name, mib in card["held"].items()
        ]
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({**host, "gpus": readings, "processes": processes}))
        new.replace(self.path)


def _free_mib(card: dict[str, Any], beside: str = "") -> int:
    held: dict[str, int] = card["held"]
    total_mib: int = card["total_mib"]
    return total_mib - sum(mib for name, mib in held.items() if name != beside)


def journal(directory: Path) -> Path:
    return directory / "journal"


class GpuService(Server):
    def __init__(self, habits: Habits) -> None:
        super().__init__(IDLE_S)
        self._habits = habits
        self._directory = Path(habits.directory)
        self._card = Card(self._directory)
        self._holds = False
        self._freeing: asyncio.TimerHandle | None = None
        self._finished: list[str] = []
        self._working = 0
        if habits.loaded:
            self._load()

    async def watched(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request
    ) -> bool:
        path = urlsplit(request.target).path
        if path == "/health":
            return await super().watched(reader, writer, request)
        if path == "/state":
            request.orders = {"do": "text", "body": json.dumps(self._state())}
            return await super().watched(reader, writer, request)
        with journal(self._directory).open("a") as lines:
            lines.write(f"{self._habits.name} {request.method} {path}\n")
        request.orders = {**request.orders, **self._act(path, request)}
        self._working += 1
        try:
            whole = await super().watched(reader, writer, request)
        finally:
            self._working -= 1
            if self._peaks and self._holds and not self._working:
                self._card.take(self._habits.name, self._habits.mib)
        if whole:
            self._finished.append(request.target)
        return whole

    def control(self, target: str) -> bytes:
        stats = json.loads(super().control(target))
        return json.dumps({**stats, "finished": self._finished}).encode()

    def give_back(self) -> None:
        self._freeing = None
        self._holds = False
        self._card.give_back(self._habits.name)
        if self._habits.residue_mib:
            self._card.take(self._habits.name, self._habits.residue_mib)

    def end(self) -> None:
        self._card.give_back(self._habits.name)

    @property
    def _peaks(self) -> bool:
        return bool(self._habits.load_mib or self._habits.work_mib)

    def _state(self) -> dict[str, object]:
        mib = self._habits.mib if self._holds else 0
        return {"loaded": self._holds, "mib": mib, "working": self._working}

    def _act(self, path: str, request: Request) -> dict[str, str]:
        """Do to the card what the request asks for, and give what to answer."""
        if request.number("status", 200) >= 400:
            return {}
        if path == "/load":
            return self._load(self._habits.load_mib)
        if path in {"/unload", "/free"}:
            return self._unload(request)
        if self._habits.lazy:
            if not json.loads(request.body or b"{}").get("prompt"):
                return {"do": "text", "status": "400", "body": json.dumps(NO_PROMPT)}
            return self._load(self._habits.work_mib)
        if self._holds and self._habits.work_mib:
            return self._load(self._habits.work_mib)
        return {} if self._holds else {"do": "text", "status": "503", "body": "not loaded"}

    def _load(self, peak_mib: int = 0) -> dict[str, str]:
        if self._freeing is not None:  # an unload that was only noted comes first
            self._freeing.cancel()
            self.give_back()
        self._holds = self._card.take(self._habits.name, max(self._habits.mib, peak_mib))
        return {} if self._holds else {"do": "text", "status": "500", "body": "out of memory"}

    def _unload(self, request: Request) -> dict[str, str]:
        if "leak" in request.orders:
            return {}
        if not self._habits.free_s:
            self.give_back()
        elif self._freeing is None:
            loop = asyncio.get_running_loop()
            self._freeing = loop.call_later(self._habits.free_s, self.give_back)
        return {}


async def main(habits: Habits) -> None:
    service = GpuService(habits)
    server = await asyncio.start_server(service.connection, "127.0.0.1", habits.port)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print(server.sockets[0].getsockname()[1], flush=True)
    await ended.wait()
    service.end()
    os._exit(0)  # whatever it works at


if __name__ == "__main__":
    asyncio.run(main(Habits(**json.loads(sys.argv[1]))))

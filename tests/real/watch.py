"""Which of the services live, by the process table: what the broker says is not asked."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

INTERVAL_S = 0.02


class Service(NamedTuple):
    """One that is known by these arguments on its command line, as no other process has them."""

    arguments: tuple[str, ...]
    mib: int  # as the configuration has it


class Watch:
    """Looks all the time from `start` to `stop`.

    `seen` has the process ids of each service in the order of their coming, `beyond` who lived at
    moments when that was more than `total_mib` has room for, `looks` how many moments there were.
    """

    def __init__(self, services: Mapping[str, Service], total_mib: int) -> None:
        self.seen: dict[str, list[int]] = {name: [] for name in services}
        self.beyond: list[dict[str, list[int]]] = []
        self.looks = 0
        self._services = services
        self._total_mib = total_mib
        self._marks = {
            name: "\0".join(("", *service.arguments, "")).encode()
            for name, service in services.items()
        }
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()

    def alive(self) -> dict[str, list[int]]:
        """Process ids by service; those that have ended and wait to be reaped don't count."""
        found: dict[str, list[int]] = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit() and (name := self._service(Path(entry.path))):
                found.setdefault(name, []).append(int(entry.name))
        return found

    def kill_all(self) -> dict[str, list[int]]:
        """End what is left, and tell what it was."""
        left = self.alive()
        for pid in (pid for pids in left.values() for pid in pids):
            os.kill(pid, signal.SIGKILL)
        return left

    def _service(self, process: Path) -> str | None:
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            return None  # it ended meanwhile
        return next((name for name, mark in self._marks.items() if mark in command), None)

    def _look_on(self) -> None:
        while not self._ending.is_set():
            found = self.alive()
            self.looks += 1
            if sum(self._services[name].mib for name in found) > self._total_mib:
                self.beyond.append(found)
            for name, pids in found.items():
                self.seen[name] += [pid for pid in pids if pid not in self.seen[name]]
            time.sleep(INTERVAL_S)

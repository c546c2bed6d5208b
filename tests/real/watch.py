"""Which of the services live, by the process table: what the broker says is not asked."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

INTERVAL_S = 0.02


class Watch:
    """Looks all the time from `start` to `stop`. A service is known by its port on the command
    line, as no other process has it.

    `seen` has the process ids of each service in the order of their coming, `together` the
    processes of different services that lived at one moment, `looks` how many moments there were.
    """

    def __init__(self, ports: Mapping[str, int]) -> None:
        self.seen: dict[str, list[int]] = {name: [] for name in ports}
        self.together: list[dict[str, list[int]]] = []
        self.looks = 0
        self._marks = {name: f"\0--port\0{port}\0".encode() for name, port in ports.items()}
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
            if len(found) > 1:
                self.together.append(found)
            for name, pids in found.items():
                self.seen[name] += [pid for pid in pids if pid not in self.seen[name]]
            time.sleep(INTERVAL_S)

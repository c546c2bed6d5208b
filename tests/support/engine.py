"""A stand-in for docker and podman: run as either, it says and returns what they say and return.

    engine = Engine(folder)                # a folder of its own that the PATH begins with
    engine.has("voice", "created")         # a container, with the service that runs in it, if any
    engine.behaves(stop="hang")            # from now on
    engine.calls                           # what it was called with

Texts and states are those of docker 20.10 to 28 and podman 4.3. A container is a file; one with a
command really runs it: started in a session of its own, frozen and killed by signals.
"""

import contextlib
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]  # where its commands run
STOPPED = ("created", "exited", "stopped", "dead")


# ---------------------------------------------------------------------------- the tests' side
class Engine:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("docker", "podman"):
            script = folder / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$0" "$@"\n')
            script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def has(self, name: str, state: str, command: tuple[str, ...] = ()) -> None:
        container = {"state": state, "command": command, "pid": None}
        write(self._folder / f"{name}.json", container)

    def state(self, name: str) -> str:
        return str(json.loads((self._folder / f"{name}.json").read_text())["state"])

    def behaves(self, **habits: Any) -> None:
        """`VERB="hang"`, `stop="fail"`, `kill="nothing"`, `then="exited"`: what a start ends as,
        `refusal=[code, words]` for all but inspect, `says=[code, words]` for that as well.
        """
        (self._folder / "habits").write_text(json.dumps(habits))

    @property
    def calls(self) -> list[list[str]]:
        """Each with the engine's name first, and without the questions for a state."""
        calls = [json.loads(line) for line in (self._folder / "calls").read_text().splitlines()]
        return [call for call, _ in calls if "inspect" not in call]

    @property
    def languages(self) -> set[str]:
        calls = [json.loads(line) for line in (self._folder / "calls").read_text().splitlines()]
        return {language for _, language in calls}

    def close(self) -> None:
        for file in self._folder.glob("*.json"):
            Container(file).signal(signal.SIGKILL)


def container_id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def write(file: Path, content: dict[str, Any]) -> None:
    """At once: who reads it meanwhile sees all of the old or all of the new."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(content))
    new.replace(file)


# --------------------------------------------------------------------------- the engine's side
class RefusedError(Exception):
    """It says so on standard error and returns with that code."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(code, words)
        self.code, self.words = code, words


class Container:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._facts = json.loads(file.read_text())

    @property
    def state(self) -> str:
        return str(self._facts["state"])

    def becomes(self, state: str) -> None:
        self._facts["state"] = state
        write(self._file, self._facts)

    def run(self) -> None:
        if self._facts["command"]:
            self._facts["pid"] = subprocess.Popen(
                self._facts["command"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=ROOT,
                start_new_session=True,
            ).pid

    def signal(self, signum: int) -> None:
        if self._facts["pid"] is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._facts["pid"], signum)

    def end(self, grace_s: float) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self._alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.signal(signal.SIGKILL)
        while self._alive():
            time.sleep(0.02)

    def _alive(self) -> bool:
        try:
            stat = Path(f"/proc/{self._facts['pid']}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] not in "ZX"


class Command:
    """One call of the engine. docker's words by default; podman's where `podman` is set."""

    def __init__(self, folder: Path, engine: str, words: list[str]) -> None:
        self._podman = engine == "podman"
        self._habits: dict[str, Any] = {}
        with contextlib.suppress(OSError):
            self._habits = json.loads((folder / "habits").read_text())
        *words, self._name = words[1:] if words[0] == "container" else words
        self._verb, *self._options = words
        self._file = folder / f"{self._name}.json"

    def carry_out(self) -> str:
        if said := self._habits.get("says"):
            raise RefusedError(*said)
        if (said := self._habits.get("refusal")) and self._verb != "inspect":
            raise RefusedError(*said)
        if not self._file.exists():
            raise self._refused(self._missing(), f"failed to {self._verb} containers: {self._name}")
        self._container = Container(self._file)
        if self._habits.get(self._verb) == "hang":
            time.sleep(600)
        answer: str = getattr(self, f"_{self._verb}")()
        return answer

    def _inspect(self) -> str:
        told = {"{{.State.Status}}": self._container.state, "{{.Id}}": container_id(self._name)}
        return told[self._options[1]]

    def _start(self) -> str:
        if self._container.state == "running":
            return self._name
        if self._container.state not in STOPPED:
            if self._podman:
                raise self._improper("must be in Created or Stopped state to be started")
            words = "cannot start a paused container, try unpause instead"
            raise self._refused(words, f"failed to start containers: {self._name}")
        self._container.run()
        self._container.becomes(self._habits.get("then", "running"))
        return self._name

    def _unpause(self) -> str:
        self._container.signal(signal.SIGCONT)
        self._container.becomes("running")
        return self._name

    def _stop(self) -> str:
        if self._habits.get("stop") == "fail":
            raise self._refused(
                f"cannot stop container: {self._name}: tried to kill container, but did not"
                " receive an exit event"
            )
        if self._podman and self._container.state == "paused":
            raise self._improper("is running or paused, refusing to clean up")
        if self._container.state not in STOPPED:
            grace_s = float(self._options[1]) if self._options else 10
            self._container.end(grace_s)
            self._container.becomes("exited")
        return self._name

    def _kill(self) -> str:
        if self._habits.get("kill") == "nothing":
            return self._name
        if self._container.state in STOPPED:
            raise self._refused(
                f"Cannot kill container: {self._name}: Container {self._name} is not running"
            )
        self._container.signal(signal.SIGKILL)
        self._container.becomes("stopped" if self._podman else "exited")
        return self._name

    def _missing(self) -> str:
        if self._podman and self._verb == "inspect":
            return f"inspecting object: no such container {self._name}"
        if self._podman:
            return f'no container with name or ID "{self._name}" found: no such container'
        return f"No such container: {self._name}"

    def _improper(self, words: str) -> RefusedError:
        return self._refused(f"container {self._name} {words}: container state improper")

    def _refused(self, words: str, last: str = "") -> RefusedError:
        if self._podman:
            return RefusedError(125, f"Error: {words}\n")
        more = f"Error: {last}\n" if last and self._verb == "start" else ""
        return RefusedError(1, f"Error response from daemon: {words}\n{more}")


def main() -> None:
    program, words = Path(sys.argv[1]), sys.argv[2:]
    with (program.parent / "calls").open("a") as calls:
        line = [[program.name, *words], os.environ.get("LC_ALL")]
        calls.write(json.dumps(line) + "\n")
    try:
        print(Command(program.parent, program.name, words).carry_out())
    except RefusedError as refused:
        sys.stderr.write(refused.words)
        sys.exit(refused.code)


if __name__ == "__main__":
    main()

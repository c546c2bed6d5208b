"""The `container` driver: a container that exists, started and stopped by docker or podman."""

import asyncio
import logging
import math

from mgpu_effects.commands import Output, run_command
from mgpu_effects.drivers.driver import Answers, wait_until_gone, wait_until_ready
from mgpu_effects.settings import KILLED_S, ContainerSettings

_QUERY_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 60.0  # docker answers when the container runs: its GPUs may have to wake up
_STOP_TIMEOUT_S = 120.0  # for the container's own grace, which the broker does not know
_POLL_S = 0.25
_ID_S = 60.0  # it may have been made anew since the engine was asked who it is
_ID_TIMEOUT_S = 2.0
# What `inspect` says of a container: is there a process of it, or will there be one by itself?
_RUNNING = {
    "running": True,
    "paused": True,
    "restarting": True,  # by its restart policy
    "stopping": True,  # podman: told to stop
    "created": False,
    "initialized": False,
    "stopped": False,
    "exited": False,
    "removing": False,
    "dead": False,
    "no_such_container": False,  # that is our word
}
# What the engines say on standard error (LC_ALL=C), in small letters: our code for it.
_CODES = (
    ("permission denied while trying to connect", "not_permitted"),
    ("cannot connect to the docker daemon", "no_daemon"),
    ("failed to connect to the docker api", "no_daemon"),
    ("cannot connect to podman", "no_daemon"),
    ("error during connect", "no_daemon"),
    ("unable to resolve docker endpoint", "no_daemon"),
    ("no such container", "no_such_container"),
    ("no container with name or id", "no_such_container"),
)
_HOPELESS = {"not_permitted", "no_daemon", "no_such_container", "engine_missing"}
_log = logging.getLogger(__name__)


class ContainerDriver:
    """A container that was made before, with `docker create`, `docker compose create` or alike.

    Errors: `not_permitted` (docs: the group that may), `no_daemon`, `no_such_container`,
    `engine_missing`, `timeout`, `failed`; of `start` also `not_ready` and `container_ended`, of
    `stop` and `kill` also `still_running`.
    The container is the engine's to look after: it runs on when the broker ends.
    """

    def __init__(self, name: str, settings: ContainerSettings, answers: Answers) -> None:
        self._name = name
        self._container = settings.name
        self._engine = settings.engine
        self._grace_s = settings.grace_s
        self._ready_s = settings.ready_s
        self._answers = answers
        self._id: str | None = None
        self._id_until = -math.inf

    async def running(self) -> bool | None:
        return _RUNNING.get(await self._state())

    async def start(self) -> str | None:
        """A paused one goes on. One that is stopping has to end first."""
        self._id_until = -math.inf
        state = await self._state()
        if state == "stopping" and (error := await self.stop()):
            return error
        verb = "unpause" if state == "paused" else "start"
        if error := await self._order(verb, timeout_s=_START_TIMEOUT_S):
            return error
        error = await wait_until_ready(self._answers, self._why_ended, self._ready_s, _POLL_S)
        if error is not None:
            _log.error("%s: container %s did not start: %s", self._name, self._container, error)
        return error

    async def stop(self) -> str | None:
        """The stop signal, and SIGKILL after the grace, by the engine; what it can't stop (podman:
        a paused one) or leaves running beyond that is killed. No restart policy starts it again.
        """
        if self._grace_s is None:
            error = await self._order("stop", timeout_s=_STOP_TIMEOUT_S)
        else:
            grace = ("-t", str(math.ceil(self._grace_s)))
            error = await self._order("stop", *grace, timeout_s=self._grace_s + KILLED_S)
        return error if error is None or error in _HOPELESS else await self.kill()

    async def kill(self) -> str | None:
        error = await self._order("kill", timeout_s=KILLED_S)
        if error in _HOPELESS:
            return error
        # It fails where nothing runs any more, and podman does not wait for the end.
        return await wait_until_gone(self.running, KILLED_S, _POLL_S)

    async def close(self) -> None:
        """Nothing to end."""

    async def container_id(self) -> str | None:
        """Give the engine's id of it, asked now and then; None: it can't tell."""
        now = asyncio.get_running_loop().time()
        if now >= self._id_until:
            self._id_until = now + _ID_S
            output, error = await self._inspect("{{.Id}}", timeout_s=_ID_TIMEOUT_S)
            self._id = output.stdout.strip() if output and error is None else None
        return self._id

    async def _why_ended(self) -> str | None:
        return "container_ended" if await self.running() is False else None

    async def _state(self) -> str:
        """Give the engine's word for its state, or the code of why that can't be told."""
        output, error = await self._inspect("{{.State.Status}}", timeout_s=_QUERY_TIMEOUT_S)
        return output.stdout.strip() if output and error is None else str(error)

    async def _inspect(self, what: str, timeout_s: float) -> tuple[Output | None, str | None]:
        return await self._run("container", "inspect", "--format", what, timeout_s=timeout_s)

    async def _order(self, *verb: str, timeout_s: float) -> str | None:
        output, error = await self._run(*verb, timeout_s=timeout_s)
        if error is not None:
            said = output.stderr.strip() if output else error
            order = f"{self._engine} {verb[0]} {self._container}"
            _log.error("%s: %s: %s", self._name, order, said)
        return error

    async def _run(self, *verb: str, timeout_s: float) -> tuple[Output | None, str | None]:
        try:
            output = await run_command(self._engine, *verb, self._container, timeout_s=timeout_s)
        except TimeoutError:  # one of OSError's kinds
            return None, "timeout"
        except OSError:
            return None, "engine_missing"
        if output.returncode == 0:
            return output, None
        said = output.stderr.lower()
        return output, next((code for words, code in _CODES if words in said), "failed")

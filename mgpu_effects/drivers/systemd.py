"""The `systemd` driver: a unit, started and stopped through systemctl."""

import logging

from mgpu_effects.commands import Output, run_command
from mgpu_effects.drivers.driver import Answers, wait_until_gone, wait_until_ready
from mgpu_effects.settings import KILLED_S

_QUERY_TIMEOUT_S = 10.0
_JOB_TIMEOUT_S = 120.0  # beyond what systemd itself waits for a start or a stop: 90 s
_READY_S = 120.0
_POLL_S = 0.25
_RUNNING = {
    "active": True,
    "reloading": True,
    "activating": True,
    "deactivating": True,
    "inactive": False,
    "failed": False,
}
# What systemctl says on standard error (LC_ALL=C), in small letters: our code for it.
_CODES = (
    ("interactive authentication required", "not_permitted"),
    ("authentication is required", "not_permitted"),
    ("access denied", "not_permitted"),
    ("permission denied", "not_permitted"),
    ("not authorized", "not_permitted"),
    ("not been booted with systemd", "no_systemd"),
    ("failed to connect to", "no_systemd"),
    ("not found", "no_such_unit"),
    ("not loaded", "no_such_unit"),
)
_log = logging.getLogger(__name__)


class SystemdDriver:
    """A unit of the system's manager, or with `user` of the user's own.

    Errors: `not_permitted` (docs: the polkit rule that permits it), `no_such_unit`, `no_systemd`,
    `systemctl_missing`, `timeout`, `failed`; of `start` also `not_ready` and `unit_ended`, of
    `kill` also `still_running`.
    The unit is systemd's to look after: it runs on when the broker ends.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        answers: Answers,
        *,
        user: bool = False,
        ready_s: float = _READY_S,
    ) -> None:
        self._name = name
        self._unit = unit
        self._answers = answers
        self._systemctl = ("systemctl", *(("--user",) if user else ()), "--no-ask-password")
        self._ready_s = ready_s

    async def running(self) -> bool | None:
        try:
            output = await self._run("is-active", _QUERY_TIMEOUT_S)
        except (OSError, TimeoutError):
            return None
        return _RUNNING.get(output.stdout.strip())

    async def start(self) -> str | None:
        if error := await self._job("start"):
            return error
        error = await wait_until_ready(self._answers, self._why_ended, self._ready_s, _POLL_S)
        if error is not None:
            _log.error("%s: %s did not start: %s", self._name, self._unit, error)
        return error

    async def stop(self) -> str | None:
        """The unit says how it is asked to end, and what grace it has: `TimeoutStopSec`."""
        return await self._job("stop")

    async def kill(self) -> str | None:
        """SIGKILL to every process of the unit. A job to stop it is told already."""
        if error := await self._job("kill", "--signal=SIGKILL"):
            return error
        return await wait_until_gone(self.running, KILLED_S, _POLL_S)

    async def close(self) -> None:
        """Nothing to end."""

    async def _why_ended(self) -> str | None:
        return "unit_ended" if await self.running() is False else None

    async def _job(self, verb: str, *options: str) -> str | None:
        try:
            output = await self._run(verb, _JOB_TIMEOUT_S, *options)
        except TimeoutError:  # one of OSError's kinds
            return "timeout"
        except OSError:
            return "systemctl_missing"
        if output.returncode == 0:
            return None
        _log.error("%s: systemctl %s %s: %s", self._name, verb, self._unit, output.stderr.strip())
        said = output.stderr.lower()
        return next((code for words, code in _CODES if words in said), "failed")

    async def _run(self, verb: str, timeout_s: float, *options: str) -> Output:
        command = (*self._systemctl, *options, verb, self._unit)
        return await run_command(*command, timeout_s=timeout_s)

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from aiohttp import web

from mgpu_effects.calls import control_session
from mgpu_effects.drivers import make_driver
from mgpu_effects.drivers.systemd import SystemdDriver
from mgpu_effects.services import Services
from mgpu_effects.settings import (
    ConsumerSettings,
    DriverSettings,
    SchedulerSettings,
    Settings,
    SystemdSettings,
)
from tests.support.dev_http import serving

# Says and returns what systemd 252's does. The unit's state is a file beside it.
SYSTEMCTL = """#!{python}
import json, os, sys, time
from pathlib import Path
here = Path(__file__).parent
with (here / "calls").open("a") as calls:
    calls.write(json.dumps([sys.argv[1:], os.environ.get("LC_ALL")]) + "\\n")
words = [word for word in sys.argv[1:] if not word.startswith("--")]
verb, unit = words
state, refusal = here / unit, here / "refusal"
if (here / "hangs").exists() and verb == (here / "hangs").read_text():
    time.sleep(600)
if refusal.exists() and verb != "is-active":
    code, _, words = refusal.read_text().partition(" ")
    sys.stderr.write(words.format(verb=verb, unit=unit))
    sys.exit(int(code))
if verb == "is-active":
    now = state.read_text() if state.exists() else "inactive"
    print(now)
    sys.exit(0 if now == "active" else 3)
if not state.exists():
    found = "not found" if verb == "start" else "not loaded"
    sys.stderr.write(f"Failed to {{verb}} {{unit}}: Unit {{unit}} {{found}}.\\n")
    sys.exit(5)
ending = (here / "ends-as").read_text() if (here / "ends-as").exists() else "active"
state.write_text(ending if verb == "start" else "inactive")
"""


class Systemctl:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        script = folder / "systemctl"
        script.write_text(SYSTEMCTL.format(python=sys.executable))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def has(self, unit: str, state: str) -> None:
        (self._folder / unit).write_text(state)

    def state(self, unit: str) -> str:
        return (self._folder / unit).read_text()

    def refuses(self, code: int, words: str) -> None:
        (self._folder / "refusal").write_text(f"{code} {words}")

    def hangs_at(self, verb: str) -> None:
        (self._folder / "hangs").write_text(verb)

    def ends_units_as(self, state: str) -> None:
        (self._folder / "ends-as").write_text(state)

    @property
    def calls(self) -> list[tuple[list[str], str]]:
        return [json.loads(line) for line in (self._folder / "calls").read_text().splitlines()]


@pytest.fixture
def systemctl(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return Systemctl(tmp_path)


async def answers() -> bool:
    return True


async def silent() -> bool:
    return False


async def test_start_and_stop_go_through_systemctl(systemctl):
    systemctl.has("voice.service", "inactive")
    driver = SystemdDriver("voice", "voice.service", answers)
    assert await driver.running() is False
    assert await driver.start() is None
    assert systemctl.state("voice.service") == "active"
    assert await driver.running() is True
    assert await driver.stop() is None
    assert systemctl.state("voice.service") == "inactive"
    assert (["--no-ask-password", "stop", "voice.service"], "C") in map(tuple, systemctl.calls)


async def test_a_unit_of_the_users_manager(systemctl):
    systemctl.has("voice.service", "active")
    driver = SystemdDriver("voice", "voice.service", answers, user=True)
    assert await driver.stop() is None
    assert systemctl.calls[0][0] == ["--user", "--no-ask-password", "stop", "voice.service"]


@pytest.mark.parametrize(
    ("code", "words", "error"),
    [
        (1, "Failed to {verb} {unit}: Interactive authentication required.\n", "not_permitted"),
        (4, "Failed to {verb} {unit}: Access denied\n", "not_permitted"),
        (
            4,
            (
                "Failed to {verb} {unit}: Access denied as the requested operation requires"
                " interactive authentication. However, interactive authentication has not been"
                " enabled by the calling program.\n"
            ),
            "not_permitted",
        ),
        (5, "Failed to {verb} {unit}: Unit {unit} not found.\n", "no_such_unit"),
        (1, "Failed to {verb} {unit}: Unit {unit} is masked.\n", "failed"),
        (
            1,
            (
                "System has not been booted with systemd as init system (PID 1). Can't operate.\n"
                "Failed to connect to bus: Host is down\n"
            ),
            "no_systemd",
        ),
        (
            1,
            "Job for {unit} failed because the control process exited with error code.\n",
            "failed",
        ),
    ],
)
async def test_what_systemctl_refuses_has_a_code(systemctl, code, words, error):
    systemctl.has("voice.service", "active")
    systemctl.refuses(code, words)
    driver = SystemdDriver("voice", "voice.service", answers)
    assert await driver.start() == error
    assert await driver.stop() == error


async def test_a_unit_that_is_not_there(systemctl):
    driver = SystemdDriver("voice", "nobody.service", answers)
    assert await driver.start() == "no_such_unit"
    assert await driver.stop() == "no_such_unit"


async def test_a_host_without_systemctl(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    driver = SystemdDriver("voice", "voice.service", answers)
    assert await driver.start() == "systemctl_missing"
    assert await driver.stop() == "systemctl_missing"
    assert await driver.running() is None


async def test_a_unit_that_takes_too_long_to_stop_is_killed(systemctl):
    """As the stop itself may take as long as the unit says, it is an unload's limit that counts."""
    systemctl.has("voice.service", "active")
    systemctl.hangs_at("stop")
    unit = DriverSettings(systemd=SystemdSettings(unit="voice.service"))
    consumer = ConsumerSettings(name="voice", url="http://127.0.0.1:9", driver=unit)
    limits = SchedulerSettings(unload_timeout_s=4)
    settings = Settings(consumers={"voice": consumer}, scheduler=limits)
    async with control_session() as session:
        services = Services(session, on_exit=lambda _name: None)
        services.configure(settings)
        assert await services.unload("voice", "driver") is None
    assert ["--no-ask-password", "--signal=SIGKILL", "kill", "voice.service"] in [
        words for words, _ in systemctl.calls
    ]
    assert systemctl.state("voice.service") == "inactive"


async def test_a_systemctl_that_hangs_is_not_a_missing_one(systemctl, monkeypatch):
    monkeypatch.setattr("mgpu_effects.drivers.systemd._JOB_TIMEOUT_S", 0.5)
    systemctl.has("voice.service", "active")
    systemctl.hangs_at("stop")
    assert await SystemdDriver("voice", "voice.service", answers).stop() == "timeout"


async def test_a_unit_that_ends_before_it_answers(systemctl):
    systemctl.has("voice.service", "inactive")
    systemctl.ends_units_as("failed")
    assert await SystemdDriver("voice", "voice.service", silent).start() == "unit_ended"


async def test_a_unit_that_runs_and_never_answers(systemctl):
    systemctl.has("voice.service", "inactive")
    driver = SystemdDriver("voice", "voice.service", silent, ready_s=0.5)
    assert await driver.start() == "not_ready"


@pytest.mark.parametrize(
    ("state", "running"),
    [
        ("active", True),
        ("activating", True),
        ("deactivating", True),
        ("failed", False),
        ("inactive", False),
        ("something new", None),
    ],
)
async def test_a_units_state_tells_whether_it_runs(systemctl, state, running):
    systemctl.has("voice.service", state)
    assert await SystemdDriver("voice", "voice.service", answers).running() is running


async def test_the_configured_unit_is_ready_when_its_consumer_answers(systemctl):
    systemctl.has("voice.service", "inactive")
    asked = []

    async def ready_at_the_third(_request: web.Request) -> web.Response:
        asked.append(True)
        return web.Response(status=200 if len(asked) >= 3 else 503)

    async with serving(ready_at_the_third) as url, control_session() as session:
        settings = DriverSettings(systemd=SystemdSettings(unit="voice.service"))
        driver = make_driver(ConsumerSettings(name="voice", url=url, driver=settings), session)
        assert await driver.start() is None
        await driver.close()
    assert len(asked) == 3
    assert systemctl.state("voice.service") == "active"


async def test_without_a_driver_there_is_none():
    async with control_session() as session:
        assert make_driver(ConsumerSettings(name="voice", url="http://127.0.0.1"), session) is None

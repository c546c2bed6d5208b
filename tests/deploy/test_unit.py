"""The unit of systemd and the scripts around it, as far as they can be checked without a host."""

import os
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from mgpu_effects.carry_out import ANSWER_S
from mgpu_effects.settings import KILLED_S, ProcessSettings, SchedulerSettings
from mgpu_http.cli import make_parser
from mgpu_http.server import LAST_ANSWERS_S, OPEN_FILES

SYSTEMD = Path(__file__).parents[2] / "systemd"
MGPU = "/opt/mgpu/current/venv/bin/mgpu"


def unit() -> dict[str, list[str]]:
    """Read the settings, each with all its values."""
    settings = defaultdict(list)
    for line in (SYSTEMD / "mgpu.service").read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings[name].append(value)
    return settings


def test_the_commands_of_the_unit_are_commands_of_ours() -> None:
    commands = [
        value.split()
        for name, values in unit().items()
        if name.startswith("Exec")
        for value in values
    ]
    ours = [words[1:] for words in commands if words[0] == MGPU]
    assert [words[0] for words in ours] == ["check", "serve", "check"]
    for words in ours:
        assert make_parser().parse_args(words).config == "/etc/mgpu/consumers.yaml"


def test_systemd_waits_longer_for_the_end_than_the_broker_does() -> None:
    services_s = ProcessSettings(command=("x",)).grace_s + KILLED_S
    broker_s = SchedulerSettings().shutdown_grace_s + ANSWER_S + services_s + LAST_ANSWERS_S
    assert int(unit()["TimeoutStopSec"][0]) > broker_s


def test_the_broker_may_open_what_it_wants_to() -> None:
    soft, hard = map(int, unit()["LimitNOFILE"][0].split(":"))
    assert hard >= soft >= OPEN_FILES


def test_user_rule_and_unit_speak_of_the_same_user() -> None:
    (user,) = unit()["User"]
    assert f'subject.user == "{user}"' in (SYSTEMD / "50-mgpu.rules").read_text()
    assert f"u {user} " in (SYSTEMD / "mgpu.sysusers").read_text()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "which host? HOST=root@gpu-host"),
        ({"HOST": "local", "PREFIX": "opt/mgpu"}, "PREFIX=opt/mgpu: an absolute path"),
        ({"HOST": "local", "PREFIX": "/opt/a b"}, "PREFIX=/opt/a b: an absolute path"),
        ({"HOST": "local", "CONFIG": "/no/such"}, "CONFIG=/no/such: there is no such file"),
        ({"HOST": "local", "PYTHON": "python0.0"}, "the host lacks"),
    ],
)
def test_deploy_says_what_it_needs(environ: dict[str, str], said: str) -> None:
    done = subprocess.run(
        ["sh", str(SYSTEMD / "deploy.sh"), "install"],
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr

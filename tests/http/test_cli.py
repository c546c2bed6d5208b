"""The `mgpu` command, run as a user runs it."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mgpu_core.codec import encode_config
from mgpu_effects.config_file import load_settings
from mgpu_effects.core_config import core_config
from mgpu_http.auth import hash_key
from mgpu_http.cli import COMMANDS, main
from tests.support.facade import config, facade, write_config
from tests.support.upstream import Upstream

LIMIT_S = 30


def mgpu(*arguments: str, given: str = "", **environment: str) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "mgpu_http.cli", *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, **environment},
        check=False,
    )


async def remote(*arguments: str, url: str, **environment: str) -> Any:
    return await asyncio.to_thread(mgpu, *arguments, MGPU_URL=url, **environment)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_shows_an_example(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.name.split(), "--help"])
    assert ended.value.code == 0
    assert f"example:\n  {command.example}" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_can_be_loaded(command: Any) -> None:
    assert callable(command.load())


def test_a_command_imports_only_what_it_needs() -> None:
    code = "import sys, mgpu_http.cli as c; [k.load() for k in c.COMMANDS if k.name == 'status']; "
    code += "print({'hypercorn', 'aiohttp', 'starlette', 'rich'} & set(sys.modules))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "set()"


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("load",), ("key",), ("status", "x")])
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    told = mgpu(*arguments)
    assert (told.returncode, told.stdout) == (2, "")
    assert "usage: mgpu" in told.stderr


def test_check_shows_everything_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("max_body_mib: lots\nconsumers:\n  a: {url: 'ftp://x'}\nrouting: {tts: b}\n")
    told = mgpu("check", str(path))
    assert (told.returncode, told.stdout) == (1, "")
    for key, line in (("max_body_mib", 1), ("consumers.a.url", 3), ("routing.tts", 4)):
        assert any(f":{line}:" in error and key in error for error in told.stderr.splitlines())
    told = mgpu("check", "--config", str(path), "--json")
    assert told.returncode == 1
    document = json.loads(told.stdout)
    assert document["ok"] is False
    assert {(error["key"], error["line"]) for error in document["errors"]} >= {("max_body_mib", 1)}
    assert told.stderr == ""


def test_check_of_a_good_file_is_0(tmp_path: Path) -> None:
    path = write_config(tmp_path, config(None))
    assert "1 consumer" in mgpu("check", str(path)).stdout
    told = mgpu("check", str(path), "--json")
    assert (told.returncode, json.loads(told.stdout)) == (0, {"ok": True, "errors": []})


@pytest.mark.parametrize("command", [("check",), ("serve", "--config"), ("log", "apply")])
def test_a_configuration_that_is_not_there_is_2(command: tuple[str, ...], tmp_path: Path) -> None:
    told = mgpu(*command, str(tmp_path / "none.yaml"))
    assert (told.returncode, told.stdout) == (2, "")
    assert "none.yaml" in told.stderr


def test_serve_refuses_a_bad_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("nonsense: 1\n")
    told = mgpu("serve", "--config", str(path))
    assert (told.returncode, told.stdout) == (2, "")
    assert f"{path}:1:1" in told.stderr


def test_a_key_is_shown_once_and_its_hash_opens(tmp_path: Path) -> None:
    told = mgpu("key", "add", "laptop", "--admin", "--json")
    document = json.loads(told.stdout)
    assert document["entry"] == {
        "name": "laptop",
        "hash": hash_key(document["key"]),
        "admin": True,
    }
    settings = load_settings(
        write_config(tmp_path, config(None, auth={"keys": [document["entry"]]}))
    )
    assert settings.auth.keys[0].admin
    plain = mgpu("key", "add", "laptop")
    key = plain.stdout.strip()
    assert hash_key(key) in plain.stderr
    assert key != document["key"]


# ------------------------------------------------------------------------ a running broker


async def test_steering_a_running_broker(tmp_path: Path, upstream: Upstream) -> None:
    worker = {
        "vram_resident_mib": 100,
        "load": {"path": "/load"},
        "unload": {"path": "/unload"},
    }
    async with facade(tmp_path, config(upstream, worker=worker)) as broker:

        async def done(*arguments: str) -> Any:
            told = await remote(*arguments, "--json", url=broker.url)
            assert (told.returncode, told.stderr) == (0, "")
            return json.loads(told.stdout)

        assert (await done("unload", "worker"))["residency"] == "unloading"
        await broker.until("out", lambda s: not s["consumers"]["worker"]["loaded"])
        assert (await done("load", "worker"))["consumer"] == "worker"
        await broker.until("in", lambda s: s["consumers"]["worker"]["loaded"])
        await done("pin", "worker")
        assert (await done("status"))["consumers"]["worker"]["pinned"] is True
        await done("unpin", "worker")
        assert (await done("status"))["consumers"]["worker"]["pinned"] is False
        assert await done("drain") == {"draining": True}
        assert await done("resume") == {"draining": False}
        assert await done("reload") == {"reloaded": True}

        async with broker.connect() as client:
            await client.send("POST", "/v1/tts", "X-Upstream: do=never", body=b"")
            status = await broker.until("served", lambda s: s["requests"])
            name = status["requests"][0]["id"]
            told = await remote("cancel", name, url=broker.url)
            assert told.stdout == f"{name} is cancelled\n"
            assert (await client.answer()).error == "cancelled"


async def test_status_is_an_aligned_screen(tmp_path: Path, upstream: Upstream) -> None:
    async with facade(tmp_path, config(upstream)) as broker, broker.connect() as client:
        await client.send("POST", "/v1/tts", "X-Upstream: do=never", body=b"")
        await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
        told = await remote("status", url=broker.url)
        assert (told.returncode, told.stderr) == (0, "")
        lines = told.stdout.splitlines()
        assert "1 in flight, 0 waiting" in lines[0]
        head = next(line for line in lines if line.startswith("CONSUMER"))
        row = next(line for line in lines if line.startswith("worker"))
        assert row[head.index("MEMORY") :].startswith("resident")
        assert any("serving" in line and "tts" in line for line in lines)
        assert max(map(len, lines)) <= 120


async def test_refusals_and_failures_of_a_broker(tmp_path: Path) -> None:
    keys = [{"name": "admin", "hash": hash_key("the-key"), "admin": True}]
    async with facade(tmp_path, config(None, auth={"keys": keys})) as broker:
        told = await remote("drain", url=broker.url)
        assert (told.returncode, told.stdout) == (1, "")
        assert "unauthorized" in told.stderr
        told = await remote("load", "nobody", url=broker.url, MGPU_KEY="the-key")
        assert (told.returncode, told.stdout) == (2, "")
        assert "no_consumer: there is no consumer named nobody" in told.stderr
        told = await remote("cancel", "no/such id", url=broker.url, MGPU_KEY="the-key")
        assert told.returncode == 2
        broker.path.write_text("nonsense: 1")
        told = await remote("reload", url=broker.url, MGPU_KEY="the-key")
        assert told.returncode == 1
        assert "nonsense" in told.stderr
    told = await remote("status", "--json", url=broker.url)
    assert (told.returncode, told.stdout) == (1, "")
    assert f"no broker answers at {broker.url}" in told.stderr
    assert (await remote("status", "--url", "nonsense", url="")).returncode == 2


# ------------------------------------------------------------------------------- log apply

EVENTS = """
{"at": 1000, "event": {"type": "Started", "run": "r"}}

{"type": "Request", "request": "r1", "consumer": "worker", "kind": "tts", "at": 2000}
{"type": "ServeDone", "request": "r1"}
{"at": 1500, "event": {"type": "Tick"}}
"""


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_log_apply_prints_the_line_of_each_event(form: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, config(None))
    if form == "json":
        core = encode_config(core_config(load_settings(path)))
        path = tmp_path / "core.json"
        path.write_text(json.dumps(core))
    told = mgpu("log", "apply", str(path), given=EVENTS)
    assert (told.returncode, told.stderr) == (0, "")
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert [list(line) for line in lines] == [["seq", "at", "event", "effects", "notes", "crc"]] * 4
    assert [(line["seq"], line["at"]) for line in lines] == [
        (1, 1000),
        (2, 2000),
        (3, 2000),
        (4, 2000),
    ]
    assert lines[1]["effects"] == [{"type": "Serve", "request": "r1", "consumer": "worker"}]
    assert lines[2]["event"] == {"type": "ServeDone", "request": "r1", "outcome": "ok"}
    # What it prints can be read again, and gives the same.
    assert mgpu("log", "apply", str(path), given=told.stdout).stdout == told.stdout


@pytest.mark.parametrize(
    "bad",
    [
        "nonsense",
        "[]",
        '{"type": "Nonsense"}',
        '{"type": "Tick", "at": "now"}',
        '{"type": "Request", "request": "r1"}',
        '{"at": 1, "event": 5}',
    ],
)
def test_log_apply_names_the_bad_line(bad: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, config(None))
    told = mgpu("log", "apply", str(path), given=f'{{"type": "Tick", "at": 1}}\n{bad}\n')
    assert told.returncode == 2
    assert len(told.stdout.splitlines()) == 1
    assert told.stderr.startswith("mgpu: line 2: ")
    assert "Traceback" not in told.stderr


PLANNERS = """
class Everybody:
    def victims(self, target, view):
        return tuple(name for name in view.running if name != target)

an_object = Everybody()

def a_function(target, view):
    return Everybody().victims(target, view)

nothing = 5
"""


@pytest.mark.parametrize("name", ["Everybody", "an_object", "a_function"])
def test_log_apply_takes_a_planner(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLANNERS)
    content = config(None)
    routes = {"load": {"path": "/l"}, "unload": {"path": "/u"}}
    content["consumers"]["worker"] |= {"vram_resident_mib": 10, "unload": {"path": "/u"}}
    content["consumers"]["other"] = {"url": "http://127.0.0.1:9", "vram_resident_mib": 5, **routes}
    path = write_config(tmp_path, content)
    event = '{"type": "Request", "request": "r1", "consumer": "worker", "at": 5}\n'
    arguments = ("log", "apply", str(path))
    plain = json.loads(mgpu(*arguments, given=event).stdout)
    assert [effect["type"] for effect in plain["effects"]] == ["Serve"]
    planner = ("--planner", f"mine:{name}")
    told = mgpu(*arguments, *planner, given=event, PYTHONPATH=str(tmp_path))
    unloads = [e for e in json.loads(told.stdout)["effects"] if e["type"] == "StartUnload"]
    assert [unload["consumer"] for unload in unloads] == ["other"]


@pytest.mark.parametrize("name", ["mine:nothing", "mine:absent", "absent:x", "mine", ":x"])
def test_log_apply_refuses_what_is_no_planner(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLANNERS)
    path = write_config(tmp_path, config(None))
    told = mgpu("log", "apply", str(path), "--planner", name, PYTHONPATH=str(tmp_path))
    assert (told.returncode, told.stdout) == (2, "")
    assert f"--planner {name}" in told.stderr

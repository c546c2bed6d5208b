"""Who runs what listens: as ss, the engines and /proc tell it."""

import os
import socket
from pathlib import Path

import pytest

from mgpu_effects import run_by as module
from mgpu_effects.proc import listening
from mgpu_effects.run_by import RunBy, run_by
from tests.support.dev_http import free_port

ID = "c0de" * 16
UNIT = "/system.slice/whisper.service"
MINE = f"/user.slice/user-{os.getuid()}.slice/user@{os.getuid()}.service/app.slice"


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """Nothing is on the PATH but what is put there: a tool that prints so and ends with a code."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(name: str, text: str = "", code: int = 0) -> None:
        (tmp_path / f"{name}.out").write_text(text)
        script = "while read -r line; do printf '%s\\n' \"$line\"; done"
        (tmp_path / name).write_text(f"#!/bin/sh\n{script} < {tmp_path}/{name}.out\nexit {code}\n")
        (tmp_path / name).chmod(0o755)

    return put


def listens(group: str, address: str = "127.0.0.1:8178") -> str:
    return f"LISTEN 0      128    {address} 0.0.0.0:* cgroup:{group}\n"


async def told(port: int = 8178) -> RunBy:
    return (await run_by([port]))[port]


@pytest.mark.parametrize("address", ["127.0.0.1:8178", "0.0.0.0:8178", "*:8178", "[::]:8178"])
async def test_a_unit_of_the_system(tools, address):
    tools("ss", listens(UNIT, address))
    assert await told() == RunBy(unit="whisper.service", cgroup="whisper.service")


async def test_a_unit_of_the_user(tools):
    tools("ss", listens(f"{MINE}/comfyui.service"))
    assert await told() == RunBy(unit="comfyui.service", user=True, cgroup="comfyui.service")


@pytest.mark.parametrize(
    "group",
    [
        "/",
        "/user.slice/user-1000.slice/session-3.scope",
        "/user.slice/user-4242.slice/user@4242.service/app.slice/comfyui.service",  # another's
        f"{MINE}/app-org.kde.konsole@1.service",  # a terminal in which it was started
        "/system.slice/docker.service",  # a proxy for a container
        "/system.slice/ssh.service",
    ],
)
async def test_what_must_not_be_stopped_for_it_is_no_unit_of_it(tools, group):
    tools("ss", listens(group))
    assert await told() == RunBy()


async def test_one_on_another_address_is_another(tools):
    tools("ss", listens(UNIT, "10.0.0.7:8178"))
    assert await told() == RunBy()


@pytest.mark.parametrize("ports", ["127.0.0.1:8178->80/tcp", "0.0.0.0:8170-8180->70-80/tcp"])
@pytest.mark.parametrize("engine", ["docker", "podman"])
async def test_a_container_by_the_port_that_it_publishes(tools, engine, ports):
    tools("ss", listens("/system.slice/docker.service"))
    tools(engine, f"{ID}\tvoice\t9000/tcp, {ports}\n")
    assert await told() == RunBy(container="voice", engine=engine, cgroup=ID)


@pytest.mark.parametrize(
    "group",
    [f"/system.slice/docker-{ID}.scope", f"/docker/{ID}", f"/x/libpod-{ID}.scope/container"],
)
async def test_a_container_on_the_hosts_network_by_its_control_group(tools, group):
    tools("ss", listens(group))
    tools("docker", f"{ID}\tvoice\t\n{'f' * 64}\tother\t127.0.0.1:1->1/tcp\n")
    assert await told() == RunBy(container="voice", engine="docker", cgroup=ID)


async def test_a_unit_that_keeps_a_container_is_who_runs_it(tools):
    """Stopped by podman, the container would be started again by its unit."""
    tools("ss", listens(f"/system.slice/voice.service/libpod-payload-{ID}"))
    tools("podman", f"{ID}\tsystemd-voice\t127.0.0.1:8178->80/tcp\n")
    assert await told() == RunBy(unit="voice.service", cgroup="voice.service")


async def test_a_container_that_the_engine_does_not_tell_of_is_nobodys(tools):
    tools("ss", listens(f"/system.slice/docker-{ID}.scope"))
    tools("docker", "", 1)
    assert await told() == RunBy()


async def test_without_tools_proc_tells_of_ones_own_processes(tools, monkeypatch):
    parts = frozenset({"system.slice", "whisper.service"})
    monkeypatch.setattr(module, "_own_parts", lambda port: parts if port == 8178 else frozenset())
    assert (await told()).unit == "whisper.service"
    assert await told(8179) == RunBy()


def test_listening_processes_are_found_by_their_sockets():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert [process.pid for process in listening(port)] == [os.getpid()]
        assert listening(port, Path("/nowhere")) == ()
    assert listening(free_port()) == ()

"""Containers: docker and podman as a stand-in says and does it, with the words of the real ones."""

import os
import sys
from pathlib import Path

import pytest

from mgpu_effects.calls import control_session
from mgpu_effects.drivers import make_driver
from mgpu_effects.drivers.container import ContainerDriver
from mgpu_effects.gpu_processes import Owner
from mgpu_effects.services import Services
from mgpu_effects.settings import (
    ConsumerSettings,
    ContainerSettings,
    DriverSettings,
    SchedulerSettings,
    Settings,
    Step,
)
from tests.support import upstream as upstream_module
from tests.support.brokers import (
    MIB,
    over,
    residency,
    running,
    settings_of,
    submit,
)
from tests.support.dev_http import free_port
from tests.support.engine import Engine, container_id
from tests.support.upstream import eventually

ENGINES = ["docker", "podman"]
SOCKET = "unix:///var/run/docker.sock"


@pytest.fixture
def engine(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    engine = Engine(folder)
    yield engine
    engine.close()


async def answers() -> bool:
    return True


async def silent() -> bool:
    return False


def driver(ready=answers, **settings: object) -> ContainerDriver:
    return ContainerDriver("voice", ContainerSettings(name="box", **settings), ready)


@pytest.mark.parametrize("command", ENGINES)
async def test_start_and_stop_go_through_the_command(engine, command):
    engine.has("box", "created")
    mine = driver(engine=command)
    assert await mine.running() is False
    assert await mine.start() is None
    assert engine.state("box") == "running"
    assert await mine.running() is True
    assert await mine.stop() is None
    assert engine.state("box") == "exited"
    assert engine.calls == [[command, "start", "box"], [command, "stop", "box"]]
    assert engine.languages == {"C"}


@pytest.mark.parametrize("command", ENGINES)
async def test_starting_what_runs_and_stopping_what_does_not_changes_nothing(engine, command):
    engine.has("box", "running")
    mine = driver(engine=command)
    assert await mine.start() is None
    assert engine.state("box") == "running"
    engine.has("box", "exited")
    assert await mine.stop() is None
    assert await mine.kill() is None
    assert engine.state("box") == "exited"


@pytest.mark.parametrize("command", ENGINES)
async def test_a_paused_container_goes_on_or_ends(engine, command):
    engine.has("box", "paused")
    mine = driver(engine=command)
    assert await mine.running() is True
    assert await mine.start() is None
    assert engine.state("box") == "running"
    engine.has("box", "paused")
    assert await mine.stop() is None
    assert await mine.running() is False


@pytest.mark.parametrize("command", ENGINES)
async def test_its_processes_are_known_by_the_id_that_the_engine_gave_it(engine, command):
    engine.has("box", "running")
    container = DriverSettings(container=ContainerSettings(name="box", engine=command))
    boxed = ConsumerSettings(name="voice", url="http://127.0.0.1:9", driver=container)
    plain = ConsumerSettings(name="other", url="http://127.0.0.1:10")
    async with control_session() as session:
        services = Services(session, on_exit=lambda _name: None)
        services.configure(Settings(consumers={"voice": boxed, "other": plain}))
        assert await services.owners() == (
            Owner(consumer="voice", cgroup=container_id("box"), port=9),
            Owner(consumer="other", port=10),
        )


async def test_its_id_is_asked_now_and_then_and_anew_after_a_start(engine):
    mine = driver()
    assert await mine.container_id() is None
    engine.has("box", "created")
    assert await mine.container_id() is None  # not yet asked again
    assert await mine.start() is None
    assert await mine.container_id() == container_id("box")
    engine.behaves(says=[1, "Cannot connect to the Docker daemon"])
    assert await mine.container_id() == container_id("box")


async def test_what_podman_left_stopping_ends_before_it_starts(engine):
    engine.has("box", "stopping")
    assert await driver(engine="podman").start() is None
    assert [verb for _, verb, *_ in engine.calls] == ["stop", "start"]
    assert engine.state("box") == "running"


@pytest.mark.parametrize(("grace_s", "seconds"), [(0, "0"), (20, "20"), (0.5, "1")])
async def test_the_grace_goes_to_the_engine_in_whole_seconds(engine, grace_s, seconds):
    engine.has("box", "running")
    assert await driver(grace_s=grace_s).stop() is None
    assert engine.calls == [["docker", "stop", "-t", seconds, "box"]]


async def test_what_the_engine_fails_to_stop_is_killed(engine):
    engine.has("box", "running")
    engine.behaves(stop="fail")
    assert await driver().stop() is None
    assert engine.calls == [["docker", "stop", "box"], ["docker", "kill", "box"]]
    assert engine.state("box") == "exited"


@pytest.mark.parametrize("command", ENGINES)
async def test_a_stop_that_hangs_beyond_its_grace_is_followed_by_a_kill(
    engine, command, monkeypatch
):
    monkeypatch.setattr("mgpu_effects.drivers.container.KILLED_S", 2.0)
    engine.has("box", "running")
    engine.behaves(stop="hang")
    assert await driver(engine=command, grace_s=0).stop() is None
    assert await driver(engine=command).running() is False


async def test_what_survives_a_kill_is_an_error(engine, monkeypatch):
    monkeypatch.setattr("mgpu_effects.drivers.container.KILLED_S", 2.0)
    engine.has("box", "running")
    engine.behaves(stop="fail", kill="nothing")
    assert await driver().stop() == "still_running"


SAID = [
    (
        1,
        (
            "permission denied while trying to connect to the Docker daemon socket at"
            f' {SOCKET}: Post "http://%2Fvar%2Frun%2Fdocker.sock/v1.50/containers/box/start":'
            " dial unix /var/run/docker.sock: connect: permission denied\n"
            "Error: failed to start containers: box\n"
        ),
        "not_permitted",
    ),
    (1, f"Cannot connect to the Docker daemon at {SOCKET}. Is the docker daemon running?\n", ""),
    (
        1,
        (
            f"failed to connect to the docker API at {SOCKET}; check if the path is correct and if"
            " the daemon is running: dial unix /var/run/docker.sock: connect: no such file or"
            " directory\n"
        ),
        "",
    ),
    (
        1,
        (
            'error during connect: Post "http://%2Fvar%2Frun%2Fdocker.sock/v1.41/containers/box/'
            'stop?t=30": EOF\n'
        ),
        "",
    ),
    (
        1,
        (
            'Failed to initialize: unable to resolve docker endpoint: context "zzz": context not'
            " found\n"
        ),
        "",
    ),
]


@pytest.mark.parametrize(("code", "words", "error"), SAID)
async def test_what_keeps_the_command_from_its_daemon_has_a_code(engine, code, words, error):
    engine.has("box", "running")
    engine.behaves(says=[code, words])
    error = error or "no_daemon"
    assert await driver().running() is None
    assert await driver().start() == error
    assert await driver().stop() == error
    assert await driver().kill() == error
    assert ["docker", "kill", "box"] not in engine.calls[:-1]  # none of them is worth another try


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            1,
            (
                'Error response from daemon: could not select device driver "" with capabilities:'
                " [[gpu]]\nError: failed to start containers: box\n"
            ),
        ),
        (
            1,
            (
                "Error response from daemon: failed to create shim task: OCI runtime create failed:"
                ' runc create failed: unable to start container process: exec: "/run.sh":'
                " permission denied: unknown\nError: failed to start containers: box\n"
            ),
        ),
    ],
)
async def test_a_container_that_cannot_start_fails_and_the_log_says_why(
    engine, caplog, code, words
):
    engine.has("box", "created")
    engine.behaves(refusal=[code, words])
    assert await driver().start() == "failed"
    assert words.strip() in caplog.text
    assert "voice: docker start box" in caplog.text


@pytest.mark.parametrize("command", ENGINES)
async def test_a_container_that_is_not_there(engine, command):
    mine = driver(engine=command)
    assert await mine.running() is False
    assert await mine.start() == "no_such_container"
    assert await mine.stop() == "no_such_container"
    assert await mine.kill() == "no_such_container"


@pytest.mark.parametrize("command", ENGINES)
async def test_a_host_without_the_engine(monkeypatch, tmp_path, command):
    monkeypatch.setenv("PATH", str(tmp_path))
    mine = driver(engine=command)
    assert await mine.start() == "engine_missing"
    assert await mine.stop() == "engine_missing"
    assert await mine.running() is None


async def test_a_container_that_ends_before_it_answers(engine):
    engine.has("box", "created")
    engine.behaves(then="exited")
    assert await driver(silent).start() == "container_ended"


@pytest.mark.parametrize("state", ["running", "restarting"])
async def test_a_container_that_runs_and_never_answers(engine, state):
    engine.has("box", "created")
    engine.behaves(then=state)
    assert await driver(silent, ready_s=0.5).start() == "not_ready"


@pytest.mark.parametrize(
    ("state", "is_running"),
    [
        ("running", True),
        ("paused", True),
        ("restarting", True),
        ("stopping", True),
        ("created", False),
        ("initialized", False),
        ("stopped", False),
        ("exited", False),
        ("removing", False),
        ("dead", False),
        ("something new", None),
    ],
)
async def test_a_containers_state_tells_whether_it_runs(engine, state, is_running):
    engine.has("box", state)
    assert await driver().running() is is_running


# ------------------------------------------------------------------------------------ as a service


def boxed(name: str, port: int, **more: object) -> ConsumerSettings:
    fields: dict[str, object] = {"vram_resident_mib": MIB, "engine": "docker", **more}
    container = ContainerSettings(name=f"box-{name}", engine=fields.pop("engine"), ready_s=20)
    return ConsumerSettings(
        name=name,
        url=f"http://127.0.0.1:{port}",
        driver=DriverSettings(container=container),
        **fields,
    )


def served(port: int) -> tuple[str, ...]:
    """A service for a container, which ends by SIGTERM."""
    return (sys.executable, str(Path(upstream_module.__file__)), str(port), "5")


@pytest.mark.parametrize("command", ENGINES)
async def test_a_broker_starts_and_stops_containers_for_their_jobs(engine, tmp_path, command):
    ports = {"a": free_port(), "b": free_port()}
    for name, port in ports.items():
        engine.has(f"box-{name}", "created", served(port))
    settings = settings_of(*(boxed(name, port, engine=command) for name, port in ports.items()))
    async with running(settings, tmp_path / "log") as broker:
        await eventually(lambda: all(residency(broker, name) == "absent" for name in ports))
        for name, other in (("a", "b"), ("b", "a"), ("a", "b")):
            job, client = submit(broker, name)
            await over(job, 30)
            assert client.status == 200
            assert engine.state(f"box-{name}") == "running"
            assert engine.state(f"box-{other}") != "running"
    assert engine.state("box-a") == "running"  # the engine looks after it, not the broker
    assert [verb for _, verb, *_ in engine.calls] == ["start", "stop", "start", "stop", "start"]


async def test_a_container_that_ran_before_the_broker_makes_room_before_another_loads(
    engine, tmp_path
):
    ports = {"a": free_port(), "b": free_port()}
    for name, port in ports.items():
        engine.has(f"box-{name}", "created", served(port))
    settings = settings_of(*(boxed(name, port) for name, port in ports.items()))
    async with control_session() as session:
        before = make_driver(settings.consumers["a"], session)
        assert before is not None
        assert await before.start() is None
    async with running(settings, tmp_path / "log") as broker:
        job, client = submit(broker, "b")  # at once: no probe has told anything yet
        await over(job, 30)
        assert client.status == 200
        assert engine.state("box-a") == "exited"
        await eventually(lambda: residency(broker, "a") == "absent")


async def test_after_its_stop_by_driver_a_load_by_route_starts_the_container_first(
    engine, tmp_path
):
    port = free_port()
    engine.has("box-a", "created", served(port))
    consumer = boxed("a", port, load=(Step(path="/load"),), unload=(Step(path="/unload"),))
    async with control_session() as session:
        services = Services(session, on_exit=lambda _name: None)
        settings = Settings(consumers={"a": consumer})
        services.configure(settings)
        for _ in range(2):
            assert await services.load("a") is None
            assert engine.state("box-a") == "running"
            assert await services.unload("a", "routes") is None
            assert engine.state("box-a") == "running"
            assert await services.unload("a", "driver") is None
            assert engine.state("box-a") == "exited"
            assert await services.unload("a", "routes") is None  # nobody is there to be called
        assert [verb for _, verb, *_ in engine.calls] == ["start", "stop", "start", "stop"]


async def test_a_stop_that_takes_all_its_time_ends_in_a_kill(engine):
    engine.has("box-a", "running")
    engine.behaves(stop="hang")
    consumer = boxed("a", free_port())
    async with control_session() as session:
        services = Services(session, on_exit=lambda _name: None)
        limits = SchedulerSettings(unload_timeout_s=4)
        settings = Settings(consumers={"a": consumer}, scheduler=limits)
        services.configure(settings)
        assert await services.unload("a", "driver") is None
    assert engine.calls == [["docker", "stop", "box-a"], ["docker", "kill", "box-a"]]
    assert engine.state("box-a") == "exited"

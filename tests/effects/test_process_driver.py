import asyncio
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from mgpu_effects.calls import control_session
from mgpu_effects.drivers import make_driver
from mgpu_effects.settings import ConsumerSettings, DriverSettings, ProcessSettings
from tests.support.dev_http import free_port

SERVICE = Path(__file__).parent.parent / "support" / "dev_service.py"


def alive(pid: int) -> bool:
    """A zombie is as gone as can be where nobody reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def until(condition: Callable[[], object], limit_s: float = 20) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - it is another process that changes
            await asyncio.sleep(0.02)


class Service:
    """Makes drivers for dev_service.py and sees to it that none is left at the end."""

    def __init__(self, session, tmp_path: Path) -> None:
        self.port = free_port()
        self.exits = 0
        self._session = session
        self._pids = tmp_path / "pids"
        self._drivers = []

    def driver(self, *options: str, **settings: object):
        command = (sys.executable, str(SERVICE), "--port", str(self.port))
        settings = {"command": (*command, "--pids", str(self._pids), *options), **settings}
        consumer = ConsumerSettings(
            name="voice",
            url=f"http://127.0.0.1:{self.port}",
            driver=DriverSettings(process=ProcessSettings(**settings)),
        )
        driver = make_driver(consumer, self._session, self._exited)
        self._drivers.append(driver)
        return driver

    def _exited(self) -> None:
        self.exits += 1

    @property
    def started(self) -> bool:
        return self._pids.exists()

    @property
    def pids(self) -> list[int]:
        return [int(line) for line in self._pids.read_text().splitlines()]

    async def get(self, path: str) -> None:
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            await writer.drain()
            writer.close()

    async def close(self) -> None:
        for driver in self._drivers:
            await driver.close()


@pytest.fixture
async def service(tmp_path):
    async with control_session() as session:
        service = Service(session, tmp_path)
        yield service
        await service.close()


async def test_start_returns_when_the_service_answers(service):
    driver = service.driver("--ready-after", "0.5")
    assert await driver.running() is False
    assert await driver.start() is None
    assert await driver.running() is True
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.close()


async def test_starting_twice_starts_one_process(service):
    driver = service.driver()
    assert await asyncio.gather(driver.start(), driver.start()) == [None, None]
    pids = service.pids
    assert await driver.start() is None
    assert service.pids == pids


async def test_stop_ends_it_and_a_later_start_brings_another(service):
    driver = service.driver()
    assert await driver.start() is None
    (first,) = service.pids
    assert await driver.stop() is None
    assert not alive(first)
    assert await driver.running() is False
    assert await driver.start() is None
    assert service.pids != [first]
    assert service.exits == 0


async def test_stopping_what_does_not_run_is_done_at_once(service):
    assert await service.driver().stop() is None


async def test_its_children_are_stopped_with_it(service):
    driver = service.driver("--child")
    assert await driver.start() is None
    leader, child = service.pids
    assert await driver.stop() is None
    assert not alive(leader)
    assert not alive(child)


async def test_a_child_that_outlives_its_parent_is_waited_for_and_killed(service):
    driver = service.driver("--stubborn-child", grace_s=0.6)
    assert await driver.start() is None
    leader, child = service.pids
    started = asyncio.get_running_loop().time()
    stopping = asyncio.create_task(driver.stop())
    await until(lambda: not alive(leader))
    assert alive(child)
    assert await stopping is None
    assert asyncio.get_running_loop().time() - started >= 0.6
    assert not alive(child)


async def test_the_stop_signal_comes_a_second_time_before_the_kill(service):
    driver = service.driver("--ignore-terms", "1", grace_s=4)
    assert await driver.start() is None
    assert await driver.stop() is None
    assert driver.tail()[-2:] == ("TERM, 1 left to ignore", "TERM, 0 left to ignore")


async def test_who_ignores_every_stop_signal_is_killed_after_the_grace(service):
    driver = service.driver("--ignore-terms", "99", grace_s=0.4)
    assert await driver.start() is None
    (leader,) = service.pids
    assert await driver.stop() is None
    assert not alive(leader)


async def test_a_cancelled_stop_kills_at_once(service):
    driver = service.driver("--ignore-terms", "99", "--stubborn-child", grace_s=50)
    assert await driver.start() is None
    stopping = asyncio.create_task(driver.stop())
    await until(lambda: any("TERM" in line for line in driver.tail()))
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert not any(map(alive, service.pids))
    assert await driver.running() is False


async def test_the_stop_signal_is_the_configured_one(service):
    driver = service.driver("--ignore-terms", "99", stop_signal="USR1", grace_s=50)
    assert await driver.start() is None
    async with asyncio.timeout(20):
        assert await driver.stop() is None
    assert driver.tail() == ("hello",), "it saw no TERM"


async def test_an_exit_before_it_answers_is_told_with_its_code_and_last_words(service):
    driver = service.driver("--exit", "3", "--say", "no such model")
    assert await driver.start() == "exited_3"
    assert driver.tail()[-1] == "no such model"
    assert await driver.running() is False


async def test_its_last_words_are_logged_as_an_error_when_it_ends_by_itself(service, caplog):
    caplog.set_level(logging.ERROR, logger="mgpu_effects.drivers.process")
    assert await service.driver("--exit", "3", "--lines", "20", "--say", "no such model").start()
    await until(lambda: len(caplog.records) == 3)
    said = "\n  ".join([*(f"line {n}" for n in range(11, 20)), "no such model"])
    assert {record.message for record in caplog.records} == {
        "voice did not start: exited_3",
        "voice ended by itself: exited_3",
        f"voice said last:\n  {said}",
    }


async def test_one_that_never_answers_is_not_ready_and_its_group_killed(service):
    driver = service.driver("--ready-after", "300", "--stubborn-child", ready_s=3)
    assert await driver.start() == "not_ready"
    assert len(service.pids) == 2
    assert not any(map(alive, service.pids))
    assert await driver.running() is False


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"command": ("/no/such/program",)}, "not_found"),
        ({"command": ("/",)}, "not_permitted"),
        ({"cwd": "/no/such/directory"}, "not_found"),
    ],
)
async def test_what_cannot_be_started_says_so(service, settings, error):
    driver = service.driver(**settings)
    assert await driver.start() == error
    assert await driver.running() is False


async def test_who_answers_already_is_not_ours_to_start_or_stop(service):
    driver = service.driver()
    async with await asyncio.start_server(answer_ok, "127.0.0.1", service.port):
        assert await driver.start() == "not_ours"
        assert await driver.stop() == "not_ours"
    assert not service.started


async def answer_ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()
    writer.close()


async def test_a_cancelled_start_leaves_nothing_behind(service):
    driver = service.driver("--ready-after", "300", "--child")
    starting = asyncio.create_task(driver.start())
    await until(lambda: service.started)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert len(service.pids) == 2
    assert not any(map(alive, service.pids))
    assert await driver.stop() is None


async def test_a_stop_ends_a_start_under_way(service):
    driver = service.driver("--ready-after", "300")
    starting = asyncio.create_task(driver.start())
    await until(lambda: service.started)
    assert await driver.stop() is None
    assert await starting == "killed_15"


async def test_an_end_by_itself_is_noticed_and_what_it_left_is_killed(service):
    driver = service.driver("--stubborn-child", grace_s=0.2)
    assert await driver.start() is None
    leader, child = service.pids
    await service.get("/crash")
    await until(lambda: service.exits)
    assert service.exits == 1
    assert await driver.running() is False
    assert not alive(leader)
    assert not alive(child)
    assert await driver.start() is None
    assert await driver.running() is True


async def test_its_output_is_kept_and_passed_to_a_logger_of_its_name(service, caplog):
    caplog.set_level(logging.INFO, logger="mgpu.output.voice")
    driver = service.driver("--lines", "1000", "--say", "the end")
    assert await driver.start() is None
    await until(lambda: "the end" in driver.tail())
    assert driver.tail() == (*(f"line {n}" for n in range(991, 1000)), "the end")
    said = [record.message for record in caplog.records if record.name == "mgpu.output.voice"]
    assert said == [*(f"line {n}" for n in range(1000)), "the end"]


async def test_an_endless_line_is_cut(service):
    driver = service.driver("--say", "x" * 100_000)
    assert await driver.start() is None
    await until(driver.tail)
    assert driver.tail() == ("x" * 4096,)


async def test_its_environment_is_ours_and_what_is_configured(service, monkeypatch):
    monkeypatch.setenv("FROM_US", "inherited")
    print_both = "import os; print(os.environ['FROM_US'], os.environ['OF_ITS_OWN'])"
    driver = service.driver(
        command=(sys.executable, "-c", print_both), env={"OF_ITS_OWN": "configured"}
    )
    assert await driver.start() == "exited_0"
    assert driver.tail() == ("inherited configured",)


async def test_its_directory_is_the_configured_one(service, tmp_path):
    driver = service.driver(
        command=(sys.executable, "-c", "import os; print(os.getcwd())"), cwd=str(tmp_path)
    )
    assert await driver.start() == "exited_0"
    assert driver.tail() == (str(tmp_path),)


async def test_it_is_in_a_session_of_its_own(service):
    driver = service.driver("--child")
    assert await driver.start() is None
    leader, child = service.pids
    assert os.getsid(leader) == os.getsid(child) == leader


async def test_close_ends_it(service):
    driver = service.driver("--child")
    assert await driver.start() is None
    pids = service.pids
    await driver.close()
    assert not any(map(alive, pids))


async def test_what_a_killed_broker_left_running_can_be_stopped(service):
    """The driver that started it stands for the broker that was killed: it does nothing more."""
    assert await service.driver("--child").start() is None
    left = service.pids
    assert await service.driver().stop() is None
    assert not any(map(alive, left))


async def test_what_a_killed_broker_left_running_makes_room_for_a_new_one(service):
    assert await service.driver("--child").start() is None
    left = service.pids
    driver = service.driver()
    assert await driver.start() is None
    assert not any(map(alive, left))
    assert await driver.running() is True

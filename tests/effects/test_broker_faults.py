"""Services that misbehave, processes that end, and defects of our own: each is an event."""

import asyncio
import json
import socket
import sys
from pathlib import Path

import pytest
from attrs import evolve

from mgpu_core.events import Load, Unload
from mgpu_effects.settings import (
    ConsumerSettings,
    DriverSettings,
    ProbeSettings,
    ProcessSettings,
    Timeouts,
)
from tests.support import upstream as upstream_module
from tests.support.brokers import (
    MIB,
    logged,
    only_resident,
    over,
    paths,
    residency,
    running,
    service,
    settings_of,
    submit,
    told,
)
from tests.support.clients import make_job
from tests.support.upstream import eventually

# -------------------------------------------------------------------------- services that misbehave


async def test_a_service_that_is_down_fails_its_jobs_before_they_wait(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    settings = settings_of(ConsumerSettings(name="a", url=url))
    async with running(settings, tmp_path) as broker:
        await eventually(lambda: broker.state.consumers["a"].healthy is False)
        job, client = submit(broker, "a")
        await over(job)

        assert told(client) == "consumer_unreachable"


async def test_a_service_that_dies_while_it_answers(upstream, tmp_path):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        job, client = submit(broker, "a", "/work?do=stream&chunks=10000&gap=0.02")
        await eventually(lambda: client.chunks)
        upstream.kill()
        await over(job)

        assert client.calls == ["start", "fail"]
        await eventually(lambda: not broker.state.requests)
    assert [event["outcome"] for event in logged(tmp_path, "ServeDone")] == ["upstream_error"]


async def test_a_service_that_never_answers_blocks_nobody_for_ever(upstream, tmp_path):
    limits = Timeouts(connect=0.1, first_byte=0.3)
    async with running(settings_of(service(upstream, "a", timeout_s=limits)), tmp_path) as broker:
        first, client = submit(broker, "a", "/work?do=never")
        second, other = submit(broker, "a")
        await over(first)
        await over(second)

        assert told(client) == "upstream_timeout"
        assert other.status == 200
    assert [event["outcome"] for event in logged(tmp_path, "ServeDone")] == ["timeout", "ok"]


async def test_an_unload_that_is_refused_is_reported_and_its_waiter_told(upstream, tmp_path):
    upstream.rule("/a/unload", status=500)
    settings = settings_of(
        service(upstream, "a"), service(upstream, "b"), queue_timeout_s=1, when_unfit="wait"
    )
    async with running(settings, tmp_path) as broker:
        await only_resident(broker, "a")
        job, client = submit(broker, "b")
        await over(job)

        assert told(client) == "queue_timeout"
        assert residency(broker, "a") == "unknown"
        upstream.rule("/a/unload")
    assert logged(tmp_path, "UnloadDone")[-1]["error"] == "http_500"


async def test_an_unload_that_frees_nothing_does_not_lead_to_a_load(
    upstream, tmp_path, monkeypatch
):
    card = tmp_path / "card.json"
    monkeypatch.setenv("MGPU_SIMULATED_GPU", str(card))
    show(card, free_mib=1_000)
    settings = settings_of(
        service(upstream, "a"), service(upstream, "b"), sampler="simulated", queue_timeout_s=2
    )
    async with running(settings, tmp_path / "log") as broker:
        await only_resident(broker, "a")
        await eventually(lambda: broker.state.cards)
        job, client = submit(broker, "b")
        await over(job)

        assert told(client) == "queue_timeout"
        assert "/b/load" not in paths(upstream)
        assert "/a/unload" in paths(upstream)

        # As soon as the memory is really free, the next one gets in.
        show(card, free_mib=7_800)
        job, client = submit(broker, "b")
        await over(job)
        assert client.status == 200


def show(card: Path, free_mib: int) -> None:
    """Let the simulated card read so, whole at any moment."""
    reading = {"index": 0, "total_mib": 8_000, "used_mib": 8_000 - free_mib, "free_mib": free_mib}
    new = card.with_suffix(".new")
    new.write_text(json.dumps({"gpus": [reading]}))
    new.replace(card)


async def test_a_load_that_fails_fails_all_who_wait_for_it(upstream, tmp_path):
    upstream.rule("/b/load", status=503)
    settings = settings_of(service(upstream, "a"), service(upstream, "b"))
    async with running(settings, tmp_path) as broker:
        await only_resident(broker, "a")
        jobs = [submit(broker, "b") for _ in range(2)]
        for job, _ in jobs:
            await over(job)

        assert [told(client) for _, client in jobs] == ["load_failed", "load_failed"]
    assert [event["error"] for event in logged(tmp_path, "SwapDone")] == ["http_503"]


async def test_a_load_that_never_ends_is_given_up(upstream, tmp_path):
    upstream.rule("/b/load", do="never")
    settings = settings_of(service(upstream, "a"), service(upstream, "b"), load_timeout_s=0.3)
    async with running(settings, tmp_path) as broker:
        await only_resident(broker, "a")
        job, client = submit(broker, "b")
        await over(job)

        assert told(client) == "load_failed"
        await eventually(lambda: upstream.stats()["active"] == 0)
        # The core gave it up by its own clock, or heard of it: one completion, whoever was first.
        await eventually(lambda: len(logged(tmp_path, "SwapDone")) == 1)


async def test_a_forced_unload_ends_a_load_under_way(upstream, tmp_path):
    upstream.rule("/b/load", do="never")
    settings = settings_of(service(upstream, "a"), service(upstream, "b"))
    async with running(settings, tmp_path) as broker:
        await only_resident(broker, "a")
        job, client = submit(broker, "b")
        await eventually(lambda: upstream.count("/b/load") == 1)

        await broker.apply(lambda at: Unload(at=at, consumers=("b",), force=True))
        await over(job)
        await eventually(lambda: residency(broker, "b") == "absent")

        assert told(client) == "unloaded"
        calls = paths(upstream)
        assert calls.index("/b/load") < len(calls) - 1 - calls[::-1].index("/b/unload")
        assert upstream.stats()["gone"] == 1
    assert [event["error"] for event in logged(tmp_path, "SwapDone")] == ["cancelled"]


async def test_a_sampler_that_vanishes_leaves_the_static_budget(upstream, tmp_path, monkeypatch):
    card = tmp_path / "card.json"
    monkeypatch.setenv("MGPU_SIMULATED_GPU", str(card))
    show(card, free_mib=2_000)
    settings = settings_of(service(upstream, "a"), service(upstream, "b"), sampler="simulated")
    async with running(settings, tmp_path / "log") as broker:
        await only_resident(broker, "a")
        await eventually(lambda: broker.state.cards)

        card.unlink()
        await eventually(lambda: broker.state.sample_error == "simulated_failed")
        job, client = submit(broker, "b")
        await over(job)
        assert client.status == 200

        show(card, free_mib=2_000)
        await eventually(lambda: broker.state.sample_error is None)


async def test_a_probe_that_flaps_closes_and_opens_the_door(upstream, tmp_path):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        for _ in range(2):
            upstream.rule("/a/health", status=503)
            await eventually(lambda: broker.state.consumers["a"].healthy is False)
            job, client = submit(broker, "a")
            await over(job)
            assert told(client) == "consumer_unreachable"

            upstream.rule("/a/health")
            await eventually(lambda: broker.state.consumers["a"].healthy)
            job, client = submit(broker, "a")
            await over(job)
            assert client.status == 200


async def test_a_probe_that_hangs_is_never_doubled(upstream, tmp_path):
    upstream.rule("/a/health", do="never")
    async with running(settings_of(service(upstream, "a")), tmp_path):
        await eventually(lambda: upstream.count("/a/health") == 1)
        await asyncio.sleep(0.5)  # five intervals
        assert upstream.count("/a/health") == 1


# -------------------------------------------------------------------------------- processes of ours


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def own_process(name: str, port: int) -> ConsumerSettings:
    """A service that the broker runs itself."""
    command = (sys.executable, str(Path(upstream_module.__file__)), str(port), "5")
    return ConsumerSettings(
        name=name,
        url=f"http://127.0.0.1:{port}",
        vram_resident_mib=MIB,
        driver=DriverSettings(process=ProcessSettings(command=command, grace_s=2, ready_s=20)),
    )


def listening(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


async def test_processes_are_started_for_their_jobs_and_ended_for_others(tmp_path):
    ports = {"a": free_port(), "b": free_port()}
    settings = settings_of(*(own_process(name, port) for name, port in ports.items()))
    async with running(settings, tmp_path) as broker:
        for name, other in (("a", "b"), ("b", "a"), ("a", "b")):
            job, client = submit(broker, name)
            await over(job, 30)
            assert client.status == 200
            assert (listening(ports[name]), listening(ports[other])) == (True, False)
    assert not any(listening(port) for port in ports.values())


async def test_a_process_that_crashes_is_seen_at_once_and_started_again(tmp_path):
    port = free_port()
    settings = settings_of(own_process("a", port))
    patient = evolve(settings, probe=ProbeSettings(interval_s=60, timeout_s=2, failures=2))
    async with running(patient, tmp_path) as broker:
        job, client = submit(broker, "a", "/work?do=exit")
        await over(job, 30)
        assert told(client) == "upstream_disconnected"
        await eventually(lambda: residency(broker, "a") == "absent")

        job, client = submit(broker, "a")
        await over(job, 30)
        assert client.status == 200


# -------------------------------------------------------------------------------------- our defects


async def test_an_effect_that_raises_is_an_event_and_the_loop_goes_on(
    upstream, tmp_path, monkeypatch, caplog
):
    settings = settings_of(service(upstream, "a"), service(upstream, "b"))
    async with running(settings, tmp_path) as broker:
        await only_resident(broker, "a")

        async def defective(_name: str) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(broker._services, "load", defective)
            job, client = submit(broker, "b")
            await over(job)
        assert told(client) == "load_failed"
        assert "a defect while loading b" in caplog.text

        job, client = submit(broker, "a")
        await over(job)
        assert client.status == 200
    assert logged(tmp_path, "SwapDone")[0]["error"] == "internal_error"


async def test_a_defect_while_serving_is_told_with_an_id_that_the_log_has(
    upstream, tmp_path, caplog
):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        job, client = make_job("/work", consumer="a")

        async def defective(_status: int, _headers: object) -> None:
            raise ZeroDivisionError

        client.start = defective  # type: ignore[method-assign,assignment]
        broker.submit(job)
        await over(job)

        assert told(client) == "internal_error"
        assert client.error is not None
        defect = client.error.message.split()[-1]
        assert f"defect {defect} while serving request {job.request}" in caplog.text
        await eventually(lambda: not broker.state.requests)
    assert [event["outcome"] for event in logged(tmp_path, "ServeDone")] == ["upstream_error"]


async def test_a_sampler_or_probe_with_a_defect_is_an_event(
    upstream, tmp_path, monkeypatch, caplog
):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:

        async def defective(*_anything: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(broker._watch._sampler, "read", defective)
        monkeypatch.setattr(broker._services, "probe", defective)

        await eventually(lambda: broker.state.sample_error == "internal_error")
        await eventually(lambda: broker.state.consumers["a"].probe_error == "internal_error")
        monkeypatch.undo()
        await eventually(lambda: broker.state.consumers["a"].healthy)
        await eventually(lambda: broker.state.sample_error == "no_gpu")
    assert "ZeroDivisionError" in caplog.text


async def test_a_defect_of_the_scheduler_stops_granting_but_not_what_is_served(
    upstream, tmp_path, monkeypatch, caplog
):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        served, served_client = submit(broker, "a", "/work?delay=0.7")
        waiting, waiting_client = submit(broker, "a")
        await eventually(lambda: upstream.count("/a/work") == 1)

        def defective(*_anything: object) -> None:
            raise AssertionError("the step does not come to rest")

        monkeypatch.setattr(broker._scheduler, "step", defective)
        await asyncio.wait_for(broker.failed.wait(), 5)
        await over(waiting)
        late, late_client = submit(broker, "a")
        await over(late)
        await over(served)

        assert told(waiting_client) == told(late_client) == "scheduler_error"
        assert served_client.status == 200
        with pytest.raises(Exception, match="scheduler failed"):
            await broker.apply(lambda at: Load(at=at, consumer="a"))
    assert "does not come to rest" in caplog.text


async def test_a_caller_that_gives_up_on_its_event_harms_nobody(upstream, tmp_path):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        call = asyncio.create_task(broker.apply(lambda at: Load(at=at, consumer="a")))
        await asyncio.sleep(0)
        call.cancel()

        job, client = submit(broker, "a")
        await over(job)
        assert client.status == 200

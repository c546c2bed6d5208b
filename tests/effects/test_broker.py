"""The broker's loop in front of real services: jobs, swaps, departures, the end."""

import asyncio
import json
import logging
import time

from attrs import evolve

from mgpu_core.codec import decode_config, decode_event, decode_state, encode_effect, encode_state
from mgpu_core.events import GpuSample, ServeDone, SwapDone, Unload
from mgpu_core.scheduler import Scheduler
from mgpu_core.state import Phase
from mgpu_effects.clock import Clock
from mgpu_effects.settings import (
    GpuSettings,
    ProbeSettings,
    Timeouts,
)
from tests.support.brokers import (
    lines,
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

# -------------------------------------------------------------------------------- serving, swapping


async def test_a_job_is_scheduled_served_and_over(upstream, tmp_path):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        job, client = submit(broker, "a", body=b"hello")
        await over(job)

        assert (client.status, client.finished, client.calls) == (200, True, ["start", "finish"])
        assert json.loads(client.body)["body"] == "hello"
        assert client.header("x-mgpu-request") == [job.request]
        assert job.body.closed  # type: ignore[attr-defined]
        await eventually(lambda: not broker.state.requests)
    done = logged(tmp_path, "ServeDone")
    assert done == [{"type": "ServeDone", "request": job.request, "outcome": "ok"}]


async def test_a_swap_unloads_loads_and_then_serves(upstream, tmp_path):
    upstream.rule("/b/load", delay=0.3)
    settings = settings_of(service(upstream, "a"), service(upstream, "b"))
    async with running(settings, tmp_path) as broker:
        await only_resident(broker, "a")
        seen = len(paths(upstream))

        job, client = submit(broker, "b")
        await over(job)

        assert paths(upstream)[seen:] == ["/a/unload", "/b/load", "/b/work"]
        assert client.status == 200
        assert 300 <= int(client.header("x-mgpu-load-ms")[0]) < 5_000
        assert int(client.header("x-mgpu-queue-ms")[0]) >= int(client.header("x-mgpu-load-ms")[0])
        assert broker.state.counters.evictions == 2  # the operator's one before
    assert [event["error"] for event in logged(tmp_path, "UnloadDone")] == [None, None]
    assert [event["error"] for event in logged(tmp_path, "SwapDone")] == [None]


async def test_jobs_for_two_services_in_turn_each_get_their_answer(upstream, tmp_path):
    settings = settings_of(service(upstream, "a"), service(upstream, "b"))
    async with running(settings, tmp_path) as broker:
        jobs = [submit(broker, name, f"/work?n={n}") for n in range(4) for name in ("a", "b")]
        for job, _ in jobs:
            await over(job)

        assert [client.status for _, client in jobs] == [200] * 8
        targets = [json.loads(client.body)["target"] for _, client in jobs]
        assert targets == [f"/{name}/work?n={n}" for n in range(4) for name in ("a", "b")]
        await eventually(lambda: not broker.state.requests)


async def test_the_log_replays_to_the_same_decisions(upstream, tmp_path):
    settings = settings_of(service(upstream, "a"), service(upstream, "b"))
    async with running(settings, tmp_path) as broker:
        for job, _ in [submit(broker, name) for name in ("a", "b", "a")]:
            await over(job)
    head = json.loads(next(tmp_path.glob("events-*.jsonl")).read_text().splitlines()[0])

    scheduler, state = Scheduler(decode_config(head["config"])), decode_state(head["state"])
    for line in lines(tmp_path):
        transition = scheduler.step(state, decode_event(line["event"], line["at"]))
        assert [encode_effect(effect) for effect in transition.effects] == line["effects"]
        state = transition.state
    assert encode_state(state) == encode_state(broker.state)
    assert head["run"] == broker.run == state.run


async def test_each_decision_out_of_the_ordinary_is_a_line_of_the_text_log(
    upstream, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "mgpu.decisions")
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        served, _ = submit(broker, "a")
        await over(served)
        refused, _ = submit(broker, "nobody")
        await over(refused)
        await eventually(lambda: not broker.state.requests)

    said = [r.getMessage() for r in caplog.records if r.name == "mgpu.decisions"]
    assert any(line.startswith("Rejected ") and refused.request in line for line in said)
    assert not any(served.request in line for line in said)
    assert not any("\n" in line for line in said)


async def test_a_relayed_job_asks_no_scheduler(upstream, tmp_path):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        job, client = make_job("/audio/x.wav", consumer="a", method="GET")
        broker.relay(job)
        await over(job)

        assert (client.status, client.header("x-mgpu-queue-ms")) == (200, ["0"])
    assert logged(tmp_path, "Request") == []


async def test_a_request_for_nobody_is_refused(upstream, tmp_path):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        job, client = submit(broker, "zebra")
        await over(job)

        assert told(client) == "no_consumer"


async def test_a_clients_own_patience_is_its_deadline(upstream, tmp_path):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        first, _ = submit(broker, "a", "/work?do=never")
        job, client = submit(broker, "a", max_wait_s=0.3)
        await over(job)

        assert told(client) == "queue_timeout"
        broker.leave(first.request)
        await over(first)


async def test_an_alarm_that_rings_early_is_set_again(upstream, tmp_path):
    began_ns = time.monotonic_ns()
    slow = Clock(monotonic_ns=lambda: began_ns + (time.monotonic_ns() - began_ns) // 2)
    quiet = evolve(
        settings_of(service(upstream, "a")),
        gpus=(GpuSettings(total_mib=8_000, sampler="none", poll_interval_s=60),),
        probe=ProbeSettings(interval_s=60),
    )
    async with running(quiet, tmp_path, slow) as broker:
        first, _ = submit(broker, "a", "/work?do=never")
        job, client = submit(broker, "a", max_wait_s=0.3)
        await over(job)

        assert told(client) == "queue_timeout"
        broker.leave(first.request)
        await over(first)


# -------------------------------------------------------------------- clients that leave, operators


async def test_a_client_that_leaves_while_it_waits_leaves_nothing_behind(upstream, tmp_path):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        first, _ = submit(broker, "a", "/work?do=never")
        job, client = submit(broker, "a", "/waiting")
        await eventually(lambda: job.request in broker.state.requests)

        broker.leave(job.request)
        await over(job)

        assert client.calls == []
        assert list(broker.state.requests) == [first.request]
        broker.leave(first.request)
        await over(first)
    assert "/a/waiting" not in paths(upstream)


async def test_a_client_that_leaves_while_served_makes_room_at_once(upstream, tmp_path):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        first, client = submit(broker, "a", "/work?do=never")
        second, _ = submit(broker, "a")
        await eventually(lambda: upstream.count("/a/work") == 1)

        broker.leave(first.request)
        await over(first)
        await over(second)

        assert client.calls == []
    outcomes = [event["outcome"] for event in logged(tmp_path, "ServeDone")]
    assert outcomes == ["disconnected", "ok"]


async def test_with_drain_the_next_job_waits_until_the_service_is_done(upstream, tmp_path):
    settings = settings_of(service(upstream, "a", on_client_gone="drain"))
    async with running(settings, tmp_path) as broker:
        first, _ = submit(broker, "a", "/work?delay=1")
        second, client = submit(broker, "a", "/next")
        await eventually(lambda: upstream.count("/a/work") == 1)

        broker.leave(first.request)
        await eventually(lambda: logged(tmp_path, "Cancel"))
        assert broker.state.requests[first.request].phase is Phase.SERVING
        await over(second)

        assert int(client.header("x-mgpu-queue-ms")[0]) >= 900
        assert upstream.stats()["gone"] == 0
    outcomes = [event["outcome"] for event in logged(tmp_path, "ServeDone")]
    assert outcomes == ["disconnected", "ok"]


async def test_a_client_that_takes_nothing_makes_room(upstream, tmp_path):
    settings = settings_of(service(upstream, "a", timeout_s=Timeouts(client_write=0.3)))
    async with running(settings, tmp_path) as broker:
        first, client = make_job("/work?do=bytes&size=3000000", consumer="a")
        client.taking.clear()
        broker.submit(first)
        second, other = submit(broker, "a")
        await over(first)
        await over(second)

        assert client.calls == ["start", "cut"]
        assert other.status == 200


async def test_a_client_that_left_before_its_grant_is_not_proxied(upstream, tmp_path):
    settings = settings_of(service(upstream, "a", on_client_gone="drain"))
    async with running(settings, tmp_path) as broker:
        job, client = make_job("/work", consumer="a")
        job.gone.set()
        broker.submit(job)
        await over(job)

        assert client.calls == []
        await eventually(lambda: not broker.state.requests)
    assert paths(upstream) == []


async def test_an_operator_cancels_a_waiting_and_a_served_request(upstream, tmp_path):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        served, served_client = submit(broker, "a", "/work?do=never")
        waiting, waiting_client = submit(broker, "a")
        await eventually(lambda: upstream.count("/a/work") == 1)

        assert broker.cancel(waiting.request)
        await over(waiting)
        assert broker.cancel(served.request)
        await over(served)

        assert (told(waiting_client), told(served_client)) == ("cancelled", "cancelled")
        assert not broker.cancel("nobody")
        await eventually(lambda: upstream.stats()["gone"] == 1)
        await eventually(lambda: not broker.state.requests)


# ------------------------------------------------------------------------------ the end, and reload


async def test_at_the_end_those_who_wait_are_refused_and_those_served_finish(upstream, tmp_path):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        served, served_client = submit(broker, "a", "/work?delay=0.5")
        waiting, waiting_client = submit(broker, "a")
        await eventually(lambda: upstream.count("/a/work") == 1)

    assert served.done.is_set()
    assert waiting.done.is_set()
    assert told(waiting_client) == "shutting_down"
    assert (served_client.status, served_client.finished) == (200, True)
    assert [event["outcome"] for event in logged(tmp_path, "ServeDone")] == ["ok"]
    assert not broker.state.requests


async def test_at_the_end_what_takes_longer_than_the_grace_is_ended(upstream, tmp_path):
    settings = settings_of(service(upstream, "a", max_concurrency=2), shutdown_grace_s=0.2)
    async with running(settings, tmp_path) as broker:
        silent, silent_client = submit(broker, "a", "/work?do=never")
        begun, begun_client = submit(broker, "a", "/work?do=stream&chunks=9999&gap=0.05")
        await eventually(lambda: upstream.count("/a/work") == 2 and begun_client.chunks)

    assert silent.done.is_set()
    assert begun.done.is_set()
    assert told(silent_client) == "shutting_down"
    assert begun_client.calls == ["start", "fail"]
    await eventually(lambda: upstream.stats()["active"] == 0)
    assert [event["outcome"] for event in logged(tmp_path, "ServeDone")] == ["disconnected"] * 2


async def test_nothing_is_left_running_at_the_end(upstream, tmp_path):
    before = asyncio.all_tasks()
    settings = settings_of(service(upstream, "a"), service(upstream, "b"))
    async with running(settings, tmp_path) as broker:
        for job, _ in [submit(broker, name) for name in ("a", "b")]:
            await over(job)

    assert asyncio.all_tasks() == before


async def test_a_reload_brings_new_consumers_and_lets_old_ones_finish(upstream, tmp_path):
    a, b, c = (service(upstream, name) for name in "abc")
    async with running(settings_of(a, b), tmp_path) as broker:
        await only_resident(broker, "a")
        served, served_client = submit(broker, "a", "/work?delay=0.7")
        waiting, waiting_client = submit(broker, "a", "/second")
        await eventually(lambda: upstream.count("/a/work") == 1)

        await broker.reload(settings_of(b, c))
        refused, refused_client = submit(broker, "a")
        await over(refused)
        await over(served)
        await over(waiting)
        new, new_client = submit(broker, "c")
        await over(new)

        assert told(refused_client) == "no_consumer"
        assert [client.status for client in (served_client, waiting_client, new_client)] == [
            200
        ] * 3
        assert residency(broker, "a") == "resident"
        await broker.apply(lambda at: Unload(at=at, consumers=("a",)))
        await eventually(lambda: "a" not in broker.state.consumers)
        probes = upstream.count("/a/health")
        await eventually(lambda: upstream.count("/c/health") > 3)
        assert upstream.count("/a/health") <= probes + 1


async def test_a_reload_takes_new_limits_over(upstream, tmp_path):
    a = service(upstream, "a")
    async with running(settings_of(a), tmp_path) as broker:
        await broker.reload(settings_of(evolve(a, timeout_s=Timeouts(connect=0.1, first_byte=0.2))))
        job, client = submit(broker, "a", "/work?do=never")
        await over(job)

        assert told(client) == "upstream_timeout"


# ------------------------------------------------------------------------- completions, exactly one


async def test_every_grant_load_and_unload_has_exactly_one_completion(upstream, tmp_path):
    settings = settings_of(
        service(upstream, "a", max_concurrency=2), service(upstream, "b"), load_timeout_s=1
    )
    upstream.rule("/b/load", delay=0.05)
    async with running(settings, tmp_path) as broker:
        jobs = []
        for number in range(30):
            query = ("delay=0.02", "do=drop", "status=500", "do=stream&die=1", "")[number % 5]
            jobs.append(submit(broker, "ab"[number % 2], f"/work?{query}")[0])
            if number % 7 == 3:
                broker.leave(jobs[-2].request)
        for job in jobs:
            await over(job, 30)
        await eventually(lambda: not broker.state.requests)

    asked: list[tuple[str, ...]] = []
    answered: list[tuple[str, ...]] = []
    for line in lines(tmp_path):
        for effect in line["effects"]:
            match effect["type"]:
                case "Serve":
                    asked.append((ServeDone.__name__, effect["request"]))
                case "StartUnload":
                    asked.append(("UnloadDone", effect["consumer"], effect["epoch"]))
                case "StartLoad":
                    asked.append((SwapDone.__name__, effect["consumer"], effect["epoch"]))
        match line["event"]:
            case {"type": "ServeDone", "request": request}:
                answered.append(("ServeDone", request))
            case {"type": "UnloadDone" | "SwapDone" as kind, "consumer": name, "epoch": epoch}:
                answered.append((kind, name, epoch))
    assert len(asked) > 20
    assert sorted(map(str, answered)) == sorted(map(str, asked))


async def test_samples_tell_when_their_reading_began(upstream, tmp_path, monkeypatch):
    async with running(settings_of(service(upstream, "a")), tmp_path) as broker:
        began = asyncio.Event()

        async def slow() -> tuple[()]:
            began.set()
            await asyncio.sleep(0.3)
            return ()

        monkeypatch.setattr(broker._watch._sampler, "read", slow)
        await began.wait()
        before = len(lines(tmp_path))
        await eventually(
            lambda: any(x["event"]["type"] == GpuSample.__name__ for x in lines(tmp_path)[before:])
        )
    samples = [line for line in lines(tmp_path) if line["event"]["type"] == "GpuSample"]
    assert any(line["at"] - line["event"]["taken"] >= 300_000 for line in samples)

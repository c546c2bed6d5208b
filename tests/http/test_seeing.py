"""http.md section 3: seeing and steering."""

import asyncio
import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from mgpu_core.why import encode_explanation, summary
from mgpu_http.commands.log_why import explain
from mgpu_http.commands.logs import Source
from tests.support.facade import LIMIT_S, Facade, config, facade, write_config
from tests.support.upstream import Upstream, eventually

ROUTES = {"load": {"path": "/load"}, "unload": {"path": "/unload"}}


def two(upstream: Upstream) -> dict[str, Any]:
    """`worker` and `other`, of whom only one fits; both count as resident at the start."""
    content = config(upstream, worker={"vram_resident_mib": 15000, **ROUTES})
    content["consumers"]["other"] = {
        "url": upstream.url,
        "paths": {"image": {"path": "/do/image"}},
        "vram_resident_mib": 16000,
        "unload": ROUTES["unload"],
    }
    content["routing"]["image"] = "other"
    return content


async def consumer(broker: Facade, name: str) -> Any:
    return (await broker.status())["consumers"][name]


async def test_the_status_has_the_fields_of_the_contract(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, two(upstream)) as broker, broker.connect() as served:
        await broker.until("probed", lambda s: s["consumers"]["worker"]["healthy"])
        await served.send("POST", "/v1/tts", "X-Upstream: do=never", body=b"")
        await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
        async with broker.connect() as waiting:
            await waiting.send("POST", "/v1/image", body=b"")
            status = await broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)

    (gpu,) = status["gpu"]
    assert {"used_mib", "free_mib", "total_mib", "at", "error"} <= gpu.keys()
    assert (gpu["total_mib"], gpu["used_mib"]) == (24000, None)
    assert gpu["error"]  # there is no sampler

    worker = status["consumers"]["worker"]
    assert worker["healthy"] is True
    assert worker["last_probe"] > 1_700_000_000_000_000
    assert worker["error"] is None
    assert worker["loaded"] is True
    assert (worker["residency"], worker["residency_source"]) == ("resident", "assumed")
    assert worker["gpu_resident_mib"] == 15000
    assert (worker["active"], worker["waiting"], worker["total_requests"]) == (1, 0, 1)
    assert worker["last_used"] is None
    assert (worker["owed"], worker["leaky"], worker["cooldown_until"]) == (False, False, None)
    other = status["consumers"]["other"]
    assert (other["residency"], other["gpu_resident_mib"]) == ("absent", 0)
    assert (other["active"], other["waiting"]) == (0, 1)

    scheduler = status["scheduler"]
    assert (scheduler["queue_depth"], scheduler["in_flight"]) == (1, 1)
    assert (scheduler["total_jobs"], scheduler["loads"], scheduler["evictions"]) == (1, 0, 0)
    assert scheduler["last_wait_ms"] >= 0
    assert scheduler["last_run_ms"] is None

    first, second = status["requests"]
    assert (first["consumer"], first["kind"], first["state"]) == ("worker", "tts", "serving")
    assert (first["position"], first["why"]) == (None, None)
    assert (second["consumer"], second["kind"], second["state"]) == ("other", "image", "queued")
    assert (second["position"], second["promoted"]) == (1, False)
    assert second["waited_ms"] >= 0
    assert (second["why"]["type"], second["why"]["who"]) == ("victim_at_work", ["worker"])
    assert second["why"]["text"] == f"for worker to finish ({first['id']})"
    assert status["version"] == "0.1.0"
    assert status["run"] == broker.broker.run
    assert scheduler["oldest_queued"] is not None


async def test_one_request_is_its_row_of_the_status(tmp_path: Path, upstream: Upstream) -> None:
    async with facade(tmp_path, config(upstream)) as broker, broker.connect() as client:
        await client.send("POST", "/v1/tts", "X-Upstream: do=never", body=b"")
        status = await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
        (row,) = status["requests"]
        told = (await broker.ask("GET", f"/v1/requests/{row['id']}")).json()
        assert told.items() >= row.items()
        assert (told["outcome"], told["waited_us"], told["intervals"]) == ("served", 0, [])
        assert told["summary"] == "was served at once"


async def test_what_a_request_waited_for_is_told_as_the_log_tells_it(
    tmp_path: Path, upstream: Upstream
) -> None:
    upstream.rule("/unload", delay=0.1)
    async with facade(tmp_path, two(upstream)) as broker:
        async with broker.connect() as served, broker.connect() as waiting:
            await served.send("POST", "/v1/tts", "X-Upstream: do=never", body=b"")
            await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
            await waiting.send("POST", "/v1/image", body=b"")
            await broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)
            first, second = (await broker.status())["requests"]
            path = f"/v1/requests/{second['id']}"
            so_far = (await broker.ask("GET", path)).json()
            assert (so_far["outcome"], so_far["why"]) == ("waiting", second["why"])
            (one,) = so_far["intervals"]
            assert one["reason"] == second["why"]
            assert (one["from"], one["ended_by"]) == (so_far["intervals"][0]["from"], None)
            assert so_far["waited_us"] == one["to"] - one["from"]
            await broker.ask("DELETE", f"/v1/requests/{first['id']}")
            await broker.until("ended", lambda s: not s["requests"])
        live = (await broker.ask("GET", path)).json()
    logged = explain(Source(str(tmp_path / "log")), second["id"])
    assert (live["state"], live["consumer"], live["kind"]) == ("ended", "other", "image")
    assert live["summary"] == summary(logged)
    assert live.items() >= encode_explanation(logged).items()
    words = [one["reason"]["text"] for one in live["intervals"]]
    assert words[0] == f"for worker to finish ({first['id']})"
    assert words[1] == "for worker to be unloaded"


async def test_a_load_that_waits_is_seen_and_cancelled_as_a_request(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, two(upstream)) as broker, broker.connect() as client:
        await client.send("POST", "/v1/image", "X-Upstream: do=never", body=b"")
        await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
        await broker.ask("POST", "/v1/consumers/worker/load")
        (row,) = (r for r in (await broker.status())["requests"] if r["consumer"] == "worker")
        assert (await broker.ask("GET", f"/v1/requests/{row['id']}")).json()["id"] == row["id"]
        answer = await broker.ask("DELETE", f"/v1/requests/{row['id']}")
        assert answer.json() == {"request": row["id"], "cancelled": True}
        await broker.until("cancelled", lambda s: s["consumers"]["worker"]["waiting"] == 0)
        told = (await broker.ask("GET", f"/v1/requests/{row['id']}")).json()
        assert (told["state"], told["outcome"]) == ("ended", "cancelled")
        assert (await broker.ask("DELETE", f"/v1/requests/{row['id']}")).error == "not_found"
        unknown = await broker.ask("GET", "/v1/requests/load:nobody")
        assert unknown.error == "not_found"
        assert "mgpu log why" in unknown.json()["message"]


async def test_what_is_read_to_its_end_for_a_client_that_left_can_be_cancelled(
    tmp_path: Path, upstream: Upstream
) -> None:
    content = config(upstream, worker={"on_client_gone": "drain"})
    async with facade(tmp_path, content) as broker:
        async with broker.connect() as client:
            await client.send("POST", "/v1/tts", "X-Upstream: do=never", body=b"")
            await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
            (row,) = (await broker.status())["requests"]
            job = broker.broker._executor.get(row["id"])
            assert job is not None
        await job.gone.wait()
        await broker.ask("DELETE", f"/v1/requests/{row['id']}")
        await broker.until("over", lambda s: s["scheduler"]["in_flight"] == 0)
        await eventually(lambda: upstream.stats()["active"] == 0)


async def test_load_and_unload(tmp_path: Path, upstream: Upstream) -> None:
    async with facade(tmp_path, two(upstream)) as broker:
        told = (await broker.ask("POST", "/v1/consumers/worker/unload")).json()
        assert told["consumer"] == "worker"
        assert told["residency"] == "unloading"
        assert told["notes"]
        await broker.until("out", lambda s: s["consumers"]["worker"]["residency"] == "absent")
        assert upstream.count("/unload") == 1
        await broker.ask("POST", "/v1/consumers/worker/load")
        await broker.until("in", lambda s: s["consumers"]["worker"]["loaded"])
        assert upstream.count("/load") == 1


async def test_unload_waits_for_what_is_served_unless_forced(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, two(upstream)) as broker, broker.connect() as client:
        await client.send("POST", "/v1/tts", "X-Upstream: do=never", body=b"")
        await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
        told = (await broker.ask("POST", "/v1/consumers/worker/unload")).json()
        assert told["residency"] == "resident"
        told = (await broker.ask("POST", "/v1/consumers/worker/unload?force=1")).json()
        assert told["residency"] == "unloading"


async def test_pin_and_unpin(tmp_path: Path, upstream: Upstream) -> None:
    async with facade(tmp_path, two(upstream)) as broker:
        await broker.ask("POST", "/v1/consumers/worker/pin")
        assert (await consumer(broker, "worker"))["pinned"] is True
        answer = await broker.ask("POST", "/v1/image", body=b"")
        assert answer.error == "insufficient_vram"  # nobody may be evicted for it
        await broker.ask("POST", "/v1/consumers/worker/unpin")
        assert (await broker.ask("POST", "/v1/image", body=b"")).status == 200
        assert (await consumer(broker, "worker"))["loaded"] is False


async def test_a_swap_shows_in_headers_status_and_metrics(
    tmp_path: Path, upstream: Upstream
) -> None:
    upstream.rule("/load", delay=0.2)
    async with facade(tmp_path, two(upstream)) as broker:
        assert (await broker.ask("POST", "/v1/image", body=b"")).status == 200
        answer = await broker.ask("POST", "/v1/tts", body=b"")
        assert int(answer.headers["x-mgpu-load-ms"]) >= 200
        assert int(answer.headers["x-mgpu-queue-ms"]) >= int(answer.headers["x-mgpu-load-ms"])
        scheduler = (await broker.status())["scheduler"]
        assert (scheduler["loads"], scheduler["evictions"]) == (1, 2)
        metrics = await read_metrics(broker)
        assert metrics["mgpu_loads_total", "worker"] == 1
        assert metrics["mgpu_evictions_total", "worker"] == 1
        assert metrics["mgpu_evictions_total", "other"] == 1


async def read_metrics(broker: Facade) -> dict[tuple[str, ...], float]:
    """Give each sample by its name and the values of its labels."""
    answer = await broker.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


async def test_metrics_by_consumer_and_kind(tmp_path: Path, upstream: Upstream) -> None:
    canary = "canary-in-prompt-header-and-query"
    async with facade(tmp_path, two(upstream)) as broker, broker.connect() as served:
        order = f"X-Upstream: do=text status=404 body={canary}"
        await broker.ask("POST", f"/v1/tts?q={canary}", order, body=canary.encode())
        await served.send("POST", "/v1/tts", "X-Upstream: do=never", body=b"")
        await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
        async with broker.connect() as waiting:
            await waiting.send("POST", "/v1/image", body=b"")
            await broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)
            metrics = await read_metrics(broker)
        assert canary.encode() not in (await broker.ask("GET", "/metrics")).body
        log = "".join(path.read_text() for path in (tmp_path / "log").glob("events-*"))
        assert canary not in log
    assert metrics["mgpu_requests_total", "worker", "tts", "404"] == 1
    assert metrics["mgpu_wait_seconds_count", "worker", "tts"] == 1
    assert metrics["mgpu_in_flight", "worker", "tts"] == 1
    assert metrics["mgpu_queue", "other", "image"] == 1
    assert metrics["mgpu_consumer_vram_mib", "worker"] == 15000
    assert metrics["mgpu_consumer_vram_mib", "other"] == 0
    assert metrics["mgpu_gpu_total_mib", "0"] == 24000


async def counted(broker: Facade, *labels: str) -> None:
    """Wait until one request is counted with these: that comes just after its answer."""
    deadline = time.monotonic() + LIMIT_S
    while (metrics := await read_metrics(broker)).get(("mgpu_requests_total", *labels)) != 1:
        assert time.monotonic() < deadline, f"{labels} not in {metrics}"
        await asyncio.sleep(0.01)


async def test_metrics_count_what_is_refused_before_it_is_queued(
    tmp_path: Path, upstream: Upstream
) -> None:
    content = two(upstream)
    content["consumers"]["worker"] |= {"max_pending": 1, "timeout_s": {"upload": 0.1}}
    async with facade(tmp_path, content) as broker, broker.connect() as client:
        await broker.ask("POST", "/v1/tts", "X-Mgpu-Priority: 9", body=b"")
        await counted(broker, "worker", "tts", "bad_request")
        await client.send("POST", "/v1/tts", "Content-Length: 5")
        await counted(broker, "worker", "tts", "upload_timeout")
        await broker.ask("POST", "/v1/consumers/worker/pin")
        await broker.ask("POST", "/v1/image", body=b"")
        await counted(broker, "other", "image", "insufficient_vram")
        async with broker.connect() as busy:
            await busy.send("POST", "/v1/tts", "X-Upstream: do=never", body=b"")
            await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
            await broker.ask("POST", "/v1/tts", body=b"")
            await counted(broker, "worker", "tts", "overloaded")
        await counted(broker, "worker", "tts", "gone")
        del content["routing"]["image"]
        write_config(tmp_path, content)
        await broker.ask("POST", "/v1/reload")
        await broker.ask("POST", "/v1/image", body=b"")
        await counted(broker, "", "image", "no_consumer")


async def test_metrics_count_what_the_event_log_lost(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        assert (await read_metrics(broker))["mgpu_lost_events_total",] == 0
        with files_limited_to(1):
            await broker.ask("POST", "/v1/drain")
        assert (await read_metrics(broker))["mgpu_lost_events_total",] >= 1


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

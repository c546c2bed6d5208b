"""What goes wrong around the broker, and what its clients are told: exactly one answer each.

Here is what needs a whole `mgpu serve` and services that hold memory. The rest is elsewhere:

unknown kind                    test_errors.py: test_no_consumer_for_a_kind_that_is_not_routed; here
wrong method                    test_errors.py: test_method_not_allowed_says_which_are
body too large                  test_errors.py: test_body_too_large
upload that stalls              test_errors.py: test_upload_timeout_when_a_body_stalls
upstream down                   test_errors.py: test_consumer_unreachable_...; here with waiters
upstream dies while it answers  test_clients.py: test_after_the_first_byte_...; here by SIGKILL
upstream that never answers     test_errors.py: test_upstream_timeout; here with a next one
client leaves while it waits    test_clients.py: ..._leaves_while_it_waits_...; here in a swap
client leaves while served      test_clients.py: ..._leaves_while_it_is_served_...
client that takes nothing       test_clients.py: test_a_client_that_takes_nothing_counts_as_gone
unload that is refused          here
unload that frees nothing       here
load that fails                 here
NVML that vanishes              here; tests/effects/test_gpu.py for NVML itself
probe that flaps                here
SIGTERM with requests waiting   test_end.py: test_sigterm_refuses_...; here in mid load
malformed configuration         test_cli.py: test_check_shows_everything_that_is_wrong,
                                tests/effects/test_config_file.py for each kind of error
"""

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.dev_http import free_port
from tests.support.facade import Answer, Client, ServeProcess
from tests.support.gpu_host import (
    COMFYUI,
    MVOICE,
    ROOT,
    WORKFLOW,
    GpuHost,
    at_rest,
    counts,
    gpu_host,
    ready,
    sampled_anew,
    service_command,
)
from tests.support.upstream import eventually

ROUTING = {"tts": "mvoice", "image": "comfyui"}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[GpuHost]:
    """mvoice is in, comfyui is not, and there is room for one of them."""
    with gpu_host(tmp_path, total_mib=15_000) as host:
        host.start("mvoice", mib=2_345)
        host.start("comfyui", mib=13_000, loaded=False, lazy=True)
        yield host


@asynccontextmanager
async def serving(host: GpuHost, **changes: Any) -> AsyncIterator[ServeProcess]:
    """Run the broker before the two, and see to it that nothing is left in it at the end."""
    consumers = {
        "mvoice": {**MVOICE, **changes.pop("mvoice", {})},
        "comfyui": {**COMFYUI, **changes.pop("comfyui", {})},
    }
    with host.serve(consumers=consumers, routing=ROUTING, **changes) as broker:
        await ready(broker)
        yield broker
        if broker.process.poll() is None:
            await at_rest(broker)
        assert not broker.said("Traceback|ERROR|CRITICAL"), broker.lines


async def begin(client: Client, kind: str, *headers: str, body: bytes = b"hello") -> None:
    await client.send("POST", f"/v1/{kind}", "Connection: close", *headers, body=body)


async def only_answer(client: Client) -> Answer:
    """Read the answer, and see that there is nothing behind it."""
    answer = await client.answer()
    assert await client.closed() == b""
    return answer


async def ask(broker: ServeProcess, kind: str, *headers: str, body: bytes = b"hello") -> Answer:
    async with broker.connect() as client:
        await begin(client, kind, *headers, body=body)
        return await only_answer(client)


def told(answer: Answer) -> tuple[int, str, str | None, bool]:
    error = answer.json()
    return answer.status, error["error"], error["consumer"], error["retryable"]


async def served(broker: ServeProcess, consumer: str) -> None:
    await broker.until("served", lambda s: s["consumers"][consumer]["active"] == 1)


async def waiting(broker: ServeProcess, consumer: str) -> None:
    await broker.until("waiting", lambda s: s["consumers"][consumer]["waiting"] == 1)


async def test_an_unknown_kind_is_not_found(host: GpuHost) -> None:
    async with serving(host) as broker:
        assert told(await ask(broker, "video")) == (404, "not_found", None, False)
        assert told(await ask(broker, "stt")) == (404, "no_consumer", None, False)
    assert host.calls() == []


# ------------------------------------------------------------------------------------ upstreams


async def test_an_upstream_that_crashes_fails_whom_it_serves_and_all_who_wait_for_it(
    host: GpuHost,
) -> None:
    async with serving(host) as broker, broker.connect() as first, broker.connect() as second:
        await begin(first, "tts", "X-Upstream: do=never")
        await served(broker, "mvoice")
        await eventually(lambda: host.services["mvoice"].count("/tts") == 1)
        await begin(second, "tts", "X-Upstream: do=never")
        await waiting(broker, "mvoice")
        host.kill("mvoice")
        assert told(await only_answer(first)) == (502, "upstream_disconnected", "mvoice", True)
        # Granted at once: a dying process may still take a connection before it closes its port.
        assert told(await only_answer(second)) in {
            (502, "upstream_disconnected", "mvoice", True),
            (503, "consumer_unreachable", "mvoice", True),
        }
        await broker.until("down", lambda s: s["consumers"]["mvoice"]["healthy"] is False)
        assert told(await ask(broker, "tts")) == (503, "consumer_unreachable", "mvoice", True)
        # Its memory is free again, and it may come back.
        assert (await ask(broker, "image", body=WORKFLOW)).status == 200
        host.start("mvoice", mib=2_345, loaded=False)
        await ready(broker)
        assert (await ask(broker, "image", body=WORKFLOW)).status == 200


async def test_an_upstream_that_is_killed_in_mid_answer_cuts_it_off(host: GpuHost) -> None:
    async with serving(host) as broker, broker.connect() as client:
        await begin(client, "tts", "X-Upstream: do=stream chunks=1000 gap=0.05")
        assert (await client.head()).status == 200
        await client.reader.readuntil(b"data: 1\n\n")
        host.kill("mvoice")
        rest = await client.closed()
        assert b"0\r\n\r\n" not in rest  # it never looks complete
        assert b"error" not in rest


async def test_an_upstream_that_never_answers_keeps_the_next_one_waiting_no_longer_than_its_limit(
    host: GpuHost,
) -> None:
    limits = {"timeout_s": {"connect": 0.5, "first_byte": 0.5}}
    async with (
        serving(host, mvoice=limits) as broker,
        broker.connect() as first,
        broker.connect() as second,
    ):
        await begin(first, "tts", "X-Upstream: do=never")
        await served(broker, "mvoice")
        await begin(second, "tts")
        assert told(await only_answer(first)) == (504, "upstream_timeout", "mvoice", False)
        assert (await only_answer(second)).status == 200


async def test_a_process_of_the_brokers_own_that_crashes_is_started_for_the_next_client(
    host: GpuHost,
) -> None:
    port = free_port()
    command = service_command(host, "painter", mib=13_000, port=port)
    painter = {
        "url": f"http://127.0.0.1:{port}",
        "paths": COMFYUI["paths"],
        "vram_resident_mib": 13_000,
        "driver": {"process": {"command": command, "cwd": str(ROOT), "grace_s": 5}},
    }
    routing = {"tts": "mvoice", "image": "painter"}
    consumers = {"mvoice": MVOICE, "painter": painter}
    with host.serve(consumers=consumers, routing=routing, probe={"interval_s": 60}) as broker:
        await broker.until("read", lambda s: s["gpu"][0]["at"])
        crash = await ask(broker, "image", "X-Upstream: do=exit")
        assert told(crash) == (502, "upstream_disconnected", "painter", True)
        host.card.give_back("painter")  # as the driver of a card does for the dead
        # Its end is seen at once, long before the next probe.
        await broker.until("out", lambda s: not s["consumers"]["painter"]["loaded"])
        assert (await ask(broker, "image")).status == 200
        assert (await ask(broker, "tts")).status == 200  # it makes room by being stopped
        assert counts(await at_rest(broker)) == (2, 3)
        assert host.card.held_mib == {"mvoice": 2_345}
        broker.signal(signal.SIGTERM)
        assert await broker.exit_code() == 0


# ------------------------------------------------------------------------ clients that leave swaps


async def test_a_client_that_leaves_while_memory_is_made_for_it_ends_the_swap(
    host: GpuHost,
) -> None:
    mvoice, comfyui = host.services["mvoice"], host.services["comfyui"]
    mvoice.rule("/unload", delay=0.5)
    async with serving(host) as broker:
        async with broker.connect() as client:
            await begin(client, "image", body=WORKFLOW)
            await eventually(lambda: mvoice.count("/unload") == 1)
        status = await broker.until("out", lambda s: not s["consumers"]["mvoice"]["loaded"])
        await at_rest(broker)
        assert status["consumers"]["comfyui"]["total_requests"] == 0
        # Whoever comes next finds the memory free: nothing was left promised.
        assert (await ask(broker, "tts")).status == 200
        assert counts(await broker.status()) == (1, 1)
    assert comfyui.count("/prompt") == 0


async def test_a_load_goes_on_when_the_client_that_it_was_for_has_left(host: GpuHost) -> None:
    mvoice = host.services["mvoice"]
    mvoice.rule("/load", delay=0.5)
    async with serving(host) as broker:
        assert (await ask(broker, "image", body=WORKFLOW)).status == 200
        await sampled_anew(broker)
        async with broker.connect() as client:
            await begin(client, "tts")
            await eventually(lambda: mvoice.count("/load") == 1)
        status = await broker.until("in", lambda s: s["consumers"]["mvoice"]["loaded"])
        assert status["consumers"]["mvoice"]["total_requests"] == 0
        assert mvoice.stats()["gone"] == 0
        assert (await ask(broker, "tts")).status == 200
        assert counts(await broker.status()) == (2, 1)
    assert mvoice.count("/tts") == 1


# ------------------------------------------------------------------------------ unloads and loads


async def test_an_unload_that_is_refused_is_tried_again_after_a_cool_down(host: GpuHost) -> None:
    mvoice = host.services["mvoice"]
    mvoice.rule("/unload", status=409)
    async with serving(host) as broker:
        answer = await ask(broker, "image", "X-Mgpu-Max-Wait: 1", body=WORKFLOW)
        assert told(answer) == (503, "queue_timeout", "comfyui", True)
        assert "mvoice" in answer.json()["message"]
        voice = (await broker.status())["consumers"]["mvoice"]
        assert (voice["residency"], voice["leaky"]) == ("unknown", False)
        assert voice["cooldown_until"] is not None
        assert mvoice.count("/unload") == 1
        assert host.services["comfyui"].count("/prompt") == 0
        # It is still what it was for its own clients.
        assert (await ask(broker, "tts")).status == 200

        mvoice.rule("/unload")
        assert (await ask(broker, "image", body=WORKFLOW)).status == 200
        assert mvoice.count("/unload") == 2
    assert host.card.held_mib == {"comfyui": 13_000}


async def test_an_unload_that_frees_nothing_leads_to_no_work_and_is_remembered(
    host: GpuHost,
) -> None:
    mvoice, comfyui = host.services["mvoice"], host.services["comfyui"]
    mvoice.rule("/unload", leak=1)
    async with serving(host, scheduler={"settle_timeout_s": 0.5}) as broker:
        answer = await ask(broker, "image", "X-Mgpu-Max-Wait: 2", body=WORKFLOW)
        assert told(answer) == (503, "queue_timeout", "comfyui", True)
        assert mvoice.count("/unload") == 1
        assert comfyui.count("/prompt") == 0
        status = await at_rest(broker)
        assert status["consumers"]["mvoice"]["leaky"] is True

        # Who waits when the memory comes free after all is served at once.
        async with broker.connect() as client:
            await begin(client, "image", body=WORKFLOW)
            await waiting(broker, "comfyui")
            host.card.give_back("mvoice")
            assert (await only_answer(client)).status == 200
        assert mvoice.count("/unload") == 1
        # A clean load ends the suspicion.
        mvoice.rule("/unload")
        await sampled_anew(broker)
        assert (await ask(broker, "tts")).status == 200
        assert (await broker.status())["consumers"]["mvoice"]["leaky"] is False


async def test_a_load_that_fails_is_not_tried_again_before_its_cool_down_is_over(
    host: GpuHost,
) -> None:
    mvoice = host.services["mvoice"]
    async with serving(host) as broker:
        assert (await ask(broker, "image", body=WORKFLOW)).status == 200
        await sampled_anew(broker)
        mvoice.rule("/load", status=503)
        first = await ask(broker, "tts")
        second = await ask(broker, "tts")
        for answer in (first, second):
            assert told(answer) == (503, "load_failed", "mvoice", True)
            assert 1 <= int(answer.headers["retry-after"]) <= 5
        assert mvoice.count("/load") == 1  # the second was refused at the door
        voice = (await broker.status())["consumers"]["mvoice"]
        assert (voice["residency"], voice["loaded"]) == ("unknown", False)
        assert voice["cooldown_until"] is not None

        mvoice.rule("/load")
        await broker.until("cooled down", lambda s: not s["consumers"]["mvoice"]["cooldown_until"])
        assert (await ask(broker, "tts")).status == 200
        assert mvoice.count("/load") == 2
        # A success clears the count of failures: the next cool-down is a short one again.
        assert (await ask(broker, "image", body=WORKFLOW)).status == 200
        await sampled_anew(broker)
        mvoice.rule("/load", status=503)
        assert int((await ask(broker, "tts")).headers["retry-after"]) <= 5


# ------------------------------------------------------------------------- cards, probes, the end


async def test_a_card_that_can_not_be_read_leaves_the_static_budget_until_it_can(
    host: GpuHost,
) -> None:
    card = {"total_mib": 15_000}
    async with serving(host, gpu=card) as broker:
        await broker.until("read", lambda s: s["gpu"][0]["free_mib"] == 15_000 - 2_345)
        host.card.fail("nvml_failed")
        await broker.until("gone", lambda s: s["gpu"][0]["error"] == "nvml_failed")
        assert (await ask(broker, "image", body=WORKFLOW)).status == 200
        assert (await ask(broker, "tts")).status == 200
        assert counts(await broker.status()) == (2, 1)

        host.card.fail(None)
        await broker.until(
            "back",
            lambda s: s["gpu"][0]["error"] is None and s["gpu"][0]["free_mib"] == 15_000 - 2_345,
        )
        assert (await ask(broker, "image", body=WORKFLOW)).status == 200
        assert counts(await broker.status()) == (3, 1)


async def test_a_probe_that_flaps_fails_who_waits_and_lets_the_next_one_in(host: GpuHost) -> None:
    mvoice = host.services["mvoice"]
    async with serving(host) as broker:
        for _ in range(2):
            async with broker.connect() as client, broker.connect() as other:
                await begin(client, "tts", "X-Upstream: do=echo delay=1.5")
                await served(broker, "mvoice")
                await begin(other, "tts")
                await waiting(broker, "mvoice")
                mvoice.rule("/health", status=503)
                refused = await only_answer(other)
                assert told(refused) == (503, "consumer_unreachable", "mvoice", True)
                assert int(refused.headers["retry-after"]) >= 1
                assert told(await ask(broker, "tts")) == told(refused)
                mvoice.rule("/health")
                # A probe says nothing about the one who is served.
                assert (await only_answer(client)).status == 200
            await ready(broker)
            assert (await ask(broker, "tts")).status == 200


async def test_sigterm_in_mid_load_refuses_who_waits_for_it(host: GpuHost) -> None:
    host.services["mvoice"].rule("/load", do="never")
    async with serving(host) as broker:
        assert (await ask(broker, "image", body=WORKFLOW)).status == 200
        async with broker.connect() as client:
            await begin(client, "tts")
            await eventually(lambda: host.services["mvoice"].count("/load") == 1)
            broker.signal(signal.SIGTERM)
            assert told(await only_answer(client)) == (503, "shutting_down", "mvoice", True)
        assert await broker.exit_code() == 0

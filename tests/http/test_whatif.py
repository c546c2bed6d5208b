"""`mgpu whatif` on the log of a live broker before services that hold memory on a card."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from mgpu_http.cli import main
from tests.support.facade import Address
from tests.support.gpu_host import at_rest, gpu_host, ready, sampled_anew

ROUTES = {"load": {"path": "/load"}, "unload": {"path": "/unload"}}
MIB = {"dear": 7_000, "cheap": 6_000, "other": 7_500}
LOAD_S = {"dear": 0.6, "cheap": 0.1, "other": 0.1}
KINDS = {"tts": "dear", "stt": "cheap", "llm": "other"}
ROUNDS = 4


def consumers() -> dict[str, Any]:
    paths = {name: {kind: {"path": f"/{kind}"}} for kind, name in KINDS.items()}
    return {
        name: {"vram_resident_mib": mib, "paths": paths[name], **ROUTES}
        for name, mib in MIB.items()
    }


async def in_turns(broker: Address) -> None:
    """Two of three fit: each is asked for in turn, in the last round all at once."""
    await ready(broker)
    await broker.ask("POST", "/v1/consumers/other/unload")
    await broker.until("out", lambda s: s["consumers"]["other"]["residency"] == "absent")
    for _ in range(ROUNDS):
        for kind in KINDS:
            answer = await broker.ask("POST", f"/v1/{kind}?delay=0.05", body=b"{}")
            assert answer.status == 200
            await sampled_anew(broker)  # nothing hangs on a moment
    together = [broker.ask("POST", f"/v1/{kind}?delay=0.05", body=b"{}") for kind in KINDS]
    assert {answer.status for answer in await asyncio.gather(*together)} == {200}
    await at_rest(broker)


async def test_a_live_log_is_reproduced_and_another_planner_saves_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with gpu_host(tmp_path, total_mib=16_000) as host:
        for name, mib in MIB.items():
            service = host.start(name, mib=mib, loaded=name != "other", free_s=0.1)
            service.rule("/load", delay=LOAD_S[name])
        with host.serve(
            consumers=consumers(),
            routing=KINDS,
            gpu={"cushion_mib": 0},
            scheduler={"settle_timeout_s": 5},
        ) as broker:
            await in_turns(broker)
    assert main(["whatif", str(tmp_path / "log"), "--planner", "gdsf", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    recorded, same, new = compared["recorded"], compared["same"], compared["new"]
    assert recorded["requests"] == same["requests"] == new["requests"] == 3 * (ROUNDS + 1)
    assert same["loads"] == recorded["loads"] > 2 * ROUNDS  # lru sends out who is needed next
    assert same["mean_wait_ms"] == pytest.approx(recorded["mean_wait_ms"], rel=0.1)
    assert new["loads"] < same["loads"]  # gdsf keeps the dear one
    assert new["mean_wait_ms"] < same["mean_wait_ms"]
    assert main(["whatif", str(tmp_path / "log"), "--planner", "gdsf"]) == 0
    text = capsys.readouterr().out
    assert "SIMULATED" in text
    assert "gained most" in text

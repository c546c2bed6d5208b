"""Runs of the simulated host, recorded as a log and lived through again: `mgpu whatif`."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from mgpu_core.codec import encode_config
from mgpu_core.config import SECOND_US
from mgpu_core.planners import Lru, View
from mgpu_core.simulation.faults import Faults
from mgpu_core.simulation.making import draw_script
from mgpu_core.simulation.world import World
from mgpu_http.cli import main
from tests.support.logs import History, host, write_log

ACTS = 60
SHAPE = {"requests", "mean_wait_ms", "p95_wait_ms", "max_wait_ms", "loads", "evictions", "rejected"}
Whatif = Callable[..., Any]


def lived(seed: int, faults: Faults, *, after_us: int = 900 * SECOND_US) -> History:
    """Four services and sixty clients; the cards are read as a broker reads them."""
    chance, config = random.Random(seed), host()
    script = draw_script(chance, config, faults, acts=ACTS)
    world = World(config, chance=chance, script=script, faults=faults, repolls=True)
    return History(config, tuple(world.run(world.now + script[-1][0] + after_us)))


LEAVING = Faults(client_leaves=100)
TROUBLE = Faults(
    load_fails=100,
    unload_fails=50,
    foreign=100,
    busy=50,
    operator=100,
    client_leaves=100,
    job_fails=50,
)


@pytest.fixture
def whatif(capsys: pytest.CaptureFixture[str]) -> Whatif:
    def run(*arguments: object, code: int = 0) -> Any:
        capsys.readouterr()
        found = main(["whatif", *map(str, arguments)])
        said = capsys.readouterr()
        assert found == code, said
        return (json.loads(said.out) if "--json" in arguments else said.out), said.err

    return run


def config_file(directory: Path, **changes: Any) -> Path:
    path = directory / "new.json"
    path.write_text(json.dumps(encode_config(evolve(host(), **changes))))
    return path


def near(compared: Any) -> bool:
    recorded, same = compared["recorded"], compared["same"]
    return bool(same["mean_wait_ms"] == pytest.approx(recorded["mean_wait_ms"], rel=0.1, abs=20))


@pytest.mark.parametrize("seed", range(10))
def test_a_run_is_reproduced(tmp_path: Path, whatif: Whatif, seed: int) -> None:
    write_log(tmp_path, lived(seed, LEAVING), per_segment=500)
    compared, _ = whatif(tmp_path, "--json")
    recorded, same = compared["recorded"], compared["same"]
    assert recorded.keys() == same.keys() == SHAPE
    assert (recorded["requests"], same["requests"]) == (ACTS, ACTS)
    assert recorded["loads"] > 0
    assert same["loads"] == recorded["loads"]
    assert near(compared)
    assert compared["new"] == same
    assert len(compared["requests"]) == ACTS


def test_failures_operators_and_strangers_come_again(tmp_path: Path, whatif: Whatif) -> None:
    """In trouble a moment can decide about a load, so that some runs go another way."""
    exact = []
    for seed in range(8):
        write_log(tmp_path / str(seed), lived(seed, TROUBLE))
        compared, _ = whatif(tmp_path / str(seed), "--json")
        if compared["same"]["loads"] == compared["recorded"]["loads"] and near(compared):
            exact.append(seed)
    assert len(exact) >= 6, exact


def test_a_larger_card_saves_loads_and_waits(tmp_path: Path, whatif: Whatif) -> None:
    write_log(tmp_path / "log", lived(1, LEAVING))
    (card,) = host().gpus.values()
    large = config_file(tmp_path, gpus={0: evolve(card, total_mib=40_000, max_parallel=None)})
    compared, _ = whatif(tmp_path / "log", "--config", large, "--json")
    same, new = compared["same"], compared["new"]
    assert same["evictions"] > 2
    assert new["evictions"] == 0
    assert new["loads"] < same["loads"]
    assert new["mean_wait_ms"] < same["mean_wait_ms"] / 2
    text, _ = whatif(tmp_path / "log", "--config", large)
    assert "SAME, SIMULATED  NEW, SIMULATED" in text
    assert "gained most" in text


class Nobody(Lru):
    """It never names anybody."""

    def victims(self, target: str, view: View) -> tuple[str, ...] | None:
        return () if view.resident or not view.missing_mib() else None


class Broken(Lru):
    def victims(self, target: str, view: View) -> tuple[str, ...] | None:
        raise LookupError("nobody there")


def test_another_planner_decides_otherwise(tmp_path: Path, whatif: Whatif) -> None:
    write_log(tmp_path, lived(5, LEAVING))
    compared, _ = whatif(tmp_path, "--planner", f"{__name__}:Nobody", "--json")
    assert compared["same"]["evictions"] > 0
    assert compared["new"]["evictions"] == 0
    assert compared["new"]["rejected"] > compared["same"]["rejected"]
    text, _ = whatif(tmp_path, "--planner", f"{__name__}:Nobody")
    assert "end otherwise" in text
    assert "queue_timeout" in text
    _, err = whatif(tmp_path, "--planner", f"{__name__}:Broken", code=1)
    assert "LookupError: nobody there" in err


def test_who_is_not_configured_any_more_is_refused(tmp_path: Path, whatif: Whatif) -> None:
    write_log(tmp_path / "log", lived(1, LEAVING))
    kept = {name: one for name, one in host().consumers.items() if name != "comfyui"}
    compared, err = whatif(
        tmp_path / "log", "--config", config_file(tmp_path, consumers=kept), "--json"
    )
    outcomes = {(one["consumer"], one["outcome"]["new"]) for one in compared["requests"]}
    assert {out for name, out in outcomes if name == "comfyui"} == {"no_consumer"}
    assert ("mvoice", "served") in outcomes
    assert "has no comfyui" in err


def test_runs_are_taken_each_by_itself(tmp_path: Path, whatif: Whatif) -> None:
    first, second = lived(1, LEAVING), lived(2, LEAVING)
    write_log(tmp_path / "log", first, run="a")
    alone, _ = whatif(tmp_path / "log", "--json")
    write_log(tmp_path / "log", renamed(second), run="b", first_seq=len(first.steps) + 1)
    both, _ = whatif(tmp_path / "log", "--json")
    assert both["recorded"]["requests"] == 2 * ACTS
    assert both["same"]["loads"] == both["recorded"]["loads"] > alone["recorded"]["loads"]
    text, _ = whatif(tmp_path / "log")
    assert "2 runs, each by itself" in text


def renamed(told: History) -> History:
    """Requests of another run have other ids, and it comes later."""

    def of(item: Any) -> Any:
        return evolve(item, request=f"b-{item.request}") if hasattr(item, "request") else item

    def steps() -> Iterator[Any]:
        for event, transition in told.steps:
            yield of(event), transition._replace(effects=tuple(map(of, transition.effects)))

    return History(told.config, tuple(steps()))


def test_a_log_that_begins_in_mid_run(tmp_path: Path, whatif: Whatif) -> None:
    """Who was on the way then comes at its beginning, and who was in is in."""
    told = lived(13, LEAVING)
    cut = next(
        n
        for n, state in enumerate(told.states)
        if n > 100 and state.serving and len(state.requests) < 4 and not state.swaps
    )
    first, *_ = write_log(tmp_path, told, per_segment=cut)
    first.unlink()
    compared, err = whatif(tmp_path, "--json")
    assert "on the way when the log begins" in err
    assert 10 < compared["recorded"]["requests"] < ACTS
    assert abs(compared["same"]["loads"] - compared["recorded"]["loads"]) <= 1
    assert near(compared)


def test_a_log_that_is_cut_off(tmp_path: Path, whatif: Whatif) -> None:
    """Who still waits when it ends leaves then, and counts nowhere as served."""
    told = lived(1, LEAVING)
    cut = next(n for n in range(150, len(told.steps)) if len(told.states[n].queue) > 3)
    write_log(tmp_path, told.first(cut))
    compared, err = whatif(tmp_path, "--json")
    assert "waited when the log ended" in err
    assert compared["same"]["loads"] == compared["recorded"]["loads"]
    left = [one for one in compared["requests"] if one["outcome"]["recorded"] == "left"]
    assert len(left) > 3
    assert all(one["wait_ms"]["recorded"] is None for one in left)


def test_nobody_asks(tmp_path: Path, whatif: Whatif) -> None:
    write_log(tmp_path, lived(1, LEAVING).first(3))
    _, err = whatif(tmp_path, code=2)
    assert "nobody asks for anything" in err
    _, err = whatif(tmp_path / "none", code=2)
    assert "there is no" in err

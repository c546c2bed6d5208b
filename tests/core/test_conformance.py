"""The core grants, queues, joins, starts and rejects as llama-swap's FIFO was recorded to do.

The recordings lie beside the repository and not in it; a handful restated here always runs.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.core.fifo import Recording, expand

SHARED = Path(__file__).resolve().parents[3] / "shared" / "conformance"
# A late result is taken for a newer load's: epochs are there to not do that.
WANTED_DIFFERENCES = {"stale_swap_done_after_unload_ABA"}


def recorded() -> list[Any]:
    scenarios = [
        json.loads(line)
        for path in sorted(SHARED.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [
        pytest.param(scenario, id=scenario["name"])
        for scenario in scenarios
        if scenario["name"] not in WANTED_DIFFERENCES
    ]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the recordings are not beside the repository")
@pytest.mark.parametrize("scenario", recorded())
def test_recorded_scenario(scenario: dict[str, Any]) -> None:
    assert Recording(scenario).run() == []


# ------------------------------------------------------------------ a handful that always runs


def step(do: str, *effects: str, queue: tuple[int, ...] = (), **state: Any) -> dict[str, Any]:
    """One step in the recordings' words; `do` as in `request 1 a` or `swap_done a`."""
    op, *words = do.split()
    fields: dict[str, Any] = {"op": op}
    for word in words:
        fields["id" if word.isdigit() else "model"] = int(word) if word.isdigit() else word
    if op == "unload":
        fields["models"] = [fields.pop("model")]
    active = [
        {"model": model, "evict": list(evict), "waiters": list(waiters)}
        for model, (evict, waiters) in state.get("active", {}).items()
    ]
    return {
        "do": fields,
        "effects": list(effects),
        "queue": list(queue),
        "active": active,
        "in_flight": state.get("in_flight", {}),
        "reserved": state.get("reserved", {}),
    }


TABLE_AB = {"b": ["a"]}
RESTATED = {
    "one load serves all who wait": {
        "setup": {"models": {"a": "stopped"}, "planner": "table"},
        "steps": [
            step(
                "request 1 a", "admit:1", "start:a:[]", active={"a": ("", [1])}, reserved={"a": 1}
            ),
            step("request 2 a", "admit:2", active={"a": ("", [1, 2])}, reserved={"a": 2}),
            step("swap_done a", "serve:1:a", "serve:2:a", in_flight={"a": 2}, reserved={"a": 2}),
        ],
    },
    "no swap while its victim serves, and later arrivals overtake": {
        "setup": {"models": {"a": "ready", "b": "stopped"}, "planner": "table", "table": TABLE_AB},
        "steps": [
            step("request 1 a", "admit:1", "serve:1:a", in_flight={"a": 1}, reserved={"a": 1}),
            step(
                "request 2 b", "admit:2", queue=(2,), in_flight={"a": 1}, reserved={"a": 1, "b": 1}
            ),
            step(
                "request 3 a",
                "admit:3",
                "serve:3:a",
                queue=(2,),
                in_flight={"a": 2},
                reserved={"a": 2, "b": 1},
            ),
            step("serve_done a", queue=(2,), in_flight={"a": 1}, reserved={"a": 1, "b": 1}),
            step("serve_done a", "start:b:[a]", active={"b": ("a", [2])}, reserved={"b": 1}),
        ],
    },
    "two that evict the same one do not run side by side": {
        "setup": {
            "models": {"a": "stopped", "b": "stopped", "x": "ready"},
            "planner": "table",
            "table": {"a": ["x"], "b": ["x"]},
        },
        "steps": [
            step(
                "request 1 a", "admit:1", "start:a:[x]", active={"a": ("x", [1])}, reserved={"a": 1}
            ),
            step(
                "request 2 b",
                "admit:2",
                queue=(2,),
                active={"a": ("x", [1])},
                reserved={"a": 1, "b": 1},
            ),
            step(
                "swap_done a",
                "serve:1:a",
                "start:b:[x]",
                active={"b": ("x", [2])},
                in_flight={"a": 1},
                reserved={"a": 1, "b": 1},
            ),
        ],
    },
    "an unload fails who waits and lets the next one start": {
        "setup": {
            "models": {"a": "stopped", "b": "stopped"},
            "planner": "table",
            "table": TABLE_AB,
        },
        "steps": [
            step(
                "request 1 a", "admit:1", "start:a:[]", active={"a": ("", [1])}, reserved={"a": 1}
            ),
            step(
                "request 2 b",
                "admit:2",
                queue=(2,),
                active={"a": ("", [1])},
                reserved={"a": 1, "b": 1},
            ),
            step(
                "unload a",
                "error:1:a",
                "stop:[a]",
                "start:b:[a]",
                active={"b": ("a", [2])},
                reserved={"b": 1},
            ),
        ],
    },
    "an exclusive group has one member in": {
        "setup": {
            "models": {"a": "ready", "b": "stopped"},
            "planner": "group",
            "groups": {
                "g": {"members": ["a", "b"], "swap": True, "exclusive": True, "persistent": False}
            },
        },
        "steps": [
            step(
                "request 1 b", "admit:1", "start:b:[a]", active={"b": ("a", [1])}, reserved={"b": 1}
            ),
            step("swap_done b", "serve:1:b", in_flight={"b": 1}, reserved={"b": 1}),
        ],
    },
    "a matrix keeps what is dear": {
        "setup": {
            "models": {"a": "stopped", "b": "ready", "c": "ready"},
            "planner": "matrix",
            "sets": [{"Name": "s", "DSL": "a & (c | b)"}],
            "evict_costs": {"b": 10, "c": 1},
        },
        "steps": [
            step(
                "request 1 a", "admit:1", "start:a:[c]", active={"a": ("c", [1])}, reserved={"a": 1}
            )
        ],
    },
}


@pytest.mark.parametrize("scenario", RESTATED.values(), ids=RESTATED)
def test_restated_scenario(scenario: dict[str, Any]) -> None:
    assert Recording(scenario).run() == []


def test_a_difference_is_found() -> None:
    wrong = {
        "setup": {"models": {"a": "ready"}, "planner": "table"},
        "steps": [step("request 1 a", "admit:1", "start:a:[]")],
    }
    assert len(Recording(wrong).run()) == 3  # effects, in_flight, reserved


def test_expressions_stand_for_their_sets_in_order() -> None:
    assert expand("a & (b | c & d)") == [frozenset("ab"), frozenset("acd")]


# ------------------------------------------------------------------ the differences that are wanted


def abandoned_load() -> tuple[Recording, int]:
    """Load a for 1, unload it by force, load it again for 2; give the first load's epoch."""
    recording = Recording({"setup": {"models": {"a": "stopped"}, "planner": "table"}, "steps": []})
    core = recording.core
    assert core.request("1", "a") == ["load a"]
    old = core.open["load", "a"]
    assert core.unload("a", force=True) == ["reject 1 unloaded", "unload a"]
    assert core.unloaded("a") == []
    assert core.request("2", "a") == ["load a"]
    return recording, old


@pytest.mark.parametrize("error", [None, "load_failed"])
def test_epochs_a_late_result_of_an_abandoned_load_is_not_taken_for_the_new_one(
    error: str | None,
) -> None:
    recording, old = abandoned_load()
    told = recording._swap_done({"model": "a", "epoch": old, "err": error})
    assert told == []
    assert recording.core.waiters("a") == ["2"]
    assert recording.core.loaded("a") == ["serve 2"]


def test_an_unload_does_not_stop_the_others() -> None:
    """Theirs blocks the loop until the process has stopped; here others are served meanwhile."""
    setup = {"models": {"a": "ready", "c": "ready"}, "planner": "table"}
    core = Recording({"setup": setup, "steps": []}).core
    assert core.unload("a", force=True) == ["unload a"]
    assert core.request("1", "c") == ["serve 1"]
    assert core.finish("1") == []
    assert core.unloaded("a") == []


def test_overtaking_is_bounded_unless_it_is_switched_off() -> None:
    """Theirs is not: `starvation_fast_path_overtakes_queue` can be told for ever."""
    setup = {"models": {"a": "ready", "b": "stopped"}, "planner": "table", "table": TABLE_AB}
    core = Recording({"setup": setup, "steps": []}).core
    core.request("a0", "a")
    core.request("b", "b")
    for number in range(1, 30):
        assert core.request(f"a{number}", "a") == [f"serve a{number}"]
        core.finish(f"a{number - 1}")
    bounded = core.state.config.consumers.values()
    core.reconfigure(*bounded, gpus=(*core.state.config.gpus.values(),), overtake_bound=8)
    assert core.request("a30", "a") == []
    core.finish("a29")
    assert core.open.keys() == {("unload", "a")}

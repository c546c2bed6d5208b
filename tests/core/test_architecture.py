"""The drawings of docs/architecture.md are those of the tables, and the core stays pure."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "mgpu_core").rglob("*.py"))
# What import-linter cannot see: built-in functions that would make a step depend on its machine.
IMPURE_NAMES = {"open", "print", "input", "hash", "id", "eval", "exec", "__import__"}
PURE_MODULES = {
    "ast",
    "bisect",
    "collections",
    "enum",
    "functools",
    "heapq",
    "types",
    "typing",
    "attrs",
}


def test_drawings_are_those_of_the_tables() -> None:
    tools = runpy.run_path(str(ROOT / "docs" / "draw_transitions.py"))
    page = tools["PAGE"].read_text()

    assert tools["drawn"](page) == page, "run: python docs/draw_transitions.py"


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_module_uses_nothing_impure(path: Path) -> None:
    tree = ast.parse(path.read_text())
    calls = {
        n.func.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }

    assert calls.isdisjoint(IMPURE_NAMES)
    assert imported <= PURE_MODULES | {"mgpu_core"}


def test_steps_do_not_depend_on_the_hash_seed() -> None:
    """The same events give the same effects and notes in processes with other hash seeds."""
    script = """
import json
from mgpu_core import Consumer, Gpu, Scheduler
from mgpu_core.codec import encode_effect, encode_note, encode_state
from mgpu_core.config import config_of
from mgpu_core.events import Request, ServeDone, Started, UnloadDone

names = "abcdefgh"
config = config_of(
    *(Consumer(name=n, vram_mib={0: 3000}, unload_route=True, driver='systemd') for n in names),
    gpus=(Gpu(total_mib=7000),),
)
scheduler = Scheduler(config)
state = scheduler.initial()
for at, event in enumerate(
    [Started(at=0, run="x"), *(Request(at=0, request=f"r{n}", consumer=n) for n in names)]
):
    transition = scheduler.step(state, event)
    state = transition.state
    print(json.dumps([encode_effect(e) for e in transition.effects]))
    print(json.dumps([encode_note(n) for n in transition.notes]))
print(json.dumps(encode_state(state)))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
        for seed in ("0", "1", "2", "12345")
    }

    assert len(outputs) == 1
    assert '"StartLoad"' in outputs.pop()

"""Plant a bug into a copy of the core, and ask there who notices."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from tests.planted.plants import Edit, Plant

ROOT = Path(__file__).parents[2]
COPIED = ("mgpu_core", "tests/core", "tests/planted")
# The tests that run the core many times over are no examples of a rule.
NO_EXAMPLES = ("test_transcripts.py",)
LIMIT_S = 1800


class DoesNotApplyError(ValueError):
    """The core has changed where the bug was planted."""


@frozen
class Caught:
    """`by` names the property and what failed in it; `events` were sent until then.

    `run` is the one that shows it, null where the core broke down altogether.
    """

    by: str
    events: int
    run: int | None = None


def changed(edits: tuple[Edit, ...], sources: Mapping[str, str]) -> dict[str, str]:
    """Give the text of each module that the edits change, by its path."""
    texts = dict(sources)
    for edit in edits:
        path = f"mgpu_core/{edit.module}.py"
        found = texts[path].count(edit.text)
        if found != 1:
            raise DoesNotApplyError(f"{path} holds the text to change {found} times: {edit.text!r}")
        texts[path] = texts[path].replace(edit.text, edit.instead)
    return {path: text for path, text in texts.items() if text != sources[path]}


def core_sources() -> dict[str, str]:
    return {
        f"mgpu_core/{path.name}": path.read_text() for path in (ROOT / "mgpu_core").glob("*.py")
    }


@contextmanager
def planted(plant: Plant | None) -> Iterator[Path]:
    """Make a tree that holds the core with this bug, and the tests; None: as it is."""
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        tree = Path(name)
        for folder in COPIED:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", tree)
        for path, text in changed(plant.edits if plant else (), core_sources()).items():
            (tree / path).write_text(text)
        yield tree


def fails_an_example(tree: Path) -> str | None:
    """Run the example tests of the core in a planted tree: the first that fails, if any."""
    ignored = [f"--ignore=tests/core/{name}" for name in NO_EXAMPLES]
    # Those that read what lies beside the core can't run here.
    ignored.append(
        "--deselect=tests/core/test_architecture.py::test_drawings_are_those_of_the_tables"
    )
    ran = _python(
        tree, "-m", "pytest", "tests/core", "-x", "-q", "-p", "no:cacheprovider", *ignored
    )
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if ran.returncode == 0:
        return None
    return failed[0] if failed else ran.stdout[-500:] + ran.stderr[-500:]


def caught(
    tree: Path, seeds: Sequence[int], *, runs: int, first: Mapping[int, int] | None = None
) -> tuple[Caught | None, ...]:
    """Let the properties look for the bug, with random histories of each seed.

    `first` tells for some seeds in which run it showed the last time, which saves the others.
    """
    asked = [f"{seed}:{first[seed]}" if first and seed in first else str(seed) for seed in seeds]
    ran = _python(tree, "-m", "tests.planted.catcher", str(runs), *asked)
    if ran.returncode:
        crash = Caught(by=f"crash: {ran.stderr.strip().splitlines()[-1]}", events=0)
        return (crash,) * len(seeds)
    found = json.loads(ran.stdout.splitlines()[-1])
    return tuple(None if one is None else Caught(**one) for one in found)


def environment(tree: Path) -> dict[str, str]:
    """Have a process import what lies in the tree."""
    return {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def _python(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=environment(tree),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )

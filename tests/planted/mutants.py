"""Change every expression of the core in turn and see which no example test notices.

python -m tests.planted.mutants [--jobs 2] [--share N] [NAME ...]

mutmut makes the mutants; its own way of running them takes a second for each, most of it to start
pytest anew. `judge.py` starts it once. What survives is printed as it is found, the table last.
"""

import argparse
import ast
import difflib
import json
import shutil
import subprocess
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mutmut.mutation.file_mutation import mutate_file_contents

from tests.planted.planting import ROOT, environment, planted
from tests.planted.switch import stem

# What only holds data, or tells what was decided: nothing in it decides.
UNDECIDING = {"__init__", "effects", "events", "notes", "telling", "transcript", "transitions"}
SWITCH = ("from mutmut.mutation.trampoline import", "from tests.planted.switch import")


def modules() -> list[str]:
    return sorted({path.stem for path in (ROOT / "mgpu_core").glob("*.py")} - UNDECIDING)


@contextmanager
def mutated(name: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """Make a tree with all mutants of a module, and give for each what it changes, as a diff."""
    with planted(None) as tree:
        shutil.copytree(ROOT / "docs", tree / "docs")  # a test reads one of its pages
        path = tree / "mgpu_core" / f"{name}.py"
        made = mutate_file_contents(str(path), path.read_text())
        path.write_text(made.code.replace(*SWITCH))
        texts = functions(made.code)
        short = [mutant.rpartition(".")[2] for mutant in made.mutant_names]
        yield tree, {f"mgpu_core.{name}.{one}": change(texts, one) for one in short}


def functions(code: str) -> dict[str, list[str]]:
    """Give the lines of each function and method, by its name."""
    lines = code.splitlines()
    return {
        node.name: lines[node.lineno : node.end_lineno]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.FunctionDef)
    }


def change(texts: Mapping[str, list[str]], mutant: str) -> str:
    before, after = texts[f"{stem(mutant)}__mutmut_orig"], texts[mutant]
    lines = difflib.unified_diff(before, after, n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def verdicts(tree: Path, mutants: list[str], jobs: int) -> Iterator[tuple[str, str | None]]:
    """Give each mutant and the test that noticed it, if any."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.planted.judge", str(jobs)],
        cwd=tree,
        env=environment(tree),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as judge:
        assert judge.stdin is not None
        assert judge.stdout is not None
        with judge.stdin as names:
            json.dump(mutants, names)
        for line in judge.stdout:
            verdict = json.loads(line)
            yield verdict["mutant"], verdict["by"]
    if judge.returncode:
        sys.exit("the example tests can't be run, or one fails without any mutant")


def chosen(changes: Mapping[str, str], wanted: Collection[str], part: int) -> list[str]:
    """Take the wanted ones, or those of functions; of all, one in `part`, the same each time."""
    if wanted:
        return [name for name in changes if name in wanted or stem(name) in wanted]
    return [name for name in changes if zlib.crc32(name.encode()) % part == 0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planted.mutants")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="walk, ..., a mutant or the beginning that those of a function share; none: all",
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--share", type=int, default=1, metavar="N", help="only one in N")
    arguments = parser.parse_args()
    single = {name for name in arguments.names if name.startswith("mgpu_core.")}
    names = [name for name in arguments.names if name not in single]
    names += sorted({name.split(".")[1] for name in single} - set(names))
    if unknown := sorted(set(names) - set(modules())):
        sys.exit(f"no such module: {', '.join(unknown)}; there are: {', '.join(modules())}")

    table = ["| module | mutants | noticed | survived |", "|---|---|---|---|"]
    for name in names or modules():
        survived = 0
        with mutated(name) as (tree, changes):
            wanted = [one for one in single if one.startswith(f"mgpu_core.{name}.")]
            tried = chosen(changes, wanted, arguments.share)
            for mutant, by in verdicts(tree, tried, arguments.jobs):
                if by is None:
                    survived += 1
                    print(f"{mutant}\n{changes[mutant]}\n", flush=True)
        table.append(f"| `{name}` | {len(tried)} | {len(tried) - survived} | {survived} |")
    print("\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())

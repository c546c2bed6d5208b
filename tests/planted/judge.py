"""Run in a tree with mutants in it: the example tests against each of those named on stdin.

The tests are collected once. Each mutant has a process of its own, forked from there, and only the
tests that call its function, those first that noticed others; the first that fails decides.
"""

import gc
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from tests.planted import switch

# For a mutant that makes the core go on for ever: seconds of the processor, all tests take two.
LIMIT_S = 10
ARGUMENTS = (
    *("-c", os.devnull, "--rootdir=.", "--import-mode=importlib", "-q", "-s"),
    *(
        "-p",
        "no:cacheprovider",
        "-p",
        "no:asyncio",
        "-p",
        "no:timeout",
        "-p",
        "no:hypothesispytest",
    ),
    *("-p", "no:terminalreporter", "-p", "no:logging"),
    "tests/core",
    # Those that read the source of the core itself, or play long histories, can't judge a mutant.
    "--ignore=tests/core/test_architecture.py",
    "--deselect=tests/core/test_transcripts.py::test_a_history_is_told_so_that_it_can_be_played",
)


class Judge:
    """A plugin that takes the place of pytest's own loop."""

    def __init__(self, mutants: list[str], jobs: int, tell: Callable[[object], None]) -> None:
        self.mutants = mutants
        self.jobs = jobs
        self.tell = tell
        self.failed = False
        self.noticed: Counter[tuple[str, str]] = Counter()

    def pytest_addoption(self, parser: pytest.Parser) -> None:
        parser.addoption("--rewrite-transcripts", action="store_true")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        calls = self._calls(session.items)
        gc.collect()
        gc.freeze()
        under_way: dict[int, tuple[str, int]] = {}
        for mutant in self.mutants:
            while len(under_way) >= self.jobs:
                self._one_ended(under_way, session.items)
            function = switch.stem(mutant)
            able = [n for n, names in enumerate(calls) if function in names]
            able.sort(key=lambda n: self._rank(function, session.items[n].nodeid))
            reads, writes = os.pipe()
            if child := os.fork():
                os.close(writes)
                under_way[child] = (mutant, reads)
            else:
                self._try(mutant, [(n, session.items[n]) for n in able], writes)
        while under_way:
            self._one_ended(under_way, session.items)
        return True

    def _rank(self, function: str, test: str) -> tuple[int, int]:
        """Who noticed a mutant of this function is asked first, then who noticed many others."""
        return -self.noticed[function, test], -self.noticed["", test]

    def _calls(self, items: list[pytest.Item]) -> list[set[str]]:
        """Run all once, in a process that leaves no trace here: what does each test call?"""
        reads, writes = os.pipe()
        if not (child := os.fork()):
            calls = []
            for item in items:
                switch.called = set()
                self._run(item)
                calls.append(sorted(switch.called))
            with os.fdopen(writes, "w") as pipe:
                json.dump(None if self.failed else calls, pipe)
            os._exit(0)
        os.close(writes)
        with os.fdopen(reads) as pipe:
            found = json.load(pipe)
        os.waitpid(child, 0)
        if found is None:
            raise pytest.UsageError("an example test fails without any mutant")
        return [set(names) for names in found]

    def _run(self, item: pytest.Item) -> None:
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)

    def _try(self, mutant: str, items: list[tuple[int, pytest.Item]], pipe: int) -> None:
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        module, _, name = mutant.rpartition(".")
        switch.active = {module: name}
        for number, item in items:
            self._run(item)
            if self.failed:
                os.write(pipe, str(number).encode())
                os._exit(1)
        os._exit(0)

    def _one_ended(self, under_way: dict[int, tuple[str, int]], items: list[pytest.Item]) -> None:
        child, status = os.wait()
        mutant, reads = under_way.pop(child)
        with os.fdopen(reads) as pipe:
            number = pipe.read()
        by = items[int(number)].nodeid if number else f"ended with {status}" if status else None
        if number and by:
            self.noticed.update([("", by), (switch.stem(mutant), by)])
        self.tell({"mutant": mutant, "by": by})


def main(jobs: int) -> int:
    out = os.fdopen(os.dup(1), "w")

    def tell(what: object) -> None:
        print(json.dumps(what), file=out, flush=True)

    os.dup2(2, 1)  # what the tests print is no verdict
    judge = Judge(json.load(sys.stdin), jobs, tell)
    return int(pytest.main(list(ARGUMENTS), plugins=[judge]))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))

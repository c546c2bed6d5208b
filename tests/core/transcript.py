"""Read a transcript, play it against the core, write down what was decided and why.

A transcript is blocks: commands, a line of dashes, what came of them, an empty line. A block that
begins with a configuration (`gpu`, `service`, ...) starts a new scenario. `docs/transcripts.md`
lists the commands.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from attrs import fields_dict, frozen

from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Config, Consumer, Gpu
from mgpu_core.telling import READ, believed, overtakes, said
from tests.core.driver import START_US, STEP_US, Core, lazy, service

LINE = "----"
MAKERS: dict[str, Callable[..., Consumer]] = {
    "service": service,
    "lazy": lazy,
    "consumer": lambda name, mib=0, **rest: Consumer(name=name, **{"vram_mib": {0: mib}, **rest}),
}
CONFIGURES = {"reconfigure", "gpu", "set", "absent", *MAKERS}


class TranscriptError(ValueError):
    """A line that is no command; the message says which and where."""


@frozen
class Block:
    """Commands and comments as they stand, what they gave when last written, and where."""

    line: int
    commands: tuple[str, ...]
    output: tuple[str, ...]


def blocks(text: str) -> Iterator[Block]:
    """Split at lines of dashes and the empty lines after what came of the commands."""
    commands: list[str] = []
    output: list[str] | None = None
    first = 1
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if output is None and line == LINE:
            output = []
        elif output is None:
            commands.append(line)
        elif line:
            output.append(line)
        else:
            yield Block(first, tuple(commands), tuple(output))
            commands, output, first = [], None, number + 1
    if any(commands):
        yield Block(first, tuple(commands), ())


def rewritten(text: str, file: str, planner: object = None) -> str:
    """Give the whole text with what the commands give now, with a planner of one's own if given."""
    play = Play(file, planner)
    parts = []
    for block in blocks(text):
        told = play.block(block)
        parts.append("\n".join([*block.commands, LINE, *told, ""]))
    return "\n".join(parts)


class Play:
    """One file being played: the core of its present scenario, and the commands."""

    def __init__(self, file: str, planner: object = None) -> None:
        self.file = file
        self.planner = planner
        self.core: Core | None = None

    def block(self, block: Block) -> list[str]:
        lines = [
            (number, words)
            for number, line in enumerate(block.commands, start=block.line)
            if (words := line.split("#")[0].split())
        ]
        head = list(takewhile(lambda one: one[1][0] in CONFIGURES, lines))
        told: list[str] = []
        if head:
            told += self._tried(head[0][0], lambda: self._configure(head))
        for number, words in lines[len(head) :]:
            told += self._tried(number, lambda words=words: self._command(words))
        return told

    def _tried(self, number: int, act: Callable[[], list[str]]) -> list[str]:
        try:
            return act()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TranscriptError(f"{self.file}, line {number}: {error}") from error

    # ------------------------------------------------------------------ commands

    def _configure(self, lines: Sequence[tuple[int, list[str]]]) -> list[str]:
        """Take over a configuration: a new scenario's, or after `reconfigure` a new one."""
        gpus, consumers, absent = [], [], []
        settings: dict[str, Any] = {}
        for _, (word, *rest) in lines:
            names, fields = plain(rest), keywords(rest)
            if word == "gpu":
                gpus.append(Gpu(index=int(names[0]) if names else 0, **fields))
            elif word == "set":
                settings |= fields
            elif word == "absent":
                absent += names
            elif word in MAKERS:
                mib = [int(text) for text in names[1:]]
                consumers.append(MAKERS[word](names[0], *mib, **fields))
        cards = tuple(gpus) or (Gpu(total_mib=24_000),)
        if lines[0][1] != ["reconfigure"]:
            self.core = Core(*consumers, gpus=cards, planner=self.planner, **settings)
            for name in absent:
                self.core.probe(name, resident=False)
            return []
        return self._played(lambda core: core.reconfigure(*consumers, gpus=cards, **settings))

    def _command(self, words: list[str]) -> list[str]:
        word, *rest = words
        if word not in COMMANDS:
            if word in CONFIGURES:
                raise ValueError(f"{word!r} belongs before the first command of a block")
            known = ", ".join(sorted({*COMMANDS, *CONFIGURES}))
            raise ValueError(f"unknown command {word!r}; there are: {known}")
        if word == "show":
            return self._show(rest)
        return self._played(lambda core: COMMANDS[word](core, *plain(rest), **keywords(rest)))

    def _played(self, act: Callable[[Core], object]) -> list[str]:
        """Give what was decided while a command was carried out, event by event."""
        if self.core is None:
            raise ValueError("a transcript begins with a configuration: gpu, service, lazy, ...")
        recorder = Recorder(self.core)
        act(recorder.core)
        return recorder.stop()

    def _show(self, names: Sequence[str]) -> list[str]:
        if self.core is None:
            raise ValueError("there is nothing to show before a configuration")
        state = self.core.state
        lines = [believed(state, name) for name in names or state.consumers]
        waiting = [f"{n} ({overtakes(state, n)})" for n in state.queue]
        return lines if names else [*lines, f"queue (overtaken): {', '.join(waiting) or 'empty'}"]


class Recorder:
    """Hears every event that a core is fed, the ticks between commands too."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._feed = core.feed
        core.feed = self._heard  # type: ignore[method-assign]
        self.lines: list[str] = []

    def _heard(self, event: ev.Event) -> list[str]:
        told = self._feed(event)
        again = any(READ in line for line in self.lines)
        lines = said(self.core.last, self.core.last_notes, self.core.at - START_US)
        self.lines += [line for line in lines if not (again and READ in line)]
        return told

    def stop(self) -> list[str]:
        self.core.feed = self._feed  # type: ignore[method-assign]
        return self.lines


def late(core: Core, kind: str, consumer: str, *, epoch: int, error: str | None = None) -> None:
    """Report a completion that the core has given up, or of which it knows nothing."""
    done = ev.UnloadDone if kind == "unloaded" else ev.SwapDone
    core.send(done, consumer=consumer, epoch=epoch, error=error)


def answered(core: Core, kind: str, consumer: str, error: str | None) -> None:
    if (kind, consumer) not in core.open:
        raise ValueError(f"no {kind} of {consumer} is under way")
    (core.unloaded if kind == "unload" else core.loaded)(consumer, error)


def request(core: Core, name: str, consumer: str, **fields: Any) -> None:
    """Ask for work; a deadline is given in seconds from then."""
    if "deadline" in fields:
        fields["deadline"] = core.at + STEP_US + round(fields["deadline"] * SECOND_US)
    core.request(name, consumer, **fields)


COMMANDS: dict[str, Callable[..., object]] = {
    "request": request,
    "cancel": lambda core, name: core.cancel(name),
    "done": lambda core, name, outcome="ok": core.finish(name, outcome),
    "unloaded": lambda core, name, error=None: answered(core, "unload", name, error),
    "loaded": lambda core, name, error=None: answered(core, "load", name, error),
    "late": late,
    "sample": lambda core, **free: core.sample(**free),
    "sample-fails": lambda core: core.sample_fails(),
    "probe": lambda core, name, **fields: core.probe(name, **fields),
    "unload": lambda core, *names: core.unload(*names),
    "unload-by-force": lambda core, *names: core.unload(*names, force=True),
    "load": lambda core, name: core.load(name),
    "load-if-free": lambda core, name: core.load(name, only_if_free=True),
    "pin": lambda core, name: core.pin(name),
    "unpin": lambda core, name: core.pin(name, pinned=False),
    "wait": lambda core, seconds: core.wait(float(seconds)),
    "drain": lambda core: core.send(ev.Drain),
    "resume": lambda core: core.send(ev.Resume),
    "shutdown": lambda core: core.send(ev.Shutdown),
    "restart": lambda core: core.send(ev.Started, run="run-2"),
    "show": lambda: None,
}


# ------------------------------------------------------------------ words to values


def plain(words: Sequence[str]) -> list[str]:
    return [word for word in words if "=" not in word]


def keywords(words: Sequence[str]) -> dict[str, Any]:
    """Give `key=value` words; a time in seconds becomes the field in microseconds."""
    pairs = [word.split("=", 1) for word in words if "=" in word]
    return dict(keyword(key, text) for key, text in pairs)


def keyword(key: str, text: str) -> tuple[str, Any]:
    if f"{key.removesuffix('_s')}_us" in {*fields_dict(Config), *fields_dict(Consumer)}:
        return f"{key.removesuffix('_s')}_us", None if text == "none" else seconds_us(text)
    if key == "can_coexist_with":
        return key, tuple(text.split(","))
    if key == "vram_mib" and (":" in text or text == "none"):
        pairs = [pair.split(":") for pair in text.split(",") if ":" in pair]
        return key, {int(card): int(mib) for card, mib in pairs}
    return key, value(text)


def seconds_us(text: str) -> int:
    return round(float(text) * SECOND_US)


def value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text in words:
        return words[text]
    return float(text) if "." in text else int(text) if text.lstrip("-").isdigit() else text

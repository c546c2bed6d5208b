"""Read a transcript, play it against the core, write down what was decided and why.

A transcript is blocks: commands, a line of dashes, what came of them, an empty line. A block that
begins with a configuration (`gpu`, `service`, ...) starts a new scenario. `docs/transcripts.md`
lists the commands.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from attrs import fields_dict, frozen

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Config, Consumer, Gpu
from mgpu_core.notes import Note
from mgpu_core.state import State
from tests.core.driver import START_US, STEP_US, Core, lazy, service

LINE = "----"
# Which note gives the reason of an effect; both stand in one line.
EXPLAINED = {fx.Serve: "Granted", fx.Reject: "Rejected", fx.StartUnload: "Unloading"}
# Shown once for a command, however often the core asks for it.
READ = "read the cards"
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


def rewritten(text: str, file: str) -> str:
    """Give the whole text with what the commands give now."""
    play = Play(file)
    parts = []
    for block in blocks(text):
        told = play.block(block)
        parts.append("\n".join([*block.commands, LINE, *told, ""]))
    return "\n".join(parts)


class Play:
    """One file being played: the core of its present scenario, and the commands."""

    def __init__(self, file: str) -> None:
        self.file = file
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
            self.core = Core(*consumers, gpus=cards, **settings)
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
        self.lines += [line for line in said(self.core) if not (again and READ in line)]
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


# ------------------------------------------------------------------ decisions to words


def said(core: Core) -> list[str]:
    """Give what the last step decided and noted, in its order, one a line."""
    clock = f"{(core.at - START_US) / SECOND_US:6.1f}  "
    effects = [effect for effect in core.last if not isinstance(effect, fx.WakeAt)]
    lines = []
    for note in core.last_notes:
        effect = next((one for one in effects if explains(note, one)), None)
        if effect is not None:
            effects.remove(effect)
            lines.append(decided(effect, note.details))
        elif not any(begins(note, one) for one in core.last):
            lines.append(noted(note))
    lines += [decided(effect, {}) for effect in effects]
    return [(clock + line).rstrip() for line in lines]


def explains(note: Note, effect: fx.Effect) -> bool:
    """Say whether this note gives the reason of that decision."""
    name = getattr(effect, "request", None) or getattr(effect, "consumer", None)
    kind = EXPLAINED.get(type(effect))
    return note.type == kind and (note.request or note.consumer) == name


def begins(note: Note, effect: fx.Effect) -> bool:
    """Say whether it only says that what was decided has begun."""
    moves = {fx.StartLoad: "loading", fx.StartUnload: "unloading"}.get(type(effect))
    same = note.type == "Moved" and note.consumer == getattr(effect, "consumer", None)
    return same and note.details["new"] == moves


def decided(effect: fx.Effect, why: Mapping[str, Any]) -> str:
    """Put a decision and its reason in a line."""
    match effect:
        case fx.Serve():
            waited = why.get("waited_us", 0) / SECOND_US
            return line("serve", effect.request, f"by {effect.consumer}, waited {waited:.1f} s")
        case fx.Reject():
            again = f", in {effect.retry_after} s" if effect.retry_after else ""
            retry = f"try again{again}" if effect.retryable else "for good"
            return line("reject", effect.request, f"{effect.code} ({retry}): {effect.message}")
        case fx.StartUnload():
            how = "by driver" if effect.how == "driver" else "by routes"
            because = why.get("because", "(no reason given)")
            return line("unload", effect.consumer, f"epoch {effect.epoch}, {how}: {because}")
        case fx.StartLoad():
            return line("load", effect.consumer, f"epoch {effect.epoch}")
        case fx.Probe():
            return line("probe", effect.consumer, "")
    return READ


def line(what: str, of: str, details: str) -> str:
    return f"{what + ' ' + of:<23} {details}"


def noted(note: Note) -> str:
    """Put a note that explains no effect in a line: what, of whom, and its numbers."""
    rest = dict(note.details)
    match note.type:
        case "Waits":
            who, overtaken = flat(rest.pop("who")), rest.pop("overtaken")
            words = f"for {note.consumer}: {rest.pop('why')} ({who})"
            words += f", overtaken {overtaken}" if overtaken else ""
            return line("  waits", str(note.request), ", ".join([words, *pairs(rest)]))
        case "Moved":
            because = f"was {rest['old']}; {rest['because']} ({rest['source']})"
            return line(f"  {note.consumer}", f"is {rest['new']}", because)
        case "SwapStarted":
            free = rest["free_mib"]
            needs = [
                f"{mib} MiB on GPU {gpu} (free: {free.get(gpu, 'not measured')})"
                for gpu, mib in rest["need_mib"].items()
            ]
            victims = f"epoch {rest['epoch']}, to unload: {flat(rest['victims'])}; "
            told = f"{victims}needs {', '.join(needs) or 'no memory'}"
            return line("  swap of", str(note.consumer), told)
        case "Ignored":
            of = note.request or note.consumer or ""
            return line("  ignored", str(rest["what"]), f"{of}: {rest['because']}".lstrip(": "))
        case "Served":
            ran = f"{rest['outcome']}, after {rest['ran_us'] / SECOND_US:.1f} s"
            return line("  ended", str(note.request), ran)
    of = f"{note.request} ({note.consumer})" if note.request and note.consumer else None
    return line(f"  {note.type}", of or note.request or note.consumer or "", ", ".join(pairs(rest)))


def pairs(details: Mapping[str, Any]) -> list[str]:
    return [f"{key} {flat(item)}" for key, item in details.items()]


def flat(item: object) -> str:
    if item is None:
        return "none"
    if isinstance(item, tuple):
        return " ".join(map(str, item)) or "-"
    if isinstance(item, dict):
        return " ".join(f"{key}:{part}" for key, part in item.items()) or "-"
    return repr(item) if isinstance(item, str) and " " in item else str(item)


def believed(state: State, name: str) -> str:
    """Say what is believed of one consumer."""
    consumer, promise = state.consumers[name], state.promises.get(name)
    words = [f"{consumer.residency.value} ({consumer.source.value})"]
    if name in state.serving:
        words.append(f"serves {state.serving[name]}")
    if name in state.waiting:
        words.append(f"{state.waiting[name]} waiting")
    if name in state.owed:
        words.append("owed")
    if promise is not None:
        words.append(f"promised {sum(promise.mib.values())} MiB")
    if consumer.leaky_mib is not None:
        words.append(f"leaky, gave {consumer.leaky_mib} MiB")
    return f"        {name:<16}{', '.join(words)}"


def overtakes(state: State, name: str) -> str:
    equal, higher = state.overtaken[name], state.overtaken_high[name]
    return f"{equal}, and {higher} of higher priority" if higher else str(equal)

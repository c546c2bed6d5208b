"""What a step decided and noted, in words: a line each, in order, as transcripts have it; and for
whoever asks what a request waits for, a reason and an event in words.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mgpu_core import effects as fx
from mgpu_core.config import SECOND_US
from mgpu_core.notes import Note, Reason
from mgpu_core.state import State

# Which note gives the reason of an effect; both stand in one line.
EXPLAINED = {fx.Serve: "Granted", fx.Reject: "Rejected", fx.StartUnload: "Unloading"}
READ = "read the cards"

# What a request waits for, by the type of the reason. All have the form "waits for ...".
AWAITED = {
    "consumer_full": "for a place at {who}",
    "slot": "for the card, held by {who}",
    "leaving": "for {consumer} to go, as an operator wants",
    "unloading": "for {consumer} to be unloaded",
    "collision": "for the swap of {who} into the same memory",
    "victim_busy": "for {who} to end work for somebody else",
    "memory": "for memory being taken or given back by {who}",
    "unfit": "for memory that nothing here frees, held by {who}",
    "cooldown": "to tell {who} to go once more",
    "promoted_ahead": "for {who}, which was overtaken too often",
    "no_overlap": "for {who} to finish: no loads beside work",
    "unrecorded": "for what nobody recorded",
    # What each of those named does was not noted in earlier days.
    "swap": "for {who} to make room",
    "victim_at_work": "for {who} to finish",
}
# The same by what those in the way do, where that is known.
DONE = {
    "unloading": "{who} to be unloaded",
    "settling": "the memory of {who} to be seen free",
    "loading": "{who} to load",
    "working": "{who} to finish",
}
NAMED = 3


def said(all_effects: Sequence[fx.Effect], notes: Sequence[Note], us: int) -> list[str]:
    """Give what a step decided and noted, in its order, one a line; `us` after the beginning."""
    clock = f"{us / SECOND_US:6.1f}  "
    effects = [effect for effect in all_effects if not isinstance(effect, fx.WakeAt)]
    lines = []
    for note in notes:
        effect = next((one for one in effects if explains(note, one)), None)
        if effect is not None:
            effects.remove(effect)
            lines.append(decided(effect, note.details))
        elif not any(begins(note, one) for one in all_effects):
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
    rest: dict[str, Any] = dict(note.details)
    match note.type:
        case "Waits":
            who, overtaken = at_it(rest.pop("who"), rest.pop("doing", ())), rest.pop("overtaken")
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
    both = f"{note.request} ({note.consumer})" if note.request and note.consumer else None
    name = both or note.request or note.consumer or ""
    return line(f"  {note.type}", name, ", ".join(pairs(rest)))


def at_it(who: Sequence[str], doing: Sequence[str]) -> str:
    """Name them, each with what it does, where that is known."""
    return ", ".join(map(" ".join, zip(who, doing, strict=True))) if doing else flat(tuple(who))


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


# ----------------------------------------------------------------------------- why, in words


def awaited(reason: Mapping[str, Any], consumer: str) -> str:
    """Say what a request of this consumer waits for: "for comfyui to finish"."""
    names, doing = reason.get("who", ()), reason.get("doing")
    if not doing:
        kind = str(reason["type"])
        who = listed(names) or ("somebody" if kind != "swap" else consumer)
        return AWAITED.get(kind, "for " + kind).format(who=who, consumer=consumer)
    together: dict[str, list[str]] = {}
    for name, what in zip(names, doing, strict=True):
        together.setdefault(what, []).append(name)
    parts = [DONE.get(what, "{who}").format(who=listed(who)) for what, who in together.items()]
    return "for " + " and ".join(parts)


def awaited_now(reason: Reason, consumer: str) -> str:
    """The same of the reason that a state holds."""
    return awaited({"type": reason.why, "who": reason.who, "doing": reason.doing}, consumer)


def behind(reason: Mapping[str, Any]) -> str:
    """Name some who were served meanwhile by who is in the way: " (r3 and r5)"."""
    requests = reason.get("behind", ())
    if len(requests) > NAMED:
        return f" ({', '.join(requests[:NAMED])} and others)"
    return f" ({listed(requests)})" if requests else ""


def missing(reason: Mapping[str, Any]) -> str:
    """Say how much memory is missing: "4,956 MiB on GPU 0"; nothing where none is."""
    if "need_mib" not in reason:
        return ""
    mib = reason["need_mib"] + reason["cushion_mib"] - max(0, reason["free_mib"])
    return f"{mib:,} MiB on GPU {reason['gpu']}" if mib > 0 else ""


def listed(names: Sequence[str]) -> str:
    """Enumerate them, the first few by name."""
    if len(names) > NAMED + 1:
        return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def lasting(us: int) -> str:
    """Give a duration as people say it."""
    if not us:
        return "0 s"
    if us >= 100 * SECOND_US:
        return f"{us / SECOND_US:,.0f} s"
    if us >= SECOND_US:
        return f"{us / SECOND_US:.1f} s"
    return f"{us / 1000:.0f} ms" if us >= 10_000 else f"{us / 1000:.1f} ms"


def happened(event: Mapping[str, Any], notes: Sequence[Mapping[str, Any]] = ()) -> str:
    """Say what an event of a log was: "ServeDone of r7 on llm", "sample: 12,300 MiB free"."""
    kind, of = event["type"], event.get("request") or event.get("consumer")
    match kind:
        case "Request":
            return f"Request of {of} for {event['consumer']}"
        case "ServeDone":
            on = [f" on {note['consumer']}" for note in notes if note["type"] == "Served"]
            ended = "" if event["outcome"] == "ok" else f": {event['outcome']}"
            return f"ServeDone of {of}{''.join(on)}{ended}"
        case "GpuSample":
            free = [f"{gpu['free_mib']:,} MiB free on GPU {gpu['index']}" for gpu in event["gpus"]]
            return "sample: " + (event["error"] or ", ".join(free) or "no GPU")
        case "ProbeResult":
            return f"probe of {of}: {_seen(event)}"
        case "Tick":
            return "time passed" + "".join(_leaked(note) for note in notes)
        case "Unload":
            return f"Unload of {listed(event['consumers']) or 'all'} by an operator"
        case "Load" | "Pin":
            return f"{kind} of {of} by an operator"
    failed = f": {event['error']}" if event.get("error") else ""
    return (f"{kind} of {of}" if of else str(kind)) + failed


def _leaked(note: Mapping[str, Any]) -> str:
    """Say that too little came free in that time, where it did."""
    if note["type"] != "Leaky":
        return ""
    freed, expected = note["freed_mib"], note["expected_mib"]
    return f": {note['consumer']} gave {freed:,} of {expected:,} MiB"


def _seen(probe: Mapping[str, Any]) -> str:
    """Say what a probe saw, the news first."""
    if not probe["healthy"]:
        return str(probe["failure"] or probe["error"] or "not healthy")
    seen = {True: "loaded", False: "not loaded", None: "healthy"}[probe["resident"]]
    return seen + (", at work" if probe["busy"] else "")

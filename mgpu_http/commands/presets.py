"""`mgpu presets`: the known services, and what to copy and to know of one."""

from argparse import Namespace
from textwrap import indent, wrap

from attrs import asdict

from mgpu_effects import presets
from mgpu_effects.presets import Preset
from mgpu_effects.shapes import did_you_mean, listed
from mgpu_http.commands.output import DONE, USAGE, CommandError, document, result, table

WIDTH = 100
HEAD = ("name", "verified", "loaded by", "unloaded by", "seen by", "title")


def list_all(arguments: Namespace) -> int:
    every = [presets.preset(name) for name in presets.names()]
    if arguments.json:
        document({"presets": [_row(each) for each in every]})
    else:
        result(table(HEAD, [list(_row(each).values()) for each in every]))
    return DONE


def show(arguments: Namespace) -> int:
    if arguments.name not in presets.names():
        near = did_you_mean(arguments.name, presets.names())
        text = ", ".join(filter(None, [f"there is no preset {arguments.name}", near]))
        raise CommandError(f"{text}; there are: {listed(presets.names(), 'and')}", USAGE)
    known = presets.preset(arguments.name)
    if arguments.json:
        hidden = ("text", "discovery")
        document({key: value for key, value in asdict(known).items() if key not in hidden})
    else:
        result(yaml_of(known))
    return DONE


def yaml_of(known: Preset) -> str:
    """Give its keys as part of a configuration, under what to know of them as comments."""
    parts = ("needs", known.needs), ("traps", known.traps)
    lines = [
        f"# {known.title}",
        f"# verified: {known.verified}, {presets.VERIFIED[known.verified]}",
    ]
    for title, sentences in parts:
        lines.append(f"# {title}:")
        for sentence in sentences:
            first = wrap(sentence, WIDTH, initial_indent="#   - ", subsequent_indent="#     ")
            lines += first
    yours = [f"{key}: {example} # yours" for key, example in known.requires.items()]
    keys = "\n".join([f"url: {known.url}", *yours, _dedented(known.text)])
    return "\n".join([*lines, "consumers:", f"  {known.name}:", indent(keys, "    ")])


def _dedented(text: str) -> str:
    return "\n".join(line.removeprefix("  ") for line in text.splitlines())


def _row(known: Preset) -> dict[str, str]:
    loaded, unloaded, seen = presets.ways(known)
    values = known.name, known.verified, loaded, unloaded, seen, known.title
    return {head.replace(" ", "_"): value for head, value in zip(HEAD, values, strict=True)}

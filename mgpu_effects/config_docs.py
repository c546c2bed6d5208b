"""docs/configuration.md, from the classes of `settings`.

`python -m mgpu_effects.config_docs` writes it to standard output.
"""

import json
import sys
from collections.abc import Iterator
from typing import get_args

from attrs import NOTHING, has

from mgpu_effects.schema import default_of
from mgpu_effects.settings import Settings
from mgpu_effects.shapes import Hint, Key, alternatives, describe, keys_of, unwrap

INTRODUCTION = """\
# Configuration

<!-- Made by `python -m mgpu_effects.config_docs`: change mgpu_effects/settings.py instead. -->

One YAML file, by default `config/consumers.yaml`; `config/examples/` has one for each common
situation. `mgpu check` shows everything that is wrong with a file at once, with line and column.

- `${env:NAME}` in a text is replaced by that variable of the environment; it must be set. This is
  the place for secrets: errors show what stands in the file, never what came from the environment.
- `preset: NAME` in a consumer stands for the keys of a known service: [presets.md](presets.md).
- Anchors, aliases and `<<` work as in any YAML file. `config/consumers.schema.json` is a JSON
  Schema of the file: with `# yaml-language-server: $schema=...` in its first line, editors complete
  and check while you type.
- Text that looks like a number or a truth value needs quotes: `"5000"`.
"""


def markdown() -> str:
    """Give the documentation of the whole file, ending in a line break."""
    return INTRODUCTION + "".join(_section(cls) for cls in _classes(Settings))


def _classes(cls: type) -> list[type]:
    """Give the class and all that its keys lead to, each once, in the order of reading."""
    found = [cls]
    for at in found:  # grows while it is walked
        for key in keys_of(at).values():
            found += [part for part in _classes_in(key.hint) if part not in found]
    return found


def _classes_in(hint: Hint) -> Iterator[type]:
    base, _ = unwrap(hint)
    if has(base):
        yield base
        return
    for part in alternatives(base) if len(alternatives(base)) > 1 else get_args(base):
        yield from _classes_in(part)


def _section(cls: type) -> str:
    rows = "".join(_row(cls, key) for key in keys_of(cls).values())
    title = f"{cls.__name__}\n\n{cls.__doc__}"
    return f"\n## {title}\n\n| key | may be | default | meaning |\n|---|---|---|---|\n{rows}"


def _row(cls: type, key: Key) -> str:
    links = "".join(
        f", see [{part.__name__}](#{part.__name__.lower()})" for part in _classes_in(key.hint)
    )
    allowed = f"{describe(key.hint)}{links}"
    default = default_of(cls, key)
    shown = "" if default is NOTHING else f"`{json.dumps(default)}`"
    cells = (f"`{key.name}`", allowed, "*required*" if key.required else shown, key.doc)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())

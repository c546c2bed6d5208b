"""docs/presets.md, from the files of `presets`.

`python -m mgpu_effects.preset_docs` writes it to standard output.
"""

import sys
from collections.abc import Iterator, Sequence

from mgpu_effects import presets
from mgpu_effects.presets import Preset

INTRODUCTION = """\
# Presets

<!-- Made by `python -m mgpu_effects.preset_docs`: change mgpu_effects/presets/ instead. -->

For a known service `preset: NAME` stands for the keys that are the same wherever it runs: where its
health is, how it is loaded and unloaded, how to see that it is loaded or at work, when its work is
over. What differs from host to host stands beside it: its address, its memory, who starts it.

```yaml
consumers:
  comfyui:
    url: http://127.0.0.1:8188
    preset: comfyui
    vram_resident_mib: 13000
```

A key that is given beside the preset wins, as a whole: an `unload` replaces the preset's, with all
of its steps. `mgpu presets` lists them, `mgpu presets show NAME` gives the keys of one to copy,
with what the service needs and what it is known to do. Most presets leave `vram_resident_mib` to
you: without it, nothing is evicted for the service.
"""


def markdown() -> str:
    """Give the page, ending in a line break."""
    every = [presets.preset(name) for name in presets.names()]
    return "".join([INTRODUCTION, *_verified(), *_table(every), *map(_section, every)])


def _verified() -> Iterator[str]:
    yield "\nHow far the keys of each were tested:\n\n"
    yield from (f"- **{word}**: {meaning}\n" for word, meaning in presets.VERIFIED.items())


def _table(every: Sequence[Preset]) -> Iterator[str]:
    yield "\n| preset | verified | loaded by | unloaded by | seen by |\n|---|---|---|---|---|\n"
    for known in every:
        cells = f"[{known.name}](#{known.name})", known.verified, *map(_cell, presets.ways(known))
        yield f"| {' | '.join(cells)} |\n"


def _cell(way: str) -> str:
    return f"`{way}`" if "/" in way else way


def _section(known: Preset) -> str:
    beside = [f"Beside it `{key}: {example}`." for key, example in known.requires.items()]
    lists = [("It needs", [*beside, *known.needs]), ("Known of it", known.traps)]
    texts = [f"\n{title}:\n\n" + "".join(f"- {each}\n" for each in items) for title, items in lists]
    return f"\n## {known.name}\n\n{known.title}; by default at {known.url}.\n{''.join(texts)}"


if __name__ == "__main__":
    sys.stdout.write(markdown())

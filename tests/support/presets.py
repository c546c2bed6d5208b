"""Presets as a configuration has them."""

from collections.abc import Mapping
from typing import Any

from mgpu_effects import presets
from mgpu_effects.reading import Reader
from mgpu_effects.settings import ConsumerSettings, Settings


def configuration(name: str, beside: Mapping[str, str] | None = None) -> str:
    """Give a file with one consumer, `a`, that has the preset and what it needs beside it."""
    known = presets.preset(name)
    keys = {"url": known.url, "preset": name}
    keys |= {**known.requires, **(beside or {})}
    return "consumers:\n  a:\n" + "".join(f"    {key}: {keys[key]}\n" for key in keys)


def consumer(name: str) -> ConsumerSettings:
    """Give the settings of a consumer that says nothing but its preset, as far as may be."""
    reader = Reader(name, {})
    settings: Any = reader.read(configuration(name), Settings)
    assert reader.errors == []
    read: ConsumerSettings = settings.consumers["a"]
    return read

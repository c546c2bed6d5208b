"""Shipped keys for known services: `preset: NAME` in a consumer. Each has a file beside this one.

A file has what the service needs to run with, its traps, how far its keys were tried out, how it is
told from others (`discovery`, for `mgpu init`), and at its end the keys themselves.
"""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal

from attrs import field, frozen
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode

SUFFIX = ".yaml"
KEYS = "consumer"
VERIFIED = {
    "real": "the broker was run in front of the real server",
    "recorded": "by what a real server was recorded to answer",
    "documented": "by what its documentation or its source says; no server was seen",
}


@frozen(kw_only=True)
class Ask:
    """What to ask a service, by GET, and what of its JSON is wanted, in JMESPath."""

    path: str
    value: str


@frozen(kw_only=True)
class Discovery:
    """How a service is told from all others, by requests that neither load nor wake anything.

    `when` is JMESPath over `{status, headers, body}` of the answer at `path`: names of headers in
    small letters, the body as JSON, or as text where it is none.
    """

    path: str
    when: str
    # Its answer says nothing of it: whom no other knows, at its own port, is taken for it.
    guess: bool = False
    ports: tuple[int, ...] = ()  # where it is often found, beside that of `url`
    version: Ask | None = None
    models: Ask | None = None  # as a list of {id, bytes}, the bytes of its weights if it tells
    front: bool = False  # it has a page or clients that need a port of its own
    audio: bool = False  # its answers refer to sound files under /audio/


@frozen(kw_only=True)
class Preset:
    """What is known of a service, and how far.

    `verified` says against what its keys were tested: a word of `VERIFIED`.
    """

    name: str
    title: str
    verified: Literal["real", "recorded", "documented"]
    url: str  # where the service is by default
    needs: tuple[str, ...]
    traps: tuple[str, ...]
    # What must stand beside the preset: the key, and its value as an example.
    requires: Mapping[str, str] = field(factory=dict)
    discovery: Discovery | None = None  # None: another preset stands for the same service
    consumer: Mapping[str, Any]
    text: str  # of its keys, as the file has them, comments and all


@cache
def names() -> tuple[str, ...]:
    """Give the names of all presets, in the order of the alphabet."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(f.name.removesuffix(SUFFIX) for f in files if f.name.endswith(SUFFIX)))


@cache
def preset(name: str) -> Preset:
    """Give one of `names`."""
    known: dict[str, Any] = YAML(typ="safe", pure=True).load(_text(name))
    known |= {key: tuple(known[key]) for key in ("needs", "traps")}
    if "discovery" in known:
        known["discovery"] = _discovery(known["discovery"])
    _, _, keys = _text(name).partition(f"\n{KEYS}:\n")
    return Preset(name=name, text=keys, **known)


def ways(known: Preset) -> tuple[str, str, str]:
    """Say in a word each how it is loaded, how it is unloaded and how that is seen."""
    keys = known.consumer
    if keys.get("vram_managed"):
        return "itself", "itself", "nobody"
    lazy = "the next request" if "unload" in keys else "its driver"
    load = "your own load" if "load" in known.requires else lazy
    asked = keys.get("residency")
    assumed = "what the broker did" if "unload" in keys else "whether it runs"
    return (
        _route(keys["load"]) if "load" in keys else load,
        _route(keys["unload"]) if "unload" in keys else "its driver",
        f"GET {asked['path']}" if asked else assumed,
    )


def _discovery(told: dict[str, Any]) -> Discovery:
    asks: dict[str, Any] = {key: Ask(**told[key]) for key in ("version", "models") if key in told}
    return Discovery(**{**told, **asks, "ports": tuple(told.get("ports", ()))})


def _route(step: Mapping[str, Any]) -> str:
    return f"{step.get('method', 'POST')} {step['path']}"


def keys_node(name: str) -> MappingNode | None:
    """Give the keys as YAML nodes of the caller's own, None where there is no such preset."""
    if name not in names():
        return None
    root = YAML(typ="safe", pure=True).compose(_text(name))
    node: MappingNode = next(value for key, value in root.value if key.value == KEYS)
    return node


def _text(name: str) -> str:
    return (resources.files(__name__) / f"{name}{SUFFIX}").read_text(encoding="utf-8")

"""The vocabulary in which the classes of the configuration say what a value may be.

A class of `settings` is all there is to know about its keys: the type hint of a field says what
may stand there, what is put beside the hint by `Annotated` narrows it (`Between`, `OneOf`, ...) or
gives a shorter way to write it (`OneOrMany`, `Word`, ...), the metadata say what it means. The
reader of the file, the JSON Schema and the documentation go by this module alone.
"""

import difflib
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import (
    Annotated,
    Any,
    Literal,
    Protocol,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from attrs import NOTHING, Attribute, fields, frozen, has
from ruamel.yaml.nodes import MappingNode

# A type hint. There is no type for it in the standard library.
Hint: TypeAlias = Any
Schema: TypeAlias = dict[str, Any]

# ---------------------------------------------------------------------------------- constraints


@runtime_checkable
class Constraint(Protocol):
    """Narrows what the type beside it allows."""

    def accepts(self, value: Any) -> bool:
        """Say whether a value of the type is allowed."""

    def describe(self, base: str) -> str:
        """Say what is allowed, where `base` describes the type."""

    @property
    def schema(self) -> Schema:
        """The same in JSON Schema's keywords."""


@runtime_checkable
class Explaining(Constraint, Protocol):
    """A constraint that knows more than that a value is not allowed."""

    def problem(self, text: str) -> str:
        """Say what is wrong with the text; empty: nothing."""


@frozen
class Between:
    """A finite number, both ends included."""

    low: float
    high: float | None = None

    def accepts(self, value: float) -> bool:
        high = math.inf if self.high is None else self.high
        return math.isfinite(value) and self.low <= value <= high

    def describe(self, base: str) -> str:
        return f"{base} from {self.low}" + ("" if self.high is None else f" to {self.high}")

    @property
    def schema(self) -> Schema:
        return {"minimum": self.low} | ({} if self.high is None else {"maximum": self.high})


@frozen
class OneOf:
    words: tuple[str, ...]

    def accepts(self, value: str) -> bool:
        return value in self.words

    def describe(self, base: str) -> str:
        return listed(self.words)

    @property
    def schema(self) -> Schema:
        return {"enum": list(self.words)}

    def problem(self, text: str) -> str:
        return did_you_mean(text, self.words)


@frozen
class Matching:
    """Text that the pattern matches from first to last; `allowed` says so in words."""

    pattern: str
    allowed: str

    def accepts(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def describe(self, base: str) -> str:
        return self.allowed

    @property
    def schema(self) -> Schema:
        return {"pattern": f"^(?:{self.pattern})$"}


@frozen
class NotEmpty:
    def accepts(self, value: Any) -> bool:
        return len(value) > 0

    def describe(self, base: str) -> str:
        return f"{base} that is not empty"

    @property
    def schema(self) -> Schema:
        return {"minItems": 1, "minProperties": 1}


@frozen
class ExactlyOneKey:
    def accepts(self, value: Any) -> bool:
        given = [getattr(value, attribute.name) for attribute in fields(type(value))]
        return sum(one is not None for one in given) == 1

    def describe(self, base: str) -> str:
        return f"{base} with exactly one of its keys"

    @property
    def schema(self) -> Schema:
        return {"minProperties": 1, "maxProperties": 1}


# --------------------------------------------------------------------------------------- forms


@frozen
class OneOrMany:
    """One element may be written without the list around it."""


@frozen
class Singular:
    """One element may be written under a `key` of its own instead of the list."""

    key: str


@frozen
class ShellWords:
    """A list of words may be written as one line, quoted as for a shell."""


@frozen
class Word:
    """A single word that stands for a whole `value`."""

    word: str
    value: object


@frozen
class Stands:
    """A word that stands for further keys of the mapping it is in, where those are not given.

    `keys` gives them as nodes that the reader may change, None for a word that is not known.
    """

    keys: Callable[[str], MappingNode | None]


# The ways to write a value shorter than in full.
Form: TypeAlias = OneOrMany | ShellWords | Word


# ------------------------------------------------------------------------- what a hint consists of


def origin(hint: Hint) -> Any:
    """Give what `typing.get_origin` does, without its promises about the types of hints."""
    return get_origin(hint)


def unwrap(hint: Hint) -> tuple[Hint, tuple[Any, ...]]:
    """Give the plain hint and what `Annotated` puts beside it."""
    if origin(hint) is Annotated:
        base, *extras = get_args(hint)
        return base, tuple(extras)
    return hint, ()


def alternatives(hint: Hint) -> tuple[Hint, ...]:
    """Give the members of a union, any other hint as its only one."""
    return get_args(hint) if origin(hint) in {Union, types.UnionType} else (hint,)


def is_list(hint: Hint) -> bool:
    return origin(unwrap(hint)[0]) is tuple


def element(hint: Hint) -> Hint:
    """Give the X of `tuple[X, ...]`."""
    return get_args(unwrap(hint)[0])[0]


def is_mapping(hint: Hint) -> bool:
    return origin(unwrap(hint)[0]) is Mapping


@frozen
class Key:
    """One key that a mapping may have: where its value goes, and what may stand there."""

    name: str
    field: str
    hint: Hint
    doc: str
    required: bool = False
    singular: bool = False  # it gives the only element of the field's list


def doc(text: str) -> dict[str, object]:
    """Make the metadata of a field: what its key means."""
    return {"doc": text}


# The field takes the name under which its object stands in the mapping around it.
NAMED = {"named": True}
# The field is set by the program: nothing in the file says it.
UNWRITTEN = {"unwritten": True}


def name_field(cls: type) -> str | None:
    """Give the field that takes the object's name, None where it has no name."""
    return next((f.name for f in fields(cls) if f.metadata.get("named")), None)


@cache
def keys_of(cls: type) -> Mapping[str, Key]:
    """Give the keys of the mapping that `cls` is written as, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    keys: dict[str, Key] = {}
    for attribute in fields(cls):
        if attribute.init and not attribute.metadata.keys() & {"named", "unwritten"}:
            for key in _keys_of_field(attribute, hints[attribute.name]):
                keys[key.name] = key
    return keys


def _keys_of_field(attribute: "Attribute[Any]", hint: Hint) -> list[Key]:
    name, text = attribute.name, attribute.metadata.get("doc", "")
    required = attribute.default is NOTHING
    keys = [Key(name, name, hint, text, required=required)]
    for extra in unwrap(hint)[1]:
        if isinstance(extra, Singular):
            short = f"the same as `{name}` with one element"
            keys.append(Key(extra.key, name, element(hint), short, singular=True))
    return keys


# -------------------------------------------------------------------------------------- in words

WORDS: Mapping[Hint, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    object: "anything",
}


def listed(words: tuple[str, ...], last: str = "or") -> str:
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Give a question about the word that is most like it; empty: there is none."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


def describe(hint: Hint) -> str:
    """Say in words what may stand there."""
    base, extras = unwrap(hint)
    short = next((extra for extra in extras if isinstance(extra, Form)), None)
    text = "a list of such" if isinstance(short, OneOrMany) else _describe_base(base)
    for extra in extras:
        if isinstance(extra, Constraint):
            text = extra.describe(text)
    if isinstance(short, OneOrMany):
        return f"{describe(element(hint))}, or {text}"
    if isinstance(short, Word):
        return f"{short.word}, or {text}"
    if isinstance(short, ShellWords):
        return f"{text}, or one line of words"
    return text


def _describe_base(hint: Hint) -> str:
    members = alternatives(hint)
    if len(members) > 1:
        return listed(tuple(describe(member) for member in members))
    if hint in WORDS:
        return WORDS[hint]
    if origin(hint) is Literal:
        return listed(get_args(hint))
    if is_list(hint):
        return f"a list ({describe(element(hint))})"
    if is_mapping(hint):
        key, value = get_args(hint)
        return f"a mapping ({describe(key)}: {describe(value)})"
    assert has(hint), hint
    return "a mapping"

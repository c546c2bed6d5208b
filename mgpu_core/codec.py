"""JSON in and out for everything that a log holds, derived from the classes themselves.

Encoding gives plain dicts, lists, strings, integers, booleans and None, keys in the order of the
fields. Decoding checks every type and says where it found what: `CodecError`.
"""

import types
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from typing import (
    Any,
    Literal,
    TypeAlias,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from attrs import NOTHING, fields, has

from mgpu_core import effects, events
from mgpu_core.config import Config
from mgpu_core.effects import Effect
from mgpu_core.events import Event
from mgpu_core.notes import Note
from mgpu_core.state import State
from mgpu_core.upcast import SHAPES, UnknownVersionError, shape, stamp

Json: TypeAlias = Any
T = TypeVar("T")

EVENTS: Mapping[str, Any] = {cls.__name__: cls for cls in get_args(events.Event)}
EFFECTS: Mapping[str, Any] = {cls.__name__: cls for cls in get_args(effects.Effect)}


class CodecError(ValueError):
    """Not the shape that the contract gives; the message says where and what was expected."""

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(message)
        self.where = where

    def within(self, where: str) -> "CodecError":
        """Say in what it was found, from the inside out: only who fails pays for the place."""
        self.where = where + self.where
        return self

    def __str__(self) -> str:
        return f"{self.where}: {self.args[0]}"


def encode_event(event: Event) -> dict[str, Json]:
    """Give the event without its `at`, which stands beside it in a log line."""
    kind: Any = type(event)
    return stamp(_class_encoder(kind, kind.__name__)(event))


def encode_effect(effect: Effect) -> dict[str, Json]:
    kind: Any = type(effect)
    return stamp(_class_encoder(kind, kind.__name__)(effect))


def encode_note(note: Note) -> Mapping[str, Json]:
    """Give the note as it is: it holds what JSON knows, tuples among it."""
    return note.told


def encode_config(config: Config) -> dict[str, Json]:
    return _class_encoder(Config)(config)


def encode_state(state: State) -> dict[str, Json]:
    return _class_encoder(State)(state)


def decode_event(data: Mapping[str, Json], at: int) -> Event:
    return cast("Event", _decode_tagged(EVENTS, data, "event", at=at))


def decode_effect(data: Mapping[str, Json]) -> Effect:
    return cast("Effect", _decode_tagged(EFFECTS, data, "effect"))


def decode_note(data: Mapping[str, Json]) -> Note:
    return Note({key: _frozen(value) for key, value in data.items()})


def decode_config(data: Mapping[str, Json]) -> Config:
    return cast("Config", _decode_whole(Config, data, "config"))


def decode_state(data: Mapping[str, Json]) -> State:
    return cast("State", _decode_whole(State, data, "state"))


# ------------------------------------------------------------------------------------ encoding


_PLAIN = frozenset({str, int, bool, types.NoneType})


def _encode(value: object) -> Json:
    kind: Any = type(value)
    return value if kind in _PLAIN else _encoder(kind)(value)


@cache
def _encoder(kind: Any) -> Callable[[Any], Json]:
    """Choose how values of that class are encoded, once."""
    if issubclass(kind, Enum):
        return lambda value: value.value
    if issubclass(kind, tuple):
        return lambda value: [item if type(item) in _PLAIN else _encode(item) for item in value]
    if issubclass(kind, Mapping):
        return lambda value: {str(key): _encode(item) for key, item in value.items()}
    return _class_encoder(kind)


@cache
def _class_encoder(cls: Any, tag: str | None = None) -> Callable[[Any], dict[str, Json]]:
    """Make the function that encodes the fields of a class; with a tag: after that as its type, and
    without `at`.
    """
    hints = get_type_hints(cls)
    given = [attribute.name for attribute in fields(cls) if attribute.init]
    names = [name for name in given if tag is None or name != "at"]
    odd = [name for name in names if not _is_plain(hints[name])]

    def encode(value: Any) -> dict[str, Json]:
        encoded: dict[str, Json] = {} if tag is None else {"type": tag}
        for name in names:
            encoded[name] = getattr(value, name)
        for name in odd:
            encoded[name] = _encode(encoded[name])
        return encoded

    return encode


def _is_plain(hint: Any) -> bool:
    """Say whether JSON has all values of this type as they are."""
    if get_origin(hint) in {Union, types.UnionType}:
        return all(_is_plain(one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return all(type(one) in _PLAIN for one in get_args(hint))
    return hint in _PLAIN


def _frozen(value: Json) -> Json:
    return tuple(value) if isinstance(value, list) else value


# ------------------------------------------------------------------------------------ decoding

Decoder: TypeAlias = Callable[[Json], object]


def _decode_tagged(
    classes: Mapping[str, Any], data: Mapping[str, Json], where: str, **more: Json
) -> object:
    if not isinstance(data, dict):
        raise CodecError(f"expected an object, got {type(data).__name__}", where)
    tag = data.get("type")
    if not isinstance(tag, str) or tag not in classes:
        known = ", ".join(sorted(classes))
        raise CodecError(f"{tag!r} is none of {known}", f"{where}.type")
    if "version" in data or tag in SHAPES:
        try:
            data = shape(data)
        except UnknownVersionError as error:
            raise CodecError(str(error), where) from error
    rest = {**data, **more}
    del rest["type"]
    return _decode_whole(classes[tag], rest, tag)


def _decode_whole(hint: Any, data: Json, where: str) -> object:
    try:
        return _decoder(hint)(data)
    except CodecError as error:
        raise error.within(where) from None


@cache
def _decoder(hint: Any) -> Decoder:
    """Make the function that turns JSON into `hint`, from the hint alone."""
    if has(hint):
        return _class_decoder(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        return _union_decoder(arguments, str(hint))
    if origin is Literal:
        return _choice_decoder({choice: choice for choice in arguments})
    if origin is tuple:
        return _tuple_decoder(_decoder(arguments[0]))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping_decoder(arguments[0], _decoder(arguments[1]))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _choice_decoder({member.value: member for member in hint})
    return _plain_decoder(hint)


def _plain_kinds(hint: Any) -> frozenset[Any]:
    """Give the types whose values stand for themselves where `hint` is expected."""
    union = get_origin(hint) in {Union, types.UnionType}
    return _PLAIN.intersection(get_args(hint) if union else (hint,))


def _class_decoder(cls: Any) -> Decoder:
    hints = get_type_hints(cls)
    given = [attribute for attribute in fields(cls) if attribute.init]
    decoders = {attribute.name: _decoder(hints[attribute.name]) for attribute in given}
    plain = {attribute.name: _plain_kinds(hints[attribute.name]) for attribute in given}
    required = {attribute.name for attribute in given if attribute.default is NOTHING}

    def decode(data: Json) -> object:
        if not isinstance(data, dict):
            raise CodecError(f"expected an object, got {type(data).__name__}")
        if data.keys() != decoders.keys():
            if unknown := sorted(data.keys() - decoders.keys()):
                raise CodecError(f"unknown field {unknown[0]!r}")
            if missing := sorted(required - data.keys()):
                raise CodecError(f"field {missing[0]!r} is missing")
        decoded = data
        key = ""
        try:
            for key, value in data.items():
                if type(value) not in plain[key]:
                    if decoded is data:
                        decoded = data.copy()
                    decoded[key] = decoders[key](value)
        except CodecError as error:
            raise error.within(f".{key}") from None
        return cls(**decoded)

    return decode


def _union_decoder(arguments: tuple[Any, ...], expected: str) -> Decoder:
    decoders = [_decoder(argument) for argument in arguments]
    optional = types.NoneType in arguments

    def decode(data: Json) -> object:
        if data is None and optional:
            return None
        for decoder in decoders:
            try:
                return decoder(data)
            except CodecError as error:
                # The error of the member that nearly fitted says more than "none of them".
                if error.where:
                    raise
        raise CodecError(f"expected {expected}, got {data!r}")

    return decode


def _choice_decoder(choices: Mapping[str, object]) -> Decoder:
    def decode(data: Json) -> object:
        if not isinstance(data, str) or data not in choices:
            raise CodecError(f"expected one of {', '.join(choices)}, got {data!r}")
        return choices[data]

    return decode


def _tuple_decoder(item: Decoder) -> Decoder:
    def decode(data: Json) -> object:
        if not isinstance(data, list):
            raise CodecError(f"expected a list, got {data!r}")
        decoded = []
        try:
            for value in data:
                decoded.append(item(value))  # noqa: PERF401 - its length tells which one failed
        except CodecError as error:
            raise error.within(f"[{len(decoded)}]") from None
        return tuple(decoded)

    return decode


def _mapping_decoder(key: type, item: Decoder) -> Decoder:
    def decode(data: Json) -> object:
        if not isinstance(data, dict):
            raise CodecError(f"expected an object, got {data!r}")
        decoded = {}
        name = ""
        try:
            for name, value in data.items():
                decoded[key(name)] = item(value)
        except CodecError as error:
            raise error.within(f".{name}") from None
        except ValueError as error:
            raise CodecError(f"keys are {key.__name__}s") from error
        return decoded

    return decode


def _plain_decoder(kind: type) -> Decoder:
    def decode(data: Json) -> object:
        if type(data) is not kind and not (kind is type(None) and data is None):
            raise CodecError(f"expected {kind.__name__}, got {data!r}")
        return data

    return decode

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

Json: TypeAlias = Any
T = TypeVar("T")

EVENTS: Mapping[str, Any] = {cls.__name__: cls for cls in get_args(events.Event)}
EFFECTS: Mapping[str, Any] = {cls.__name__: cls for cls in get_args(effects.Effect)}


class CodecError(ValueError):
    """Not the shape that the contract gives; the message says where and what was expected."""


def encode_event(event: Event) -> dict[str, Json]:
    """Give the event without its `at`, which stands beside it in a log line."""
    encoded: dict[str, Json] = {"type": type(event).__name__}
    cls: Any = type(event)
    for name in _names(cls):
        if name != "at":
            encoded[name] = _encode(getattr(event, name))
    return encoded


def encode_effect(effect: Effect) -> dict[str, Json]:
    return {"type": type(effect).__name__, **_encode_fields(effect)}


def encode_note(note: Note) -> dict[str, Json]:
    """Give the note flat: its details stand beside its type."""
    encoded: dict[str, Json] = {"type": note.type}
    if note.request is not None:
        encoded["request"] = note.request
    if note.consumer is not None:
        encoded["consumer"] = note.consumer
    for key, value in note.details.items():
        encoded[key] = _encode(value)
    return encoded


def encode_config(config: Config) -> dict[str, Json]:
    return _encode_fields(config)


def encode_state(state: State) -> dict[str, Json]:
    return _encode_fields(state)


def decode_event(data: Mapping[str, Json], at: int) -> Event:
    return cast("Event", _decode_tagged(EVENTS, {**data, "at": at}, "event"))


def decode_effect(data: Mapping[str, Json]) -> Effect:
    return cast("Effect", _decode_tagged(EFFECTS, data, "effect"))


def decode_note(data: Mapping[str, Json]) -> Note:
    rest = {key: _frozen(value) for key, value in data.items()}
    return Note(
        type=rest.pop("type"),
        request=rest.pop("request", None),
        consumer=rest.pop("consumer", None),
        details=rest,
    )


def decode_config(data: Mapping[str, Json]) -> Config:
    return cast("Config", _decoder(Config)(data, "config"))


def decode_state(data: Mapping[str, Json]) -> State:
    return cast("State", _decoder(State)(data, "state"))


# ------------------------------------------------------------------------------------ encoding


@cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(attribute.name for attribute in fields(cls) if attribute.init)


def _encode_fields(value: object) -> dict[str, Json]:
    cls: Any = type(value)
    return {name: _encode(getattr(value, name)) for name in _names(cls)}


def _encode(value: object) -> Json:
    kind = type(value)
    if kind is str or kind is int or value is None or kind is bool:
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    return _encode_fields(value)


def _frozen(value: Json) -> Json:
    return tuple(value) if isinstance(value, list) else value


# ------------------------------------------------------------------------------------ decoding

Decoder: TypeAlias = Callable[[Json, str], object]


def _decode_tagged(classes: Mapping[str, Any], data: Mapping[str, Json], where: str) -> object:
    if not isinstance(data, Mapping):
        raise CodecError(f"{where}: expected an object, got {type(data).__name__}")
    tag = data.get("type")
    if not isinstance(tag, str) or tag not in classes:
        raise CodecError(f"{where}.type: {tag!r} is none of {', '.join(sorted(classes))}")
    rest = {key: value for key, value in data.items() if key != "type"}
    decode: Decoder = _decoder(classes[tag])
    return decode(rest, tag)


@cache
def _decoder(hint: Any) -> Decoder:
    """Make the function that turns JSON into `hint`, from the hint alone."""
    if has(hint):
        return _class_decoder(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        return _union_decoder(tuple(_decoder(argument) for argument in arguments), str(hint))
    if origin is Literal:
        return _choice_decoder({choice: choice for choice in arguments})
    if origin is tuple:
        return _tuple_decoder(_decoder(arguments[0]))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping_decoder(arguments[0], _decoder(arguments[1]))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _choice_decoder({member.value: member for member in hint})
    return _plain_decoder(hint)


def _class_decoder(cls: Any) -> Decoder:
    hints = get_type_hints(cls)
    given = [attribute for attribute in fields(cls) if attribute.init]
    decoders = {attribute.name: _decoder(hints[attribute.name]) for attribute in given}
    required = {attribute.name for attribute in given if attribute.default is NOTHING}

    def decode(data: Json, where: str) -> object:
        if not isinstance(data, Mapping):
            raise CodecError(f"{where}: expected an object, got {type(data).__name__}")
        if unknown := sorted(set(data) - set(decoders)):
            raise CodecError(f"{where}: unknown field {unknown[0]!r}")
        if missing := sorted(required - set(data)):
            raise CodecError(f"{where}: field {missing[0]!r} is missing")
        return cls(**{key: decoders[key](value, f"{where}.{key}") for key, value in data.items()})

    return decode


def _union_decoder(decoders: tuple[Decoder, ...], expected: str) -> Decoder:
    def decode(data: Json, where: str) -> object:
        for decoder in decoders:
            try:
                return decoder(data, where)
            except CodecError as error:
                # The error of the member that nearly fitted says more than "none of them".
                if not str(error).startswith(f"{where}:"):
                    raise
        raise CodecError(f"{where}: expected {expected}, got {data!r}")

    return decode


def _choice_decoder(choices: Mapping[str, object]) -> Decoder:
    def decode(data: Json, where: str) -> object:
        if not isinstance(data, str) or data not in choices:
            raise CodecError(f"{where}: expected one of {', '.join(choices)}, got {data!r}")
        return choices[data]

    return decode


def _tuple_decoder(item: Decoder) -> Decoder:
    def decode(data: Json, where: str) -> object:
        if not isinstance(data, list):
            raise CodecError(f"{where}: expected a list, got {data!r}")
        return tuple(item(value, f"{where}[{index}]") for index, value in enumerate(data))

    return decode


def _mapping_decoder(key: type, item: Decoder) -> Decoder:
    def decode(data: Json, where: str) -> object:
        if not isinstance(data, Mapping):
            raise CodecError(f"{where}: expected an object, got {data!r}")
        try:
            return {key(name): item(value, f"{where}.{name}") for name, value in data.items()}
        except ValueError as error:
            if isinstance(error, CodecError):
                raise
            raise CodecError(f"{where}: keys are {key.__name__}s") from error

    return decode


def _plain_decoder(kind: type) -> Decoder:
    def decode(data: Json, where: str) -> object:
        if type(data) is not kind and not (kind is type(None) and data is None):
            raise CodecError(f"{where}: expected {kind.__name__}, got {data!r}")
        return data

    return decode

"""What logs of earlier versions call things, brought up to date when it is read.

A log is kept for years, so a shape that it holds is never simply changed. Who changes the fields
of an event or an effect adds a function to `SHAPES` that makes the new shape of the old one; from
then on it is written as `{"type": NAME, "version": 2, ...}`, and what has no version is version 1.
Who changes the configuration or the state as a header holds them adds a function to `FORMATS`,
and with it the number of the format rises. Neither table ever loses an entry, and a log from before
the change goes into `tests/golden/`.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Json: TypeAlias = Mapping[str, Any]
Upcaster: TypeAlias = Callable[[Json], Json]

# By the name of an event or effect: from version 1 to 2, from 2 to 3, ...
SHAPES: dict[str, tuple[Upcaster, ...]] = {}
# Of a whole header: from format 1 to 2, from 2 to 3, ...
FORMATS: list[Upcaster] = []


class UnknownVersionError(ValueError):
    """It was written by a later version of mgpu."""


def shape_version(name: str) -> int:
    """Give the version in which an event or effect of that name is written now."""
    return 1 + len(SHAPES.get(name, ()))


def format_now() -> int:
    """Give the format in which a log is written now."""
    return 1 + len(FORMATS)


def stamp(encoded: dict[str, Any]) -> dict[str, Any]:
    """Add the version to an event or effect that is to be written, where it has one."""
    name = encoded["type"]
    if name not in SHAPES:
        return encoded
    return {"type": name, "version": shape_version(name), **encoded}


def shape(data: Json) -> Json:
    """Give an event or effect that was read in the shape of today, without its version.

    Raises UnknownVersionError.
    """
    name, version = data.get("type"), data.get("version", 1)
    if "version" not in data and name not in SHAPES:
        return data
    steps = SHAPES.get(str(name), ())
    if type(version) is not int or not 1 <= version <= len(steps) + 1:
        raise UnknownVersionError(
            f"{name}: version {version!r} is unknown, it is known up to version {len(steps) + 1}"
        )
    data = {key: value for key, value in data.items() if key != "version"}
    for step in steps[version - 1 :]:
        data = step(data)
    return data


def header(data: Json, number: int) -> Json:
    """Give a header that was read in format `number` as one of today's."""
    for step in FORMATS[number - 1 :]:
        data = step(data)
    return data

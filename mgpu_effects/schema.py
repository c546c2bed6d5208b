"""The JSON Schema of the user's file, for editors, from the classes of `settings`.

`python -m mgpu_effects.schema` writes it to standard output.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

from attrs import NOTHING, fields

from mgpu_effects.settings import Settings
from mgpu_effects.shapes import (
    Constraint,
    Hint,
    Key,
    OneOrMany,
    Schema,
    ShellWords,
    Word,
    alternatives,
    element,
    is_list,
    is_mapping,
    keys_of,
    origin,
    unwrap,
)

TYPES: Mapping[Hint, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    object: {},
}
# Any text may come from the environment: what it is then cannot be seen in the file.
FROM_ENVIRONMENT: Schema = {"type": "string", "pattern": r"\$\{env:[^}]*\}"}
ENVIRONMENT_REF: Schema = {"$ref": "#/$defs/FromEnvironment"}


def json_schema() -> Schema:
    """Give the JSON Schema (2020-12) of the whole file."""
    classes = Classes()
    root = classes.object_schema(Settings)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of mgpu",
        **root,
        "$defs": {"FromEnvironment": FROM_ENVIRONMENT, **dict(sorted(classes.defs.items()))},
    }


class Classes:
    """Turns hints into schemas; `defs` collects those of the classes that it met."""

    def __init__(self) -> None:
        self.defs: dict[str, Schema] = {}

    def schema(self, hint: Hint) -> Schema:
        base, extras = unwrap(hint)
        schema = self._plain(base)
        for extra in extras:
            if isinstance(extra, Constraint):
                schema = _narrowed(schema, extra)
        for extra in extras:
            if isinstance(extra, OneOrMany):
                schema = {"anyOf": [self.schema(element(base)), schema]}
            elif isinstance(extra, ShellWords):
                schema = {"anyOf": [{"type": "string", "pattern": r"\S"}, schema]}
            elif isinstance(extra, Word):
                schema = {"anyOf": [{"const": extra.word}, ENVIRONMENT_REF, schema]}
        return schema

    def _plain(self, base: Hint) -> Schema:
        members = alternatives(base)
        if len(members) > 1:
            return {"anyOf": [self.schema(member) for member in members]}
        if base in TYPES:
            return dict(TYPES[base])
        if origin(base) is Literal:
            return _or_from_environment({"enum": list(get_args(base))})
        if is_list(base):
            return {"type": "array", "items": self.schema(element(base))}
        if is_mapping(base):
            return self._mapping(*get_args(base))
        return self._class(base)

    def _mapping(self, key: Hint, value: Hint) -> Schema:
        plain, extras = unwrap(key)
        # In JSON every key is text, a number as well.
        names = {"pattern": "^[0-9]+$"} if plain is int else {}
        for extra in extras:
            names |= extra.schema if plain is str else {}
        schema: Schema = {"type": "object", "additionalProperties": self.schema(value)}
        return schema | ({"propertyNames": names} if names else {})

    def _class(self, cls: type) -> Schema:
        if cls.__name__ not in self.defs:
            self.defs[cls.__name__] = self.object_schema(cls)
        return {"$ref": f"#/$defs/{cls.__name__}"}

    def object_schema(self, cls: type) -> Schema:
        keys = keys_of(cls).values()
        schema: Schema = {
            "description": cls.__doc__,
            "type": "object",
            "properties": {key.name: self._property(cls, key) for key in keys},
            "additionalProperties": False,
        }
        required = [key.name for key in keys if key.required]
        if required:
            schema["required"] = required
        pairs = [[key.field, key.name] for key in keys if key.singular]
        if pairs:
            schema["allOf"] = [{"not": {"required": pair}} for pair in pairs]
        return schema

    def _property(self, cls: type, key: Key) -> Schema:
        schema = {"description": key.doc, **self.schema(key.hint)}
        default = default_of(cls, key)
        return schema if default is NOTHING else schema | {"default": default}


def _narrowed(schema: Schema, constraint: Constraint) -> Schema:
    narrowed = schema | constraint.schema
    return _or_from_environment(narrowed) if schema.get("type") == "string" else narrowed


def _or_from_environment(schema: Schema) -> Schema:
    return {"anyOf": [schema, ENVIRONMENT_REF]}


def default_of(cls: type, key: Key) -> Any:
    """Give the default as JSON has it; NOTHING where there is none, or it is made from parts."""
    default = next(each.default for each in fields(cls) if each.name == key.field)
    if isinstance(default, tuple):
        return list(default)
    return default if isinstance(default, str | int | float | None) else NOTHING


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")

"""YAML into typed classes, by their type hints, with the place of everything that is wrong.

The reader knows no key of the configuration: `shapes` says what a hint allows. It goes on after
an error, so that one run shows all of them, and leaves out what it could not read.
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

from attrs import frozen, has
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StringMark, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mgpu_effects.shapes import (
    Constraint,
    Explaining,
    Hint,
    Key,
    OneOrMany,
    ShellWords,
    Stands,
    Word,
    alternatives,
    describe,
    did_you_mean,
    element,
    is_list,
    is_mapping,
    keys_of,
    listed,
    name_field,
    origin,
    unwrap,
)

T = TypeVar("T")
Path: TypeAlias = tuple[str | int, ...]
Pairs: TypeAlias = list[tuple[Node, Node]]
Entries: TypeAlias = list[tuple[ScalarNode, Node]]

MERGE = "tag:yaml.org,2002:merge"
VARIABLE = re.compile(r"\$\{env:([^}]*)\}")
SHOWN_CHARACTERS = 40
KINDS_OF_SCALAR = {
    "tag:yaml.org,2002:int": "the number {}",
    "tag:yaml.org,2002:float": "the number {}",
    "tag:yaml.org,2002:bool": "{} without quotes",
    "tag:yaml.org,2002:null": "{} without quotes",
    "tag:yaml.org,2002:timestamp": "the date {}",
}
# Stands for what could not be read; an error about it has been noted.
INVALID: Any = object()


@frozen(order=True)
class ConfigError:
    """One thing that is wrong. `line` and `column` count from 1, `key` is dotted."""

    file: str
    line: int
    column: int
    key: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}"
        return f"{where}: {self.key}: {self.message}" if self.key else f"{where}: {self.message}"


def dotted(path: Path) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


class Reader:
    """Reads one file. After `read`, `errors` holds all that was wrong."""

    def __init__(self, file: str, environ: Mapping[str, str]) -> None:
        self.errors: list[ConfigError] = []
        self._file = file
        self._environ = environ
        self._places: dict[Path, StringMark] = {}
        self._faulty: set[Path] = set()
        self._open: list[Node] = []  # the mappings and lists around what is being read
        self._yaml = YAML(typ="safe", pure=True)

    def read(self, text: str, cls: type[T]) -> T | None:
        """Read the text as `cls`; None where not even parts of it can be read.

        After errors, what could not be read has its default, or is empty where it has none.
        """
        try:
            node = self._yaml.compose(text)
        except MarkedYAMLError as error:
            problem = " ".join(filter(None, [error.problem, error.context]))
            self.note((), f"this is no YAML: {problem}", error.problem_mark or error.context_mark)
            return None
        except (YAMLError, RecursionError) as error:
            self.note((), f"this is no YAML: {str(error).splitlines()[0]}")
            return None
        if node is None:
            self.note((), "the file is empty")
            return None
        value = self._value(node, cls, ())
        return None if value is INVALID else cast("T", value)

    def sound(self, path: Path) -> bool:
        """Say whether nothing is wrong at `path`, in what it is part of or in its parts."""
        return not any(bad[: len(path)] == path[: len(bad)] for bad in self._faulty)

    def given(self, path: Path) -> bool:
        """Say whether the file has something there."""
        return path in self._places

    def note(self, path: Path, message: str, mark: StringMark | None = None) -> None:
        """Note an error about `path`, at the place of the nearest thing that the file has."""
        if mark is None:
            known = (path[:end] for end in range(len(path), -1, -1) if path[:end] in self._places)
            mark = self._places.get(next(known, ()))
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        error = ConfigError(self._file, line, column, dotted(path), message)
        if error not in self.errors:
            self.errors.append(error)
        self._faulty.add(path)

    # ------------------------------------------------------------------------------- any value

    def _value(self, node: Node, hint: Hint, path: Path) -> Any:
        """Read what the hint allows, or note why not and give INVALID."""
        self._places.setdefault(path, node.start_mark)
        if node in self._open:
            self.note(path, "contains itself")
            return INVALID
        self._open.append(node)
        value = self._read(node, hint, path)
        self._open.pop()
        return value

    def _read(self, node: Node, hint: Hint, path: Path) -> Any:
        before = len(self.errors)
        base, extras = unwrap(hint)
        members = alternatives(base)
        value = self._short_form(node, base, extras, path)
        if value is None and len(members) > 1:
            fitting = (member for member in members if self._fits(node, member, path))
            member = next(fitting, None)
            value = INVALID if member is None else self._read(node, member, path)
        elif value is None:
            value = self._full_form(node, base, path)
        if len(self.errors) == before and not _accepted(value, extras):
            why = _problem(node, extras)
            self.note(path, f"must be {describe(hint)}, not {_shown(node)}{why}")
            return INVALID
        return value

    def _short_form(self, node: Node, base: Hint, extras: tuple[Any, ...], path: Path) -> Any:
        """Read one of the shorter ways to write it; None where it is written in full."""
        scalar = self._scalar(node, path) if isinstance(node, ScalarNode) else None
        for extra in extras:
            if isinstance(extra, OneOrMany) and not isinstance(node, SequenceNode):
                value = self._read(node, element(base), path)
                return value if value is INVALID else (value,)
            if isinstance(extra, Word) and scalar == extra.word:
                return extra.value
            if isinstance(extra, ShellWords) and isinstance(scalar, str):
                return self._shell_words(node.value, path)
        return None

    def _full_form(self, node: Node, base: Hint, path: Path) -> Any:
        """Read what has one type; INVALID, without a note, where the node has another."""
        if not self._fits(node, base, path):
            return INVALID
        if isinstance(node, ScalarNode):
            scalar = self._scalar(node, path)
            return int(scalar) if base is int else scalar
        if isinstance(node, SequenceNode):
            return self._list(node, element(base) if is_list(base) else object, path)
        if has(base):
            return self._object(node, base, path)
        return self._mapping(node, get_args(base) if is_mapping(base) else (str, object), path)

    def _fits(self, node: Node, hint: Hint, path: Path) -> bool:
        """Say whether the node has the hint's type, whatever its parts are."""
        base, _ = unwrap(hint)
        if isinstance(node, ScalarNode):
            return _scalar_fits(self._scalar(node, path), base)
        if isinstance(node, MappingNode):
            return base is object or has(base) or is_mapping(base)
        return base is object or is_list(base)

    # --------------------------------------------------------------------------------- scalars

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        """Give the text, number, truth value or None, with the environment put in."""
        try:
            value = self._yaml.constructor.construct_object(node, deep=True)
        except (YAMLError, ValueError) as error:
            self.note(path, f"this is no YAML: {str(error).splitlines()[0]}")
            return INVALID
        return self._substituted(value, path) if isinstance(value, str) else value

    def _substituted(self, text: str, path: Path) -> Any:
        missing = [name for name in VARIABLE.findall(text) if name not in self._environ]
        for name in missing:
            self.note(path, f"the environment has no variable {name!r}")
        if missing:
            return INVALID
        return VARIABLE.sub(lambda match: self._environ[match[1]], text)

    def _shell_words(self, line: str, path: Path) -> Any:
        """Split first: what comes from the environment must not become a further word."""
        try:
            words = [self._substituted(word, path) for word in shlex.split(line)]
        except ValueError as error:
            self.note(path, f"cannot be split into words: {error}")
            return INVALID
        return INVALID if INVALID in words else tuple(words)

    # -------------------------------------------------------------------------- lists, mappings

    def _list(self, node: Node, hint: Hint, path: Path) -> Any:
        values = [self._value(item, hint, (*path, at)) for at, item in enumerate(node.value)]
        return tuple(value for value in values if value is not INVALID)

    def _mapping(self, node: Node, hints: tuple[Hint, Hint], path: Path) -> Any:
        key_hint, value_hint = hints
        values = {}
        for key_node, value_node in self._entries(node, path):
            where = (*path, key_node.value)
            base, extras = unwrap(key_hint)
            # In JSON, which is YAML as well, every key is text.
            is_number = base is int and re.fullmatch("[0-9]+", key_node.value)
            key = int(key_node.value) if is_number else self._scalar(key_node, where)
            if not (_scalar_fits(key, base) and _accepted(key, extras)):
                problem = f"the key must be {describe(key_hint)}, not {_shown(key_node)}"
                self.note(where, problem, key_node.start_mark)
                continue
            value = self._value(value_node, value_hint, where)
            if value is not INVALID:
                values[key] = value
        return values

    def _object(self, node: Node, cls: type, path: Path) -> Any:
        keys = keys_of(cls)
        named = name_field(cls)
        values: dict[str, Any] = {named: path[-1]} if named else {}
        seen = set()
        entries = self._entries(node, path)
        for key_node, value_node in chain(entries, self._stood_for(entries, keys, path)):
            where = (*path, key_node.value)
            key = keys.get(key_node.value)
            if key is None:
                problem = _unknown(key_node.value, tuple(keys))
                self.note(where, problem, key_node.start_mark)
                continue
            if key.field in seen:
                both = listed(tuple(k.name for k in keys.values() if k.field == key.field), "and")
                self.note(where, f"{both} cannot both be given", key_node.start_mark)
            seen.add(key.field)
            value = self._value(value_node, key.hint, where)
            if value is not INVALID:
                values[key.field] = (value,) if key.singular else value
        for key in keys.values():
            if key.required and key.field not in seen:
                self.note(path, f"{key.name} is missing: {key.doc}")
            if key.required:
                # An error was noted, but what is beside it can still be checked.
                values.setdefault(key.field, "")
        return cls(**values)

    def _stood_for(
        self, entries: Entries, keys: Mapping[str, Key], path: Path
    ) -> Iterator[tuple[ScalarNode, Node]]:
        """Give the entries that one of these stands for, but those that are given beside it.

        To be asked when these have been read: what is wrong with one of them is noted by then.
        """
        for key_node, value_node in entries:
            extras = unwrap(keys[key_node.value].hint)[1] if key_node.value in keys else ()
            stands = next((extra for extra in extras if isinstance(extra, Stands)), None)
            if stands is None or not isinstance(value_node, ScalarNode):
                continue
            further = stands.keys(self._scalar(value_node, (*path, key_node.value)))
            if further is not None:
                _put(further, value_node.start_mark)
                given = {key.value for key, _ in entries}
                further.value = [pair for pair in further.value if pair[0].value not in given]
                yield from self._entries(further, path)

    def _entries(self, node: Node, path: Path) -> Entries:
        """Give the keys and values of a mapping, those merged into it last."""
        entries: dict[str, tuple[ScalarNode, Node]] = {}
        for key_node, value_node in _pairs(node):
            if not isinstance(key_node, ScalarNode):
                self.note(path, "a key must be one word", key_node.start_mark)
            elif first := entries.get(key_node.value):
                line = first[0].start_mark.line + 1
                where = (*path, key_node.value)
                self.note(where, f"given twice, first in line {line}", key_node.start_mark)
            else:
                entries[key_node.value] = (key_node, value_node)
        for key_node, value_node in self._merged(node, path):
            if isinstance(key_node, ScalarNode):
                entries.setdefault(key_node.value, (key_node, value_node))
        for name, (key_node, value_node) in entries.items():
            plain = isinstance(value_node, ScalarNode) and value_node.value
            self._places[*path, name] = (value_node if plain else key_node).start_mark
        return list(entries.values())

    def _merged(self, node: Node, path: Path) -> Pairs:
        """Give the entries of the mappings that `<<` names, the first ones first."""
        pairs: Pairs = []
        for key_node, value_node in node.value:
            if key_node.tag != MERGE:
                continue
            sources = value_node.value if isinstance(value_node, SequenceNode) else [value_node]
            for source in sources:
                if not isinstance(source, MappingNode) or source in self._open:
                    self.note(path, "<< must name other mappings", value_node.start_mark)
                else:
                    self._open.append(source)
                    pairs += [*_pairs(source), *self._merged(source, path)]
                    self._open.pop()
        return pairs


def _pairs(node: Node) -> Pairs:
    return [(key, value) for key, value in node.value if key.tag != MERGE]


def _put(node: Node, mark: StringMark) -> None:
    """Let the node and its parts stand where the mark is: an error in them is to be found there."""
    node.start_mark = mark
    parts = [] if isinstance(node, ScalarNode) else node.value
    for part in parts:
        for each in part if isinstance(part, tuple) else (part,):
            _put(each, mark)


def _scalar_fits(value: Any, base: Hint) -> bool:
    if origin(base) is Literal:
        return value in get_args(base)
    if isinstance(value, float) and base is int:
        return value.is_integer()
    if base is object:
        return isinstance(value, str | bool | None) or _is_number(value)
    return _is_number(value) if base is float else type(value) is base


def _is_number(value: Any) -> bool:
    return type(value) in {int, float} and math.isfinite(value)


def _accepted(value: Any, extras: tuple[Any, ...]) -> bool:
    constraints = (extra for extra in extras if isinstance(extra, Constraint))
    return value is not INVALID and all(each.accepts(value) for each in constraints)


def _problem(node: Node, extras: tuple[Any, ...]) -> str:
    """Say what is wrong with the text that stands in the file, where a constraint knows."""
    explaining = (extra for extra in extras if isinstance(extra, Explaining))
    problems = [extra.problem(node.value) for extra in explaining if isinstance(node, ScalarNode)]
    return f": {problems[0]}" if any(problems) else ""


def _shown(node: Node) -> str:
    """Give the value as it stands in the file: what came from the environment may be secret."""
    if not isinstance(node, ScalarNode):
        return "a list" if isinstance(node, SequenceNode) else "a mapping"
    if not node.value:
        return "nothing"
    short = node.value[:SHOWN_CHARACTERS]
    short += "..." if short != node.value else ""
    return KINDS_OF_SCALAR.get(node.tag or "", "{!r}").format(short)


def _unknown(name: str, known: tuple[str, ...]) -> str:
    hint = ", ".join(filter(None, ["unknown key", did_you_mean(name, known)]))
    return f"{hint}; allowed: {listed(known, 'and')}"

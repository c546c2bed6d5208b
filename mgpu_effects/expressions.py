"""JMESPath: what a service's JSON says about itself, asked in the words of the configuration.

`{name}` in an expression stands for a value that is known only when it is asked. It is put in as a
JSON literal, so whatever stands in the value stays a value.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jmespath
from attrs import frozen
from jmespath.exceptions import JMESPathError, ParseError
from jmespath.functions import Functions

from mgpu_effects.shapes import Schema

FUNCTIONS: Mapping[str, Any] = Functions.FUNCTION_TABLE


class ExpressionError(Exception):
    """The expression has no value for this answer, as the length of a number."""


@frozen
class JmesPath:
    """Text that is a JMESPath expression, in which each of the `names` may stand in braces."""

    names: tuple[str, ...] = ()

    def accepts(self, value: str) -> bool:
        return not self.problem(value)

    def describe(self, base: str) -> str:
        return "a JMESPath expression"

    @property
    def schema(self) -> Schema:
        return {}

    def problem(self, text: str) -> str:
        """Say what is wrong with it; empty: nothing."""
        filled = text
        for name in self.names:  # as long as what it stands for: positions stay what they are
            filled = filled.replace(f"{{{name}}}", "`" + '""'.ljust(len(name)) + "`")
        try:
            parsed = jmespath.compile(filled).parsed
        except ParseError as error:
            return f"it breaks off at character {error.lex_position + 1}"
        except JMESPathError:
            return "it is empty"
        except RecursionError:
            return "it is nested too deeply"
        return next(filter(None, map(_problem_of, _nodes(parsed))), "")


def value_of(expression: str, data: object, values: Mapping[str, object] | None = None) -> Any:
    """Give what the expression finds in the data, None where nothing is.

    Raises ExpressionError where a function meets what it does not take.
    """
    for name, value in (values or {}).items():
        expression = expression.replace(f"{{{name}}}", _literal(value))
    try:
        return jmespath.search(expression, data)
    except (JMESPathError, RecursionError) as error:
        raise ExpressionError(type(error).__name__) from error


def holds(expression: str, data: object, values: Mapping[str, object] | None = None) -> bool:
    """Say whether what it finds counts as true: not null, false or empty, as in JMESPath's `&&`."""
    value = value_of(expression, data, values)
    return value is not False and value not in (None, "", [], {})


def _literal(value: object) -> str:
    """Give it as a JMESPath literal; a backtick, which would end it, is written as JSON may."""
    return "`" + json.dumps(value).replace("`", "\\u0060") + "`"


def _nodes(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield node
    for child in node["children"]:
        yield from _nodes(child)


def _problem_of(node: Mapping[str, Any]) -> str:
    value: Any = node.get("value")
    if node["type"] == "literal" and isinstance(value, str) and '`""' in value:
        return "what stands in braces is text by itself: leave out the quotes around it"
    if node["type"] != "function_expression":
        return ""
    if value not in FUNCTIONS:
        return f"there is no function {value}"
    takes, given = FUNCTIONS[value]["signature"], len(node["children"])
    many = bool(takes) and takes[-1].get("variadic", False)
    fits = given >= len(takes) if many else given == len(takes)
    return "" if fits else f"{value} takes {len(takes)} values, not {given}"

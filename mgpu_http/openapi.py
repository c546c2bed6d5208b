"""GET /openapi.json, from the table of operations and the table of errors."""

import re
from collections.abc import Iterable
from typing import Any

from mgpu_effects.errors import STATUS
from mgpu_http.operations import Operation
from mgpu_http.status import VERSION

PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")


def document(operations: Iterable[Operation]) -> dict[str, Any]:
    """Give the description of the whole API, OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = PARAMETER.sub(r"{\1}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "mgpu", "version": VERSION},
        "paths": paths,
        "components": {"schemas": {"Error": ERROR}, "securitySchemes": SECURITY},
    }


ERROR = {
    "type": "object",
    "required": ["error", "message", "consumer", "retryable"],
    "properties": {
        "error": {"type": "string", "enum": sorted(STATUS)},
        "message": {"type": "string"},
        "consumer": {"type": ["string", "null"]},
        "retryable": {"type": "boolean"},
    },
}

SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.id,
        "summary": operation.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in PARAMETER.findall(operation.path)
        ]
        + [_asked(name, description, where) for name, where, description in operation.parameters],
        "responses": {
            "200": {"description": operation.answer},
            "default": {
                "description": "the broker's own error; an upstream's own passes unchanged",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    if operation.access != "open":
        described["security"] = [{scheme: [operation.access]} for scheme in SECURITY]
    if operation.takes_body:
        described["requestBody"] = {"content": {"*/*": {}}, "required": True}
    return described


def _asked(name: str, description: str, where: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "required": False,
        "description": description,
        "schema": {"type": "string"},
    }

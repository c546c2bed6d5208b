"""The broker's errors as the libraries of the clients read them: by the path that was asked."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from mgpu_effects.errors import BrokerError
from mgpu_effects.settings import MODEL_PATHS

Dialect: TypeAlias = Callable[[BrokerError], Mapping[str, Any]]

# By status, what OpenAI's and Anthropic's libraries call it.
TYPES: Mapping[int, tuple[str, str]] = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("timeout_error", "timeout_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    502: ("server_error", "api_error"),
    503: ("server_error", "overloaded_error"),
    504: ("server_error", "timeout_error"),
}


def dialect_of(path: str) -> Dialect:
    """Give the shape in which who asks for this path reads errors."""
    if path.startswith("/upstream/"):
        _, _, _, *parts = path.split("/")
        path = "/" + "/".join(parts)
    if path.startswith("/v1/messages"):
        return anthropic
    if path in MODEL_PATHS or path == "/v1/models" or path.startswith("/v1/models/"):
        return openai
    if path.startswith("/api/"):  # of a service, at its own port
        return ollama
    return BrokerError.to_json


def openai(error: BrokerError) -> Mapping[str, Any]:
    return {"error": {"type": TYPES[error.status][0], "param": None, **_members(error)}}


def anthropic(error: BrokerError) -> Mapping[str, Any]:
    return {"type": "error", "error": {"type": TYPES[error.status][1], **_members(error)}}


def ollama(error: BrokerError) -> Mapping[str, Any]:
    """Give the text where Ollama's own would be, with ours beside it."""
    return {**error.to_json(), "error": error.message, "code": error.code}


def _members(error: BrokerError) -> Mapping[str, Any]:
    """Give what is beside the type: the code is ours, and so is all that these libraries ignore."""
    ours = dict(error.to_json())
    return {"code": ours.pop("error"), **ours}

"""What a client asks for beside its work, in headers and query: how long, how urgent, how told."""

import math

from starlette.requests import Request

from mgpu_effects.errors import BrokerError
from mgpu_effects.settings import MODEL_PATHS, ConsumerSettings
from mgpu_http.auth import Caller
from mgpu_http.progress import COMMENT_S


def asked_to_wait(request: Request, consumer: ConsumerSettings) -> tuple[bool, bytes]:
    """Say whether the client wants the finished work (`?wait=1`), and give the rest of the query.

    Who is answered when the work is done has nothing to wait for.
    """
    query: bytes = request.scope["query_string"]
    if "wait" not in request.query_params:
        return False, query
    asked = request.query_params["wait"]
    if asked not in {"0", "1"}:
        raise BrokerError(code="bad_request", message="wait is 1 or 0")
    if asked == "1" and consumer.job is not None and consumer.job.result is None:
        message = f"{consumer.name} has no job.result in the configuration: it can't be waited for"
        raise BrokerError(code="bad_request", message=message, consumer=consumer.name)
    rest = [part for part in query.split(b"&") if part.partition(b"=")[0] != b"wait"]
    return asked == "1" and consumer.job is not None, b"&".join(rest)


def asked_priority(request: Request, caller: Caller, consumer: ConsumerSettings) -> int | None:
    """Give what X-Mgpu-Priority asks for, at most the key's, else at most the consumer's."""
    asked = request.headers.get("x-mgpu-priority")
    if asked is not None and asked not in {"0", "1", "2", "3", "4"}:
        raise BrokerError(code="bad_request", message="X-Mgpu-Priority is a number from 0 to 4")
    limit = caller.key.priority if caller.key else None
    if asked is None:
        return None if limit is None else min(limit, consumer.priority)
    return min(int(asked), consumer.priority if limit is None else limit)


def asked_max_wait_s(request: Request) -> float | None:
    asked = request.headers.get("x-mgpu-max-wait")
    if asked is None:
        return None
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise BrokerError(code="bad_request", message="X-Mgpu-Max-Wait is a number of seconds")
    return seconds


def comments_every_s(request: Request, consumer: ConsumerSettings) -> float | None:
    """Say how often the client of a stream wants to hear that it waits; None: never.

    The configuration can't know what other clients than those of OpenAI and Anthropic can read.
    """
    asked = request.headers.get("x-mgpu-progress")
    if asked not in {None, "sse"}:
        raise BrokerError(code="bad_request", message="X-Mgpu-Progress is sse, or left out")
    if asked is None and request.scope["path"] not in MODEL_PATHS:
        return None
    return consumer.wait_comments_s or (COMMENT_S if asked else None)

"""Everything that the façade answers, as a table: routes, rights and the API's description."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

from attrs import frozen
from starlette.requests import Request
from starlette.responses import Response

from mgpu_effects.settings import KINDS, MODEL_PATHS
from mgpu_effects.values import METHODS
from mgpu_http import catalogue, events, steer, work
from mgpu_http.auth import Access
from mgpu_http.exchange import Exchange, Service

# A handler gives the answer, or None where the broker has answered.
Handler: TypeAlias = Callable[[Service, Exchange, Request], Awaitable[Response | None]]


@frozen(kw_only=True)
class Operation:
    """One method of one path. `parameters` are optional: name, where it stands, what it means."""

    method: str
    path: str
    access: Access
    handler: Handler
    id: str
    summary: str
    answer: str
    parameters: tuple[tuple[str, str, str], ...] = ()
    takes_body: bool = False
    kind: str | None = None  # of the work that it is, for the metrics


MAX_WAIT = ("X-Mgpu-Max-Wait", "header", "how many seconds it may wait")
PRIORITY = ("X-Mgpu-Priority", "header", "0 low to 4 urgent, at most the consumer's or the key's")
MODEL = ("model", "query", "of a consumer with several models: which of them")
FORCE = ("force", "query", "1: at once, with what it serves")

WAIT = ("wait", "query", "1: answer with the finished work where the service only takes a job")

WORK = tuple(
    Operation(
        method="POST",
        path=f"/v1/{kind}",
        access="client",
        handler=partial(work.work, kind=kind),
        id=kind,
        summary=f"Work of the kind {kind}, by whoever is routed for it",
        answer="the service's own answer",
        parameters=(MAX_WAIT, PRIORITY, WAIT),
        takes_body=True,
        kind=kind,
    )
    for kind in KINDS
)

BY_MODEL = tuple(
    Operation(
        method="POST",
        path=path,
        access="client",
        handler=work.by_model,
        id=path.removeprefix("/v1/").replace("/", "_"),
        summary=f"Work of the kind {kind}, by who has the model that the body names",
        answer="the service's own answer",
        parameters=(MAX_WAIT, PRIORITY),
        takes_body=True,
        kind=kind,
    )
    for path, kind in MODEL_PATHS.items()
)

UPSTREAM = tuple(
    Operation(
        method=method,
        path="/upstream/{consumer}/{path:path}",
        access="client",
        handler=work.upstream,
        id=f"upstream_{method.lower()}",
        summary="Anything that a service offers, at its own path; a WebSocket is a GET",
        answer="the service's own answer",
        parameters=(MAX_WAIT, PRIORITY),
        takes_body=method not in {"GET", "DELETE", "OPTIONS"},
    )
    for method in METHODS
    if method != "HEAD"  # every GET answers it
)

AUDIO = Operation(
    method="GET",
    path="/audio/{path:path}",
    access="client",
    handler=work.audio,
    id="audio",
    summary="Files of `audio_proxy`",
    answer="the service's own answer",
    kind="audio",
)

STEERING = tuple(
    Operation(
        method="POST",
        path=f"/v1/consumers/{{name}}/{id_}",
        access="admin",
        handler=handler,
        id=id_,
        summary=summary,
        answer="what became of it, and why",
        parameters=parameters,
    )
    for id_, handler, summary, parameters in (
        ("load", steer.load, "Bring a consumer in", (MODEL,)),
        ("unload", steer.unload, "Send a consumer out, after what it serves", (MODEL, FORCE)),
        ("pin", steer.pin, "Keep a consumer from being evicted", (MODEL,)),
        ("unpin", steer.unpin, "Let a consumer be evicted again", (MODEL,)),
    )
)


PLAIN_ROWS: tuple[tuple[str, str, Access, Handler, str, str], ...] = (
    ("GET", "/", "open", steer.about, "about", "What this is"),
    ("GET", "/healthz", "open", steer.health, "health", "Whether the broker lives"),
    ("GET", "/v1/status", "client", steer.status, "status", "Everything at a glance"),
    ("GET", "/v1/models", "client", catalogue.models, "models", "The models of all services"),
    ("GET", "/v1/models/{id:path}", "client", catalogue.model, "model", "One of them"),
    ("GET", "/metrics", "client", steer.metrics, "metrics", "The same for Prometheus"),
    (
        "GET",
        "/v1/requests/{id}",
        "client",
        steer.one_request,
        "request",
        "One request, and its whole wait",
    ),
    ("DELETE", "/v1/requests/{id}", "admin", steer.cancel, "cancel", "Cancel a request"),
    ("POST", "/v1/drain", "admin", steer.drain, "drain", "Take no new work"),
    ("POST", "/v1/resume", "admin", steer.resume, "resume", "Take work again"),
    ("POST", "/v1/reload", "admin", steer.reload, "reload", "Read the configuration anew"),
)

PLAIN = tuple(
    Operation(
        method=method,
        path=path,
        access=access,
        handler=handler,
        id=id_,
        summary=summary,
        answer=summary,
    )
    for method, path, access, handler, id_, summary in PLAIN_ROWS
)

EVENTS = Operation(
    method="GET",
    path="/v1/events",
    access="client",
    handler=events.events,
    id="events",
    summary="Each record of the event log as it happens",
    answer="server-sent events, or JSON Lines for `Accept: application/jsonl`",
    parameters=(
        ("Last-Event-ID", "header", "RUN-SEQ of the last event that the client has"),
        ("since", "query", "the same, where no header can be set"),
    ),
)

OPERATIONS: tuple[Operation, ...] = (
    *WORK,
    *BY_MODEL,
    *UPSTREAM,
    AUDIO,
    *PLAIN,
    EVENTS,
    *STEERING,
)

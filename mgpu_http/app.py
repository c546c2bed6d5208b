"""The ASGI application: what holds for every request, around the table of operations."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from mgpu_effects.broker import Broker
from mgpu_effects.clock import Clock
from mgpu_effects.errors import SHUTTING_DOWN, BrokerError
from mgpu_http.auth import check_names, cors_headers, identify, preflight_headers
from mgpu_http.body import ClientGoneError, Intake
from mgpu_http.dialects import dialect_of
from mgpu_http.exchange import Exchange, Service
from mgpu_http.metrics import Metrics
from mgpu_http.openapi import document
from mgpu_http.operations import OPERATIONS, Operation
from mgpu_http.paths import normalise
from mgpu_http.respond import JobResponder, Reply
from mgpu_http.websocket import ClientSocket, Tunnel
from mgpu_http.work import through

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 64 * 1024
# What a page's preflight question carries, by the Fetch standard.
PREFLIGHT = {"origin", "access-control-request-method"}


def make_app(broker: Broker, clock: Clock, reload: Callable[[], Awaitable[None]]) -> "Facade":
    """Give the façade of a broker. `clock` is the broker's.

    `reload` reads the configuration anew, or raises `ConfigErrors`. The server has to put `cut`,
    which resets the connection, into the `state` of each scope.
    """
    metrics = Metrics(broker)
    broker.observers.append(metrics.observe)
    service = Service(broker=broker, clock=clock, metrics=metrics, reload=reload)
    return Facade(service, Router(routes(service), redirect_slashes=False, default=not_found))


class Facade:
    """Gives each request an id and its way back, lets in who may, and answers what goes wrong."""

    def __init__(self, service: Service, app: ASGIApp) -> None:
        self._service = service
        self._app = app

    def front(self, address: str) -> "Facade":
        """Give the same for an address at which the broker stands for a service."""
        return Facade(self._service, Front(self._service, address))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        socket = ClientSocket(scope, receive, send) if scope["type"] == "websocket" else None
        if socket is not None:
            scope, receive, send = socket.as_request(scope), socket.receive, socket.send
        intake = Intake(receive)
        reply = Reply(send, intake, scope["state"]["cut"])
        request_id = self._service.new_id()
        reply.headers[b"x-mgpu-request"] = request_id.encode()
        responder = JobResponder(reply)
        exchange = Exchange(
            id=request_id,
            intake=intake,
            reply=reply,
            responder=responder,
            socket=Tunnel(socket, reply) if socket is not None else None,
        )
        scope["state"]["exchange"] = exchange
        try:
            app = self._admit(scope, exchange) or self._app
            await app(scope, receive, reply.send)
        except BrokerError as error:
            await responder.fail(error)
        except ClientGoneError:
            pass  # before it had said what it wants
        except asyncio.CancelledError:
            if not reply.began:
                await responder.fail(SHUTTING_DOWN)
            raise
        except Exception:
            log.exception("request %s failed by a defect", request_id)
            message = f"a defect of the broker; its log says more about {request_id}"
            await responder.fail(BrokerError(code="internal_error", message=message))
        finally:
            if exchange.kind is not None:
                self._service.metrics.ended(exchange.consumer, exchange.kind, responder.outcome)

    def _admit(self, scope: Scope, exchange: Exchange) -> Response | None:
        """Check what holds for all paths; a page's preflight question is answered here."""
        settings, headers = self._service.broker.settings, Headers(scope=scope)
        exchange.responder.dialect = dialect_of(scope["path"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            message = f"the headers are larger than {MAX_HEADER_BYTES} bytes"
            raise BrokerError(code="bad_request", message=message)
        check_names(settings, headers)
        exchange.reply.headers.update(cors_headers(settings, headers))
        scope["raw_path"] = normalise(scope["raw_path"])
        scope["path"] = unquote(scope["raw_path"].decode("ascii"))
        exchange.responder.dialect = dialect_of(scope["path"])
        if scope["method"] == "OPTIONS" and set(headers) >= PREFLIGHT:
            return Response(status_code=204, headers=preflight_headers(settings, headers))
        return None


class PathEndpoint:
    """All operations of one path."""

    def __init__(self, service: Service, operations: Mapping[str, Operation]) -> None:
        self._service = service
        self._operations = operations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["state"]["exchange"]
        request = Request(scope)
        operation = self._operations.get(request.method)
        if operation is None:
            allowed = ", ".join(self._operations)
            exchange.reply.headers[b"allow"] = allowed.encode()
            message = f"{request.method} is not among the methods of this path: {allowed}"
            raise BrokerError(code="method_not_allowed", message=message)
        exchange.kind = operation.kind
        settings = self._service.broker.settings
        exchange.caller = identify(settings, request.headers, operation.access)
        response = await operation.handler(self._service, exchange, request)
        if response is not None:
            await response(scope, receive, send)


class Front:
    """All paths of the service whose `front` the address is at the moment."""

    def __init__(self, service: Service, address: str) -> None:
        self._service = service
        self._address = address

    async def __call__(self, scope: Scope, _receive: Receive, _send: Send) -> None:
        exchange: Exchange = scope["state"]["exchange"]
        request = Request(scope)
        settings = self._service.broker.settings
        try:
            exchange.caller = identify(settings, request.headers, "client")
        except BrokerError:
            exchange.reply.headers[b"www-authenticate"] = b'Basic realm="mgpu"'
            raise
        names = [name for name, addresses in settings.fronts.items() if self._address in addresses]
        if not names:
            raise BrokerError(code="no_consumer", message="no consumer has this `front` any more")
        await through(self._service, exchange, request, names[0], scope["raw_path"])


def routes(service: Service) -> list[Route]:
    by_path: dict[str, dict[str, Operation]] = {}
    for operation in (*OPERATIONS, DESCRIPTION):
        methods = by_path.setdefault(operation.path, {})
        methods[operation.method] = operation
        if operation.method == "GET":
            methods["HEAD"] = operation
    return [Route(path, PathEndpoint(service, methods)) for path, methods in by_path.items()]


async def openapi(_service: Service, _exchange: Exchange, _request: Request) -> Response:
    return JSONResponse(document((*OPERATIONS, DESCRIPTION)))


DESCRIPTION = Operation(
    method="GET",
    path="/openapi.json",
    access="open",
    handler=openapi,
    id="openapi",
    summary="This description",
    answer="OpenAPI 3.1",
)


async def not_found(scope: Scope, _receive: Receive, _send: Send) -> None:
    raise BrokerError(code="not_found", message=f"nothing is at {scope['path']}")

"""Seeing and steering: the answers of the broker itself."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mgpu_core.codec import encode_note
from mgpu_core.events import Drain, Event, Load, Pin, Resume, Unload
from mgpu_effects.config_file import ConfigErrors
from mgpu_effects.errors import BrokerError
from mgpu_http.exchange import Exchange, Service
from mgpu_http.status import VERSION, explained, snapshot

WHAT = "mgpu: one address in front of the inference services that share a GPU"


async def about(_service: Service, _exchange: Exchange, _request: Request) -> Response:
    return JSONResponse({"what": WHAT, "version": VERSION, "api": "/openapi.json"})


async def health(service: Service, _exchange: Exchange, _request: Request) -> Response:
    if service.broker.failed.is_set():
        raise BrokerError(code="internal_error", message="the broker's loop has failed")
    return JSONResponse({"status": "ok"})


async def status(service: Service, _exchange: Exchange, _request: Request) -> Response:
    broker = service.broker
    holders = await broker.holders()
    return JSONResponse(snapshot(broker.state, broker.waits, service.clock.now(), holders))


async def metrics(service: Service, _exchange: Exchange, _request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def one_request(service: Service, _exchange: Exchange, request: Request) -> Response:
    wanted = request.path_params["id"]
    broker = service.broker
    told = explained(broker.state, broker.waits, wanted, service.clock.now())
    if told is None:
        raise BrokerError(
            code="not_found",
            message=f"no request {wanted} is known: it never came, was before this run, or ended"
            " long ago; ask the event log: mgpu log why",
        )
    return JSONResponse(told)


async def cancel(service: Service, _exchange: Exchange, request: Request) -> Response:
    wanted = request.path_params["id"]
    if not service.broker.cancel(wanted):
        raise unknown_request(wanted)
    return JSONResponse({"request": wanted, "cancelled": True})


def unknown_request(wanted: str) -> BrokerError:
    return BrokerError(code="not_found", message=f"no request {wanted} waits or is served")


async def load(service: Service, _exchange: Exchange, request: Request) -> Response:
    name = consumer_name(service, request)
    return await steered(service, name, lambda at: Load(at=at, consumer=name))


async def unload(service: Service, _exchange: Exchange, request: Request) -> Response:
    name = consumer_name(service, request)
    force = request.query_params.get("force", "0") in {"1", "true"}
    return await steered(service, name, lambda at: Unload(at=at, consumers=(name,), force=force))


async def pin(service: Service, _exchange: Exchange, request: Request) -> Response:
    name = consumer_name(service, request)
    return await steered(service, name, lambda at: Pin(at=at, consumer=name))


async def unpin(service: Service, _exchange: Exchange, request: Request) -> Response:
    name = consumer_name(service, request)
    return await steered(service, name, lambda at: Pin(at=at, consumer=name, pinned=False))


async def steered(service: Service, name: str, make: Callable[[int], Event]) -> Response:
    """Have it stepped, and answer with what became of the consumer and why."""
    transition = await service.broker.apply(make)
    return JSONResponse(
        {
            "consumer": name,
            "residency": transition.state.consumers[name].residency.value,
            "notes": [encode_note(note) for note in transition.notes],
        }
    )


def consumer_name(service: Service, request: Request) -> str:
    name: str = request.path_params["name"]
    if name not in service.broker.settings.consumers:
        raise BrokerError(code="no_consumer", message=f"there is no consumer named {name}")
    return name


async def drain(service: Service, _exchange: Exchange, _request: Request) -> Response:
    transition = await service.broker.apply(lambda at: Drain(at=at))
    return JSONResponse({"draining": transition.state.draining})


async def resume(service: Service, _exchange: Exchange, _request: Request) -> Response:
    transition = await service.broker.apply(lambda at: Resume(at=at))
    return JSONResponse({"draining": transition.state.draining})


async def reload(service: Service, _exchange: Exchange, _request: Request) -> Response:
    try:
        await service.reload()
    except ConfigErrors as errors:
        raise BrokerError(code="bad_request", message=str(errors)) from errors
    return JSONResponse({"reloaded": True})

"""Seeing and steering: the answers of the broker itself."""

from collections.abc import Callable, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mgpu_core.codec import encode_note
from mgpu_core.events import Drain, Event, Load, Pin, Resume, Unload
from mgpu_effects.config_file import ConfigErrors
from mgpu_effects.errors import BrokerError
from mgpu_effects.units import unit_name, units_of
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
    now = service.clock.now()
    told = snapshot(broker.state, broker.waits, now, holders, broker.footprints)
    return JSONResponse(told)


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
    name = only_unit(service, request)
    return await steered(service, (name,), lambda at: Load(at=at, consumer=name))


async def unload(service: Service, _exchange: Exchange, request: Request) -> Response:
    names = unit_names(service, request)
    force = request.query_params.get("force", "0") in {"1", "true"}
    return await steered(service, names, lambda at: Unload(at=at, consumers=names, force=force))


async def pin(service: Service, _exchange: Exchange, request: Request) -> Response:
    return await _pinned(service, request, pinned=True)


async def unpin(service: Service, _exchange: Exchange, request: Request) -> Response:
    return await _pinned(service, request, pinned=False)


async def _pinned(service: Service, request: Request, *, pinned: bool) -> Response:
    names = unit_names(service, request)

    def make(name: str) -> Callable[[int], Event]:
        return lambda at: Pin(at=at, consumer=name, pinned=pinned)

    return await steered(service, names, *map(make, names))


async def steered(
    service: Service, names: Sequence[str], *events: Callable[[int], Event]
) -> Response:
    """Have them stepped, and answer with what became of the consumer and why.

    Of several models at once there is a residency for each.
    """
    transitions = [await service.broker.apply(make) for make in events]
    consumers = transitions[-1].state.consumers
    residencies = {name: consumers[name].residency.value for name in names}
    notes = [encode_note(note) for transition in transitions for note in transition.notes]
    if len(names) > 1:
        return JSONResponse({"consumers": residencies, "notes": notes})
    return JSONResponse({"consumer": names[0], "residency": residencies[names[0]], "notes": notes})


def unit_names(service: Service, request: Request) -> tuple[str, ...]:
    """Give the unit that is meant: a consumer, one of its models, or all of them."""
    name: str = request.path_params["name"]
    broker = service.broker
    consumer = broker.settings.consumers.get(name)
    if consumer is None:
        raise BrokerError(code="no_consumer", message=f"there is no consumer named {name}")
    model = request.query_params.get("model")
    if name in broker.units:
        if model is not None:
            message = f"{name} is loaded and unloaded as a whole: it has no models of its own"
            raise BrokerError(code="bad_request", message=message)
        return (name,)
    if model is None:
        return tuple(unit.name for unit in units_of(consumer))
    found = unit_name(consumer, model)
    if found is None:
        message = f"nobody has asked for {model} yet, so that nothing is known of it"
        raise BrokerError(code="no_consumer", message=message, consumer=name)
    return (found,)


def only_unit(service: Service, request: Request) -> str:
    names = unit_names(service, request)
    if len(names) != 1:
        message = f"say which model: ?model=ID, one of {', '.join(names)}"
        raise BrokerError(code="bad_request", message=message)
    return names[0]


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

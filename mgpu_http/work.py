"""Work for the consumers: everything that is proxied."""

import math

from starlette import requests
from starlette.types import Scope

from mgpu_core.effects import Reject
from mgpu_core.events import Cancel, Request
from mgpu_core.requests import refusal
from mgpu_effects.errors import SHUTTING_DOWN, BrokerError, of_reject
from mgpu_effects.jobs import Body, Headers, Job
from mgpu_effects.settings import ConsumerSettings, Kind
from mgpu_effects.units import unit_name
from mgpu_http.auth import CREDENTIALS, Caller
from mgpu_http.body import ClientGoneError, SpooledBody, refuse_beyond
from mgpu_http.exchange import Exchange, Service
from mgpu_http.models import asked_model, renamed
from mgpu_http.paths import with_query


async def work(service: Service, exchange: Exchange, request: requests.Request, kind: Kind) -> None:
    """POST /v1/KIND: the body is taken in whole, scheduled, then proxied to who does that kind.

    What can be refused without the body is refused before it is read.
    """
    consumer = routed(service, kind)
    exchange.consumer = consumer.name
    endpoint = consumer.paths.get(kind)
    if endpoint is None:
        raise BrokerError(code="no_consumer", message=f"{consumer.name} has no path for {kind}")
    waits, query = asked_to_wait(request, consumer)
    priority = asked_priority(request, exchange.caller, consumer)
    max_wait_s = asked_max_wait_s(request)
    limit_bytes = service.broker.settings.max_body_mib << 20
    refuse_beyond(limit_bytes, int(request.headers.get("content-length", "0")))
    if consumer.name in service.broker.units:
        await refuse_early(service, exchange, consumer.name, kind)
    try:
        body = await exchange.intake.take(limit_bytes, consumer.timeout_s.upload)
    except ClientGoneError:
        return
    try:
        name, body = await unit_of(service, consumer, body, request)
    except BaseException:
        body.close()
        raise
    exchange.consumer = name
    job = make_job(
        exchange,
        request.scope,
        body,
        consumer=name,
        kind=kind,
        method=endpoint.method,
        path=with_query(endpoint.path, query),
        priority=priority,
        max_wait_s=max_wait_s,
    )
    job.waits = waits
    service.broker.submit(job)
    await see_through(service, exchange, job)


async def audio(service: Service, exchange: Exchange, request: requests.Request) -> None:
    """GET /audio/*: proxied to the `audio_proxy` consumer, without a lease."""
    settings = service.broker.settings
    if service.broker.state.stopping:
        raise SHUTTING_DOWN
    if settings.audio_proxy is None:
        raise BrokerError(code="no_consumer", message="no consumer is the `audio_proxy`")
    exchange.consumer = settings.audio_proxy
    job = make_job(
        exchange,
        request.scope,
        SpooledBody(),
        consumer=settings.audio_proxy,
        kind="audio",
        method=request.method,
        path=with_query(request.scope["raw_path"].decode("ascii"), request.scope["query_string"]),
    )
    service.broker.relay(job)
    await see_through(service, exchange, job)


async def see_through(service: Service, exchange: Exchange, job: Job) -> None:
    """Wait until the job is over, and tell the broker when its client leaves before that.

    The broker's own task works for the job: a cancelled handler must not end it half done.
    """
    try:
        await exchange.intake.until_gone()
    finally:
        if not exchange.reply.over:
            service.broker.leave(job.request)
    await job.done.wait()
    if job.granted is not None:
        service.metrics.waited(job.consumer, job.kind, job.granted - job.submitted)


async def refuse_early(service: Service, exchange: Exchange, consumer: str, kind: Kind) -> None:
    """Raise the scheduler's refusal, if it has one, before the body is read.

    A refusal is a decision like any other: it is taken by the scheduler itself and recorded. The
    look before only spares those a step that will be asked again with their body.
    """

    def event(at: int) -> Request:
        return Request(at=at, request=exchange.id, consumer=consumer, kind=kind)

    broker = service.broker
    if refusal(broker.state, consumer, service.clock.now()) is None:
        return
    transition = await broker.apply(event)
    for effect in transition.effects:
        if isinstance(effect, Reject) and effect.request == exchange.id:
            raise of_reject(effect)
    # It changed its mind in between. This was no request yet: the one with the body follows.
    await broker.apply(lambda at: Cancel(at=at, request=exchange.id))


async def unit_of(
    service: Service, consumer: ConsumerSettings, body: SpooledBody, request: requests.Request
) -> tuple[str, SpooledBody]:
    """Give the unit that a request goes to, and the body that names its model as its service does.

    Where the consumer is one unit by itself, what the body asks for is the service's business.
    """
    broker = service.broker
    if consumer.name in broker.units:
        return consumer.name, body
    asked = await asked_model(body, request.headers.get("content-type", ""))
    model = asked.model if asked else None
    name = unit_name(consumer, model) or await broker.meet(consumer.name, model or "")
    unit = broker.units[name].unit
    if asked is not None and unit is not None and asked.model != unit.upstream:
        body = await renamed(body, asked, unit.upstream)
    return name, body


def routed(service: Service, kind: Kind) -> ConsumerSettings:
    settings = service.broker.settings
    name = settings.routing.get(kind)
    if name is None or name not in settings.consumers:
        raise BrokerError(code="no_consumer", message=f"nothing is routed for {kind}")
    return settings.consumers[name]


def make_job(
    exchange: Exchange,
    scope: Scope,
    body: Body,
    *,
    consumer: str,
    kind: str,
    method: str,
    path: str,
    priority: int | None = None,
    max_wait_s: float | None = None,
) -> Job:
    headers: Headers = scope["headers"]
    host = next((value for name, value in headers if name == b"host"), None)
    return Job(
        request=exchange.id,
        consumer=consumer,
        kind=kind,
        method=method,
        path=path,
        headers=[(name, value) for name, value in headers if name not in CREDENTIALS],
        body=body,
        responder=exchange.responder,
        priority=priority,
        max_wait_s=max_wait_s,
        client=scope["client"][0],
        scheme=scope["scheme"],
        host=host.decode("latin-1") if host is not None else None,
    )


def asked_to_wait(request: requests.Request, consumer: ConsumerSettings) -> tuple[bool, bytes]:
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


def asked_priority(
    request: requests.Request, caller: Caller, consumer: ConsumerSettings
) -> int | None:
    """Give what X-Mgpu-Priority asks for, at most the key's, else at most the consumer's."""
    asked = request.headers.get("x-mgpu-priority")
    if asked is not None and asked not in {"0", "1", "2", "3", "4"}:
        raise BrokerError(code="bad_request", message="X-Mgpu-Priority is a number from 0 to 4")
    limit = caller.key.priority if caller.key else None
    if asked is None:
        return None if limit is None else min(limit, consumer.priority)
    return min(int(asked), consumer.priority if limit is None else limit)


def asked_max_wait_s(request: requests.Request) -> float | None:
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

"""Work for the consumers: everything that is proxied."""

from urllib.parse import unquote

from attrs import frozen
from starlette import requests
from starlette.types import Scope

from mgpu_core.effects import Reject
from mgpu_core.events import Cancel, Request
from mgpu_core.requests import refusal
from mgpu_effects.errors import SHUTTING_DOWN, BrokerError, of_reject
from mgpu_effects.jobs import Body, Headers, Job
from mgpu_effects.passive import is_passive
from mgpu_effects.settings import (
    KINDS,
    MODEL_PATHS,
    ConsumerSettings,
    Kind,
    Timeouts,
    WorkEndpoint,
)
from mgpu_effects.units import server_of, unit_name
from mgpu_http.asked import asked_max_wait_s, asked_priority, asked_to_wait, comments_every_s
from mgpu_http.auth import CREDENTIALS, is_own_page
from mgpu_http.body import SpooledBody, refuse_beyond
from mgpu_http.exchange import Exchange, Service
from mgpu_http.models import FIELD, Asked, asked_model, renamed
from mgpu_http.paths import with_query
from mgpu_http.progress import Progress, streams
from mgpu_http.status import describe


@frozen(kw_only=True)
class Errand:
    """What is asked of which service: `path` is under its URL, query included."""

    consumer: ConsumerSettings
    kind: str
    method: str
    path: str
    waits: bool = False  # the client wants the finished work


@frozen
class Taken:
    """A body that is here whole, and the model that it asks for, as far as that was looked for."""

    body: SpooledBody
    asked: Asked | None = None

    @property
    def model(self) -> str | None:
        return self.asked.model if self.asked else None


async def work(service: Service, exchange: Exchange, request: requests.Request, kind: Kind) -> None:
    """POST /v1/KIND: who is routed for the kind does it, at its own path for that kind.

    What can be refused without the body is refused before it is read.
    """
    consumer = server_of(service.broker.settings, kind, None)
    exchange.consumer = consumer.name
    endpoint = consumer.paths.get(kind)
    if endpoint is None:
        raise BrokerError(code="no_consumer", message=f"{consumer.name} has no path for {kind}")
    waits, query = asked_to_wait(request, consumer)
    path = with_query(endpoint.path, query)
    errand = Errand(consumer=consumer, kind=kind, method=endpoint.method, path=path, waits=waits)
    await schedule(service, exchange, request, errand)


async def by_model(service: Service, exchange: Exchange, request: requests.Request) -> None:
    """POST of OpenAI's and Anthropic's clients: who has the model does it, at the same path."""
    path: str = request.scope["path"]
    kind = MODEL_PATHS[path]
    taken = await take_in(service, exchange, request, Timeouts(), look=True)
    try:
        consumer = server_of(service.broker.settings, kind, taken.model)
    except BrokerError:
        taken.body.close()
        raise
    endpoint = consumer.paths.get(path, WorkEndpoint(path=path))
    target = with_query(endpoint.path, request.scope["query_string"])
    errand = Errand(consumer=consumer, kind=kind, method=endpoint.method, path=target)
    await submit(service, exchange, request, errand, taken)


async def upstream(service: Service, exchange: Exchange, request: requests.Request) -> None:
    """/upstream/CONSUMER/PATH: the same as at the consumer's `front` port."""
    raw_path: bytes = request.scope["raw_path"]
    _, _, _, path = raw_path.split(b"/", 3)
    await through(service, exchange, request, request.path_params["consumer"], b"/" + path)


async def through(
    service: Service, exchange: Exchange, request: requests.Request, name: str, raw_path: bytes
) -> None:
    """Anything that a service offers, at the path that it has there; `passive` needs no lease."""
    consumer = service.broker.settings.consumers.get(name)
    if consumer is None:
        raise BrokerError(code="no_consumer", message=f"there is no consumer {name}")
    exchange.consumer = name
    path = unquote(raw_path.decode("ascii"))
    exchange.kind = kind_of(consumer, path)
    errand = Errand(
        consumer=consumer,
        kind=exchange.kind,
        method=request.method,
        path=with_query(raw_path.decode("ascii"), request.scope["query_string"]),
    )
    if is_passive(consumer, request.method, path):
        await relay(service, exchange, request, errand)
    else:
        await schedule(service, exchange, request, errand)


def kind_of(consumer: ConsumerSettings, path: str) -> str:
    """Say what kind of work a path is: as `paths` has it, else what the service does in general."""
    kinds = [kind for kind in consumer.paths if kind in KINDS]
    named = [kind for kind in kinds if consumer.paths[kind].path == path]
    return MODEL_PATHS.get(path) or next(iter([*named, *kinds]), "other")


async def audio(service: Service, exchange: Exchange, request: requests.Request) -> None:
    """GET /audio/*: proxied to the `audio_proxy` consumer, without a lease."""
    settings = service.broker.settings
    if settings.audio_proxy is None:
        raise BrokerError(code="no_consumer", message="no consumer is the `audio_proxy`")
    consumer = settings.consumers[settings.audio_proxy]
    exchange.consumer = consumer.name
    path = with_query(request.scope["raw_path"].decode("ascii"), request.scope["query_string"])
    errand = Errand(consumer=consumer, kind="audio", method=request.method, path=path)
    await relay(service, exchange, request, errand)


# ------------------------------------------------------------------------------- their way


async def relay(
    service: Service, exchange: Exchange, request: requests.Request, errand: Errand
) -> None:
    """Pass it on at once."""
    if service.broker.state.stopping:
        raise SHUTTING_DOWN
    limits = errand.consumer.timeout_s
    taken = await take_in(service, exchange, request, limits, look=False)
    job = make_job(exchange, request.scope, taken.body, errand, errand.consumer.name)
    service.broker.relay(job)
    await see_through(service, exchange, job)


async def schedule(
    service: Service, exchange: Exchange, request: requests.Request, errand: Errand
) -> None:
    """Let it wait for its turn; what can be refused without its body is refused before."""
    asked_max_wait_s(request)
    asked_priority(request, exchange.caller, errand.consumer)
    refuse_too_long(service, request)
    server = errand.consumer
    one_unit = server.name in service.broker.units
    if one_unit:
        await refuse_early(service, exchange, server.name, errand.kind)
    taken = await take_in(service, exchange, request, server.timeout_s, look=not one_unit)
    await submit(service, exchange, request, errand, taken)


async def submit(
    service: Service, exchange: Exchange, request: requests.Request, errand: Errand, taken: Taken
) -> None:
    """Give it to the broker, and see it through."""
    body, asked = taken.body, taken.asked
    progress = None
    try:
        model = taken.model or request.query_params.get(FIELD)
        name = await unit_for(service, errand.consumer, model)
        unit = service.broker.units[name].unit
        if asked is not None and unit is not None and asked.model != unit.upstream:
            body = await renamed(body, asked, unit.upstream)
        exchange.consumer = name
        job = make_job(exchange, request.scope, body, errand, name)
        job.priority = asked_priority(request, exchange.caller, errand.consumer)
        job.max_wait_s = asked_max_wait_s(request)
        job.waits = errand.waits
        every_s = comments_every_s(request, errand.consumer)
        if every_s is not None and await streams(body):
            job.responder = progress = progress_of(service, exchange, job, every_s)
        service.broker.submit(job)
    except BaseException:
        body.close()
        raise
    try:
        await see_through(service, exchange, job)
    finally:
        if progress is not None:
            progress.stop()


def progress_of(service: Service, exchange: Exchange, job: Job, every_s: float) -> Progress:
    def place() -> str:
        return describe(service.broker.state, service.broker.waits, job.request)

    def waited() -> str:
        granted = job.submitted if job.granted is None else job.granted
        queue_ms, load_ms = (granted - job.submitted) // 1000, job.loading_us // 1000
        return f"x-mgpu-queue-ms: {queue_ms}, x-mgpu-load-ms: {load_ms}"

    return Progress(exchange.responder, every_s, place, waited)


async def take_in(
    service: Service,
    exchange: Exchange,
    request: requests.Request,
    limits: Timeouts,
    *,
    look: bool,
) -> Taken:
    """Take the body in whole, and look for its model; raises what `Intake.take` does."""
    refuse_too_long(service, request)
    body = await exchange.intake.take(limit_bytes(service), limits.upload)
    if not look or not body.size:
        return Taken(body)
    try:
        return Taken(body, await asked_model(body, request.headers.get("content-type", "")))
    except BaseException:
        body.close()
        raise


def refuse_too_long(service: Service, request: requests.Request) -> None:
    refuse_beyond(limit_bytes(service), int(request.headers.get("content-length", "0")))


def limit_bytes(service: Service) -> int:
    return service.broker.settings.max_body_mib << 20


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


async def refuse_early(service: Service, exchange: Exchange, consumer: str, kind: str) -> None:
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


async def unit_for(service: Service, consumer: ConsumerSettings, model: str | None) -> str:
    """Name the unit that a request goes to.

    Where the consumer is one unit by itself, what is asked for is the service's business.
    """
    broker = service.broker
    if consumer.name in broker.units:
        return consumer.name
    return unit_name(consumer, model) or await broker.meet(consumer.name, model or "")


def make_job(exchange: Exchange, scope: Scope, body: Body, errand: Errand, unit: str) -> Job:
    headers: Headers = scope["headers"]
    given = dict(headers)
    host, origin = given.get(b"host"), given.get(b"origin")
    # The façade has looked at where a page comes from; by the service's own name it would be
    # another one's, and be refused.
    left_out = CREDENTIALS | ({b"origin"} if is_own_page(host, origin) else set())
    return Job(
        request=exchange.id,
        consumer=unit,
        kind=errand.kind,
        method=errand.method,
        path=errand.path,
        headers=[(name, value) for name, value in headers if name not in left_out],
        body=body,
        responder=exchange.responder,
        socket=exchange.socket,
        client=scope["client"][0],
        scheme=scope["scheme"],
        host=host.decode("latin-1") if host is not None else None,
    )

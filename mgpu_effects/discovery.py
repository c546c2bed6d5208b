"""What is there on this host: services on their known ports, who runs them, what they hold.

Nothing is changed by looking: every question is a GET that neither loads nor wakes a model, asked
with a short time limit, all at once.
"""

import asyncio
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import aiohttp
from attrs import evolve, field, frozen

from mgpu_effects import presets
from mgpu_effects.blocking import Blocking
from mgpu_effects.calls import control_session
from mgpu_effects.expressions import ExpressionError, holds, value_of
from mgpu_effects.gpu import SIMULATED_GPU, SampleError, make_sampler
from mgpu_effects.gpu_processes import Holders, Owner, attribute
from mgpu_effects.presets import Discovery, Preset
from mgpu_effects.proc import listeners
from mgpu_effects.run_by import RunBy, run_by
from mgpu_effects.settings import GpuSettings, SamplerName
from mgpu_effects.units import is_model_name

HOST = "127.0.0.1"
_CONNECT_S = 1.0
_ASK_S = 5.0
_PROC_S = 5.0
_BODY_BYTES = 4 << 20
_MOST_CARDS = 64
_MOST_MODELS = 200
_BROKER_HEADER = "x-mgpu-request"


@frozen(kw_only=True)
class Answer:
    """What a service said: names of headers in small letters, its JSON, or its text."""

    status: int
    headers: Mapping[str, str]
    body: Any

    def says(self, expression: str) -> bool:
        """Say whether the expression holds for it, and not where it makes no sense for it."""
        about = {"status": self.status, "headers": self.headers, "body": self.body}
        try:
            return holds(expression, about)
        except ExpressionError:
            return False


@frozen(kw_only=True)
class Model:
    """`mib` is what the service says of the size of its weights."""

    name: str
    mib: int | None = None


@frozen(kw_only=True)
class Service:
    """A service that was recognised. `held_mib` is what its processes hold now, by card."""

    name: str
    preset: Preset
    port: int
    version: str | None = None
    models: tuple[Model, ...] = ()
    run_by: RunBy = field(factory=RunBy)
    held_mib: Mapping[int, int] = field(factory=dict)
    # False: it runs without the routes by which its preset loads, unloads and sees it.
    has_routes: bool = True
    problems: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def discovery(self) -> Discovery:
        assert self.preset.discovery is not None
        return self.preset.discovery


@frozen(kw_only=True)
class Stranger:
    """Something listens there that no preset knows, or that did not answer at all."""

    port: int
    what: str
    expected: tuple[str, ...]  # the presets whose port it is


@frozen(kw_only=True)
class Card:
    index: int
    total_mib: int
    used_mib: int


@frozen(kw_only=True)
class Host:
    """All that was found. `gpu_error` says why there are no cards, as a code of gpu.py."""

    services: tuple[Service, ...] = ()
    strangers: tuple[Stranger, ...] = ()
    cards: tuple[Card, ...] = ()
    gpu_error: str | None = None
    sampler: SamplerName = "auto"
    listening: frozenset[int] = frozenset()  # the ports that somebody listens on

    def doing(self, kind: str) -> tuple[Service, ...]:
        """Give those that do this kind of work, the one to ask by default first."""
        return tuple(each for each in self.services if kind in each.preset.consumer["paths"])


# ------------------------------------------------------------------------------------- known ports


def known_ports() -> Mapping[int, tuple[str, ...]]:
    """Give the ports to ask at, each with the presets whose services are usually there."""
    ports: dict[int, list[str]] = {}
    for name, discovery in _discoveries().items():
        for port in (default_port(presets.preset(name)), *discovery.ports):
            ports.setdefault(port, []).append(name)
    return {port: tuple(names) for port, names in sorted(ports.items())}


def default_port(known: Preset) -> int:
    return int(known.url.rpartition(":")[2])


def _discoveries() -> dict[str, Discovery]:
    every = {name: presets.preset(name).discovery for name in presets.names()}
    return {name: discovery for name, discovery in every.items() if discovery}


# ------------------------------------------------------------------------------------------ asking


async def look(ports: Mapping[int, Sequence[str]]) -> Host:
    """Find out what is on these ports of the loopback, and on the cards of this host.

    `ports` gives the presets that may be guessed at each.
    """
    async with control_session() as session:
        found = await asyncio.gather(*(_at(session, port, ports[port]) for port in ports))
    services = _named([each for each in found if isinstance(each, Service)], ports)
    strangers = tuple(each for each in found if isinstance(each, Stranger))
    keepers = await run_by([each.port for each in services])
    services = [evolve(each, run_by=keepers[each.port]) for each in services]
    open_ports = frozenset(await Blocking("proc", _PROC_S).run(listeners))
    host = Host(services=tuple(services), strangers=strangers, listening=open_ports)
    return await _with_cards(host)


async def _at(
    session: aiohttp.ClientSession, port: int, expected: Sequence[str]
) -> Service | Stranger | None:
    """Ask what listens on a port, None where nothing does."""
    if not await _is_open(port):
        return None
    paths = {discovery.path for discovery in _discoveries().values()}
    answers = await _ask_all(session, port, paths)
    if any(answer and _BROKER_HEADER in answer.headers for answer in answers.values()):
        return Stranger(port=port, what="a broker that runs", expected=())
    known = recognise(answers, expected)
    if known is None:
        heard = [answer for answer in answers.values() if answer]
        what = "nothing that is known" if heard else "something that does not answer in time"
        return Stranger(port=port, what=what, expected=tuple(expected))
    return await _asked(session, Service(name=known.name, preset=known, port=port), answers)


def recognise(answers: Mapping[str, Answer | None], expected: Sequence[str]) -> Preset | None:
    """Give the preset whose service answers so, by path.

    One of those that are `expected` there may be guessed.
    """
    fitting = {
        name: discovery
        for name, discovery in _discoveries().items()
        if (answer := answers.get(discovery.path)) and answer.says(discovery.when)
    }
    sure = [name for name, discovery in fitting.items() if not discovery.guess]
    guessed = [name for name, discovery in fitting.items() if discovery.guess and name in expected]
    found = next(iter(sure or guessed), None)
    return presets.preset(found) if found else None


async def _asked(
    session: aiohttp.ClientSession, service: Service, answers: Mapping[str, Answer | None]
) -> Service:
    """Add what the service tells of itself, and what of its preset it does not answer to."""
    discovery = service.discovery
    checked = [service.preset.consumer["health"]["path"], *_residency_path(service.preset)]
    checked += [discovery.models.path] if discovery.models else []
    asks = [discovery.version.path] if discovery.version else []
    more = await _ask_all(session, service.port, {*checked, *asks} - answers.keys())
    answers = {**answers, **more}
    version = _value(discovery.version, answers)
    lacking = [path for path in _residency_path(service.preset) if _is_missing(answers[path])]
    return evolve(
        service,
        has_routes=not lacking or "models" in service.preset.requires,
        version=_plain(version) if isinstance(version, str | int | float) else None,
        models=tuple(_models(_value(discovery.models, answers))),
        problems=tuple(_problems({path: answers[path] for path in checked})),
    )


def _residency_path(known: Preset) -> list[str]:
    asked = known.consumer.get("residency")
    return [asked["path"]] if isinstance(asked, Mapping) else []


def _is_missing(answer: Answer | None) -> bool:
    return answer is not None and answer.status == 404


def _value(ask: presets.Ask | None, answers: Mapping[str, Answer | None]) -> Any:
    answer = answers[ask.path] if ask else None
    if ask is None or answer is None or answer.status != 200:
        return None
    try:
        return value_of(ask.value, answer.body)
    except ExpressionError:
        return None


def _models(told: Any) -> Iterable[Model]:
    """Give what of the list can be a name in a configuration, each once."""
    found: dict[str, Model] = {}
    for each in told[:_MOST_MODELS] if isinstance(told, list) else ():
        name, size = each.get("id"), each.get("bytes")
        if (
            isinstance(name, str)
            and name.isprintable()
            and is_model_name(name)
            and "${" not in name
        ):
            found[name] = Model(name=name, mib=size >> 20 if isinstance(size, int) else None)
    return found.values()


def _problems(answers: Mapping[str, Answer | None]) -> Iterable[str]:
    for path, answer in answers.items():
        if answer is None:
            yield f"GET {path} was not answered"
        elif answer.status in (401, 403):
            yield f"GET {path} wants a key: `headers: {{Authorization: Bearer ...}}` belongs here"
        elif not 200 <= answer.status < 300:
            yield f"GET {path} was answered with {answer.status}"


def _plain(value: object) -> str:
    """Give it in one short line, whatever a service may have said."""
    return re.sub(r"[^\x21-\x7e]+", " ", str(value)).strip()[:40]


# ------------------------------------------------------------------------------------- one request


async def _is_open(port: int) -> bool:
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(HOST, port)
    except OSError:  # TimeoutError is one of its kinds
        return False
    writer.close()
    return True


async def _ask_all(
    session: aiohttp.ClientSession, port: int, paths: Collection[str]
) -> dict[str, Answer | None]:
    answers = await asyncio.gather(*(_ask(session, port, path) for path in paths))
    return dict(zip(paths, answers, strict=True))


async def _ask(session: aiohttp.ClientSession, port: int, path: str) -> Answer | None:
    """Ask by GET; None: no answer that is HTTP in time."""
    try:
        async with session.get(
            f"http://{HOST}:{port}{path}",
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=_ASK_S),
        ) as answer:
            content = await _read(answer.content)
            headers = {name.lower(): value for name, value in answer.headers.items()}
            return Answer(status=answer.status, headers=headers, body=_json_or_text(content))
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


async def _read(content: aiohttp.StreamReader) -> bytes:
    kept = bytearray()
    async for chunk in content.iter_any():
        kept += chunk
        if len(kept) >= _BODY_BYTES:
            break
    return bytes(kept)


def _json_or_text(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content.decode(errors="replace")


# ------------------------------------------------------------------------------------ names, order


def _named(found: Sequence[Service], ports: Mapping[int, Sequence[str]]) -> list[Service]:
    """Give each a name of its own, and put who does most kinds of work first."""

    def order(service: Service) -> tuple[int, bool, str, int]:
        kinds = [kind for kind in service.preset.consumer["paths"] if not kind.startswith("/")]
        elsewhere = service.preset.name not in ports[service.port]
        return -len(kinds), elsewhere, service.preset.name, service.port

    named: dict[str, Service] = {}
    for service in sorted(found, key=order):
        name = service.preset.name
        name = f"{name}-{service.port}" if name in named else name
        named[name] = evolve(service, name=name)
    return list(named.values())


# ------------------------------------------------------------------------------------------- cards


async def _with_cards(host: Host) -> Host:
    """Add the cards, and what the processes of each service hold on them."""
    sampler: SamplerName = "simulated" if SIMULATED_GPU in os.environ else "auto"
    cards: list[Card] = []
    error: str | None = None
    for index in range(_MOST_CARDS):
        try:
            cards.append(await _card(index, sampler))
        except SampleError as failed:
            error = None if cards else failed.code
            break
    host = evolve(host, cards=tuple(cards), gpu_error=error, sampler=sampler)
    holders = await _holders(host)
    if holders is None:
        return host
    services = [
        evolve(each, held_mib=_held_mib(each.name, holders, cards)) for each in host.services
    ]
    return evolve(host, services=tuple(services))


async def _card(index: int, name: SamplerName) -> Card:
    sampler = make_sampler((GpuSettings(index=index, sampler=name),))
    try:
        (reading,) = await sampler.read()
    finally:
        await sampler.close()
    return Card(index=index, total_mib=reading.total_mib, used_mib=reading.used_mib)


async def _holders(host: Host) -> Holders | None:
    """Find out whose the processes on the cards are, None where that can't be told."""
    if not host.cards:
        return None
    settings = [GpuSettings(index=card.index, sampler=host.sampler) for card in host.cards]
    owners = [
        Owner(consumer=each.name, cgroup=each.run_by.cgroup, port=each.port)
        for each in host.services
    ]
    sampler = make_sampler(settings)
    try:
        processes = await sampler.processes()
        return await Blocking("proc", _PROC_S).run(lambda: attribute(0, (), processes, owners))
    except (SampleError, TimeoutError):
        return None
    finally:
        await sampler.close()


def _held_mib(name: str, holders: Holders, cards: Iterable[Card]) -> Mapping[int, int]:
    """Give what it holds on each card where that is something and can be told."""
    held = {card.index: holders.held_mib(name, (card.index,)) for card in cards}
    return {index: mib for index, mib in held.items() if mib}

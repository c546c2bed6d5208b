"""A first configuration, from what was found on the host: text for somebody who reads it for the
first time, with what was seen beside each line.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from textwrap import wrap
from typing import Any

from attrs import define, field

from mgpu_effects.discovery import Card, Host, Model, Service, Stranger
from mgpu_effects.run_by import RunBy
from mgpu_effects.settings import KINDS, GpuSettings
from mgpu_effects.units import ANY

WIDTH = 100
INDENT = "    "
FRONT_OFFSET = 10_000
LAST_PORT = 65_535
# By what name OpenAI's clients ask for speech, and at which path that must be understood.
USUAL_NAMES = {
    "tts": ("/v1/audio/speech", "tts-1"),
    "stt": ("/v1/audio/transcriptions", "whisper-1"),
}
# Who holds no more than its residue and this has not loaded anything: that is no footprint.
IDLE_MIB = 256
PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
WORDS = {"true", "false", "null", "yes", "no", "on", "off"}

HEAD = """\
# Written by `mgpu init` from what it found on this host; what is wrong or missing is yours to
# change. `mgpu check FILE` shows every mistake, docs/configuration.md explains every key, and
# `mgpu presets show NAME` says what a preset stands for, with the traps of its service.

# Clients call this address and no other. Loopback only: any other one needs auth.keys.
"""


def first_config(host: Host, listen: str) -> str:
    """Give the text of a configuration for what was found, ending in a line break."""
    port = listen.rpartition(":")[2]
    writer = _Writer(host, int(port) if port.isdecimal() else None)
    parts = [
        [f"{HEAD}listen: {listen}"],
        writer.routing(),
        writer.gpus(),
        ["consumers:" if host.services else "consumers: {}"],
        *([*writer.consumer(each)] for each in host.services),
        writer.strangers(),
    ]
    blocks = ["\n".join(part) for part in parts if part]
    text = "\n\n".join(blocks).replace("consumers:\n\n", "consumers:\n")
    return f"{text}\n"


def flow(value: Any) -> str:
    """Write a value in one line of YAML, with quotes only where it needs them."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str):
        plain = PLAIN.fullmatch(value) and value.lower() not in WORDS
        return value if plain else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def comment(text: str, bullet: str = "") -> Iterator[str]:
    """Give it in lines that may be indented as the keys of a consumer are."""
    yield from wrap(
        text,
        WIDTH - len(INDENT),
        initial_indent=f"# {bullet}",
        subsequent_indent=f"# {' ' * len(bullet)}",
        break_long_words=False,
        break_on_hyphens=False,
    )


@define
class _Writer:
    """Writes one file: a name or a port that it has given away is nobody else's."""

    host: Host
    listen_port: int | None
    _names: set[str] = field(factory=set, init=False)
    _fronts: set[int] = field(factory=set, init=False)
    _drivers: dict[RunBy, str] = field(factory=dict, init=False)

    # ------------------------------------------------------------------------------- the host

    def routing(self) -> list[str]:
        lines = ["# Who answers which kind of work: POST /v1/tts, /v1/stt, /v1/llm, /v1/image."]
        doing = {kind: self.host.doing(kind) for kind in KINDS}
        missing = [kind for kind in KINDS if not doing[kind]]
        lines.append("routing:" if len(missing) < len(KINDS) else "routing: {}")
        for kind, services in doing.items():
            if services:
                others = ", ".join(each.name for each in services[1:])
                lines.append(
                    f"  {kind}: {services[0].name}" + (f" # or {others}" if others else "")
                )
        if missing:
            lines.append(f"  # Nobody was found for {', '.join(missing)}.")
        for service in self.host.services:
            if service.discovery.audio:
                text = (
                    f"GET /audio/* goes here: the sound files that {service.name}'s answers name."
                )
                lines += ["", *comment(text), f"audio_proxy: {service.name}"]
                break
        return lines

    def gpus(self) -> list[str]:
        cards, host = self.host.cards, self.host
        if not cards:
            why = comment(_without_cards(host.gpu_error or "no_gpu"))
            return [*why, "gpu:", "  sampler: none"]
        several = len(cards) > 1
        lines = ["gpus:" if several else "gpu:"]
        for card in cards:
            used = f"in use now: {card.used_mib:,} MiB"
            first, rest = ("  - ", "    ") if several else ("  ", "  ")
            keys = [f"index: {card.index}"] if several else []
            keys.append(f"total_mib: {card.total_mib} # as its driver says; {used}")
            keys.append("reserved_mib: 0 # for what else takes memory there, such as a desktop")
            keys.append("max_parallel: 1 # services at work at once; null: no limit")
            if host.sampler != GpuSettings().sampler:
                keys.append(f"sampler: {host.sampler}")
            lines += [f"{rest if at else first}{key}" for at, key in enumerate(keys)]
        return lines

    def strangers(self) -> list[str]:
        return [line for each in self.host.strangers for line in comment(_stranger(each))]

    # -------------------------------------------------------------------------------- a service

    def consumer(self, service: Service) -> Iterator[str]:
        yield f"  {service.name}:"
        for line in (
            *_about(service),
            f"url: {service.url}",
            f"preset: {service.preset.name}",
            *self._memory(service),
            *_taken_back(service, cards=bool(self.host.cards)),
            *self._required(service),
            *self._models(service),
            *self._driver(service),
            *self._front(service),
        ):
            yield f"{INDENT}{line}"

    def _memory(self, service: Service) -> Iterator[str]:
        keys, by_models = service.preset.consumer, "models" in service.preset.requires
        if not self._uses_card(service):
            return
        residue = keys.get("vram_residue_mib", 0)
        held = {gpu: mib for gpu, mib in service.held_mib.items() if mib > residue + IDLE_MIB}
        first = max(held, key=lambda gpu: held[gpu], default=self.host.cards[0].index)
        if len(held) > 1 and not by_models:
            usable = {card.index: _usable_mib(card) for card in self.host.cards}
            by_card = {gpu: min(mib, usable[gpu]) for gpu, mib in held.items()}
            yield f"gpu: {flow(by_card)} # MiB by card, as measured now"
            return
        if first != 0 or "gpu" in keys:
            yield f"gpu: {first}"
        if not by_models:
            yield self._footprint(first, held.get(first))

    def _uses_card(self, service: Service) -> bool:
        """Say whether it is to be reckoned with: some work on the processor, as far as is seen."""
        on_processor = service.preset.consumer.get("gpu") == "none" and not service.held_mib
        return bool(self.host.cards) and not on_processor

    def _footprint(self, gpu: int, mib: int | None) -> str:
        card = next(card for card in self.host.cards if card.index == gpu)
        if mib is None or mib > _usable_mib(card):
            return "vram_resident_mib: auto # MiB that it takes; until it is measured, unknown"
        return f"vram_resident_mib: {mib} # as measured now; give the most that it takes"

    def _required(self, service: Service) -> Iterator[str]:
        for key, example in service.preset.requires.items():
            if key != "models":
                names = [model.name for model in service.models]
                known = example.replace("NAME", json.dumps(names[0])) if names else example
                yield f"{key}: {known}" + ("" if names else " # NAME is yours to fill in")

    def _models(self, service: Service) -> Iterator[str]:
        several = "models" in service.preset.requires
        mine, others = list[Model](), list[Model]()
        for model in service.models:
            names = _names(model) if several else (model.name,)
            (others if self._names & set(names) else mine).append(model)
            self._names |= set(names)
        if others:
            taken = ", ".join(model.name for model in others)
            yield from comment(f"Not named, as others have these names already: {taken}.")
        if several:
            yield from self._own_models(mine)
        elif asked := [model.name for model in mine] or list(self._usual_names(service)):
            yield f"models: {flow(asked)} # by which OpenAI's clients ask for it"

    def _own_models(self, models: Iterable[Model]) -> Iterator[str]:
        """Each is loaded and unloaded by itself."""
        footprint: dict[str, Any] = {"vram_resident_mib": "auto"} if self.host.cards else {}
        yield "models: # each is loaded and unloaded by itself; auto: as measured"
        for model in models:
            aliases = {"aliases": _names(model)[1:]} if _names(model)[1:] else {}
            size = f" # {model.mib:,} MiB of weights" if model.mib else ""
            yield f"  {flow(model.name)}: {flow({**footprint, **aliases})}{size}"
        yield f"  {flow(ANY)}: {flow(footprint)} # those that it gets later"

    def _usual_names(self, service: Service) -> Iterator[str]:
        paths = service.preset.consumer["paths"]
        for kind, (path, name) in USUAL_NAMES.items():
            understood = path in paths or paths.get(kind, {}).get("path") == path
            if kind in paths and understood and name not in self._names:
                self._names.add(name)
                yield name

    def _driver(self, service: Service) -> Iterator[str]:
        owner = self._drivers.setdefault(service.run_by, service.name)
        if service.run_by != RunBy() and owner != service.name:
            yield from comment(f"Who stops what runs {owner} stops this too: it has no driver.")
        else:
            yield from _driver(service, uses_card=self._uses_card(service))

    def _front(self, service: Service) -> Iterator[str]:
        if not service.discovery.front:
            return
        port = service.port + FRONT_OFFSET
        taken = {self.listen_port, *self.host.listening, *self._fronts}
        if port in taken or port > LAST_PORT:
            yield "# front: PORT # a free one, for its page and the clients that know no other"
            return
        self._fronts.add(port)
        yield f"front: {port} # for its page and its own clients: as if it were the service itself"


# ------------------------------------------------------------------------------------------ words


def seen(service: Service) -> str:
    """Say in a sentence what is known of it."""
    title = service.preset.title.partition(",")[0]
    version = f" {service.version}" if service.version else ""
    answers = f"Answers as {title}{version}"
    if service.discovery.guess:
        answers = f"Taken for {title}, of which no answer tells, as it is on port {service.port}"
    parts = [answers, runs(service), *([held(service)] if service.held_mib else [])]
    return ", ".join(filter(None, parts))


def _about(service: Service) -> Iterator[str]:
    yield from comment(f"{seen(service)}.")
    if service.problems:
        yield from comment(f"Not as it should be: {'; '.join(service.problems)}.")
    yield "# It needs:"
    for need in service.preset.needs:
        yield from comment(need, bullet="- ")


def runs(service: Service) -> str:
    by = service.run_by
    if by.container:
        return f"runs in the {by.engine} container {by.container}"
    return f"runs as {by.unit}{' of yours' if by.user else ''}" if by.unit else ""


def held(service: Service) -> str:
    on = ", ".join(f"{mib:,} MiB of GPU {gpu}" for gpu, mib in service.held_mib.items())
    return f"holds {on} now"


def _usable_mib(card: Card) -> int:
    return card.total_mib - GpuSettings().cushion_mib


def _names(model: Model) -> tuple[str, ...]:
    """Give all by which clients ask for it: Ollama's latest one goes without its tag too."""
    short = model.name.removesuffix(":latest")
    return (model.name,) if short == model.name else (model.name, short)


def _stranger(stranger: Stranger) -> str:
    text = f"Port {stranger.port}: {stranger.what}."
    if stranger.expected:
        names = " or ".join(stranger.expected)
        text += f" Usually {names} is there; `mgpu presets show NAME` says what it needs."
    return text


def _without_cards(error: str) -> str:
    return (
        f"No card can be read here ({error}), so every consumer has `gpu: none`: the broker queues"
        " its work and takes care of no memory. With a card that only cannot be read, give its"
        " `total_mib` here, and each consumer `vram_resident_mib` in place of `gpu: none`."
    )


def _taken_back(service: Service, *, cards: bool) -> Iterator[str]:
    """Give what is not so here of what its preset says: it uses no card, it lacks the routes."""
    keys, given = service.preset.consumer, dict[str, str]()
    residue, asked = keys.get("vram_residue_mib"), keys.get("residency")
    if not cards:
        if keys.get("gpu") != "none":
            given["gpu"] = "none # no card was seen: it needs no memory of one, and no slot"
        if isinstance(asked, Mapping) and "mib" in asked:
            given["residency"] = flow({key: asked[key] for key in ("path", "resident")})
    if not service.has_routes:
        yield from comment(
            "It runs without what its preset loads and unloads it by (see what it needs): until it"
            " has that, and the lines up to `residency` are gone, only a driver can send it out."
        )
        given |= {"load": "[]", "unload": "[]", "residency": "assumed"}
    if residue and not (cards and service.has_routes):
        given["vram_residue_mib"] = "0"
    yield from (f"{key}: {value}" for key, value in given.items())


def _driver(service: Service, *, uses_card: bool) -> Iterator[str]:
    by = service.run_by
    has_route = service.has_routes and "unload" in service.preset.consumer
    if by.container:
        yield f"driver: {flow({'container': {'name': by.container, 'engine': by.engine}})}"
    elif by.unit and by.user:
        yield f"driver: {flow({'systemd': {'unit': by.unit, 'user': True}})}"
    elif by.unit:
        # With a route of its own it works without; a unit that may not be started would be a
        # load that fails.
        off = "# " if has_route and os.geteuid() != 0 else ""
        may = "docs/operations.md says how to permit it" if os.geteuid() != 0 else "its way out"
        yield f"{off}systemd_unit: {flow(by.unit)} # {may}"
    elif uses_card and not has_route:
        yield from comment(
            "What runs it is not known, and it cannot unload by itself: without `systemd_unit` or"
            " another `driver` here it is never sent out. As root `mgpu init` sees more."
        )

"""`mgpu connect`: what to change in the usual clients, so that they go through the broker."""

import os
import socket
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

from attrs import frozen

from mgpu_effects.config_file import ConfigErrors, load_settings
from mgpu_effects.settings import ConsumerSettings, Settings
from mgpu_effects.units import ANY
from mgpu_http.auth import is_loopback
from mgpu_http.commands.output import DONE, USAGE, CommandError, document, result

NO_KEY = "unused"  # many clients refuse to start without one
WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - found in a configuration, nothing is bound here
MOST_MODELS = 12
OLLAMA, COMFYUI = ("ollama", 11434), ("comfyui", 8188)


@frozen(kw_only=True)
class Broker:
    """How clients reach it. `key` is what a shell puts in for the key."""

    settings: Settings
    host: str
    port: int
    listens_on_loopback: bool

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def key(self) -> str:
        return '"$MGPU_KEY"' if self.settings.auth.keys else NO_KEY

    def those_of(self, word: str, port: int) -> list[ConsumerSettings]:
        """Give the consumers that are this service, by preset, name or usual port."""
        return [
            one
            for one in self.settings.consumers.values()
            if (one.preset or one.name).startswith(word) or urlsplit(one.url).port == port
        ]

    def fronts(self, service: tuple[str, int]) -> Iterator[tuple[ConsumerSettings, str | None]]:
        """Give them with the address of their own on which they are reached, if they have one."""
        for one in self.those_of(*service):
            yield one, None if one.front is None else f"http://{self.host}:{one.front}"


@frozen(kw_only=True)
class Client:
    """`lines` are for a shell; what is to be read or typed elsewhere is a comment in them."""

    name: str
    title: str
    lines: Callable[[Broker], list[str]]


def connect(arguments: Namespace) -> int:
    broker = reached(read(arguments.config))
    chosen = [one for one in CLIENTS if arguments.client in {None, one.name}]
    told = {one.name: one.lines(broker) for one in chosen}
    if arguments.json:
        clients = [
            {"name": one.name, "title": one.title, "lines": told[one.name]} for one in chosen
        ]
        document({"url": broker.url, "clients": clients, "remarks": remarks(broker)})
        return DONE
    blocks = [[f"# {one.title}", *told[one.name]] for one in chosen]
    result("\n\n".join("\n".join(block) for block in [*blocks, comments(remarks(broker))]))
    return DONE


class _Environment(dict[str, str]):
    """Secrets of the broker's own are not needed here, and often not to be had."""

    def __contains__(self, _name: object) -> bool:
        return True

    def __missing__(self, _name: str) -> str:
        return "unset"


def read(path: str) -> Settings:
    try:
        return load_settings(path, _Environment(os.environ))
    except ConfigErrors as errors:
        raise CommandError(str(errors), USAGE) from errors


def reached(settings: Settings) -> Broker:
    """Take the first address that others reach, else the first one."""
    pairs = [address.rpartition(":")[::2] for address in settings.listen]
    loopback = all(is_loopback(host.strip("[]")) for host, _ in pairs)
    host, port = next((p for p in pairs if loopback or not is_loopback(p[0].strip("[]"))), pairs[0])
    if host.strip("[]") in WILDCARDS:
        host = socket.gethostname()
    return Broker(settings=settings, host=host, port=int(port), listens_on_loopback=loopback)


# ----------------------------------------------------------------------------------- the clients


def _openai(broker: Broker) -> list[str]:
    return [
        f"export OPENAI_BASE_URL={broker.url}/v1",
        f"export OPENAI_API_KEY={broker.key}",
        *_models(broker),
    ]


def _anthropic(broker: Broker) -> list[str]:
    return [
        f"export ANTHROPIC_BASE_URL={broker.url}",  # these add the /v1 themselves
        f"export ANTHROPIC_API_KEY={broker.key}",
        *_models(broker),
    ]


def _ollama(broker: Broker) -> list[str]:
    lines = []
    for one, front in broker.fronts(OLLAMA):
        lines += [f"export OLLAMA_HOST={front}"] if front else _without_front(one)
    if lines and broker.settings.auth.keys:
        lines += comments(["Ollama's client sends no key, and this broker asks for one."])
    return lines or comments(["No consumer of this broker is Ollama."])


def _open_webui(broker: Broker) -> list[str]:
    ollamas = [front for _, front in broker.fronts(OLLAMA) if front]
    return [
        f"export OPENAI_API_BASE_URL={broker.url}/v1",
        f"export OPENAI_API_KEY={broker.key}",
        *(f"export OLLAMA_BASE_URL={front}" for front in ollamas[:1]),
        *comments(
            [
                "It takes these at its first start; later: Admin Panel > Settings > Connections.",
                "In a container this host has another name, such as host.docker.internal:",
                "`allowed_hosts` needs it, and `listen` an address that is reached from there.",
            ]
        ),
    ]


def _comfyui(broker: Broker) -> list[str]:
    lines = []
    for one, front in broker.fronts(COMFYUI):
        place = [f"The page, and the server address of scripts: {front} instead of {one.url}"]
        lines += comments(place) if front else _without_front(one)
    return lines or comments(["No consumer of this broker is ComfyUI."])


def _home_assistant(broker: Broker) -> list[str]:
    """Its own speech services speak Wyoming, no HTTP: a bridge has to translate."""
    lines = comments(["Settings > Devices & services > Ollama, the URL:"])
    for one, front in broker.fronts(OLLAMA):
        lines += comments([f"  {front}"]) if front else _without_front(one)
    if not broker.those_of(*OLLAMA):
        lines = comments(["No consumer of this broker is Ollama."])
    lines += comments(["Speech, by a bridge from Wyoming such as wyoming-openai:"])
    lines += [f"export {kind}_OPENAI_URL={broker.url}/v1" for kind in ("STT", "TTS")]
    return lines + [f"export {kind}_OPENAI_KEY={broker.key}" for kind in ("STT", "TTS")]


def _without_front(one: ConsumerSettings) -> list[str]:
    port = (urlsplit(one.url).port or 80) + 1
    return comments(
        [f"{one.name} has no port of its own at the broker: give it one, as `front: {port}`"]
    )


def _models(broker: Broker) -> list[str]:
    names = [
        model
        for consumer in broker.settings.consumers.values()
        for model in consumer.models
        if model != ANY
    ]
    if not names:
        return []
    more = f" and {len(names) - MOST_MODELS} more" if len(names) > MOST_MODELS else ""
    return comments([f"models: {', '.join(names[:MOST_MODELS])}{more}"])


CLIENTS = (
    Client(
        name="openai",
        title="OpenAI's SDKs, and command-line tools that read their variables",
        lines=_openai,
    ),
    Client(
        name="anthropic",
        title="Anthropic's SDKs, and command-line tools that read their variables",
        lines=_anthropic,
    ),
    Client(name="ollama", title="Ollama's own client and SDKs", lines=_ollama),
    Client(name="open-webui", title="Open WebUI", lines=_open_webui),
    Client(name="comfyui", title="ComfyUI's page and clients", lines=_comfyui),
    Client(name="home-assistant", title="Home Assistant's voice assistant", lines=_home_assistant),
)


def remarks(broker: Broker) -> list[str]:
    said = []
    if broker.settings.auth.keys:
        names = ", ".join(key.name for key in broker.settings.auth.keys)
        said.append(f"$MGPU_KEY is a key of this broker ({names}); mgpu key add NAME makes one")
    else:
        said.append(f"this broker asks for no key; {NO_KEY!r} is for clients that want one")
    if broker.listens_on_loopback:
        said.append("it listens on loopback (`listen`): only this host reaches it")
    return said


def comments(sentences: Sequence[str]) -> list[str]:
    return [f"# {sentence}" for sentence in sentences]

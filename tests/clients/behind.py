"""A stand-in service behind a broker, to be asked directly or through it."""

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.clients.calls import MODEL, client_of
from tests.support.apis import OLLAMA_MODEL, Apis, apis
from tests.support.dev_http import free_port
from tests.support.facade import Facade, facade

# The ways to a service, by library: the first is without the broker.
WAYS = {
    "openai": ("direct", "model", "upstream", "front"),
    "anthropic": ("direct", "model", "front"),
    "ollama": ("direct", "front of ollama", "upstream of ollama"),
}


@dataclass
class Behind:
    service: Apis
    broker: Facade
    fronts: dict[str, int]
    ending: contextlib.AsyncExitStack
    clients: dict[Any, Any] = field(default_factory=dict)

    def url(self, way: str) -> str:
        """Give the address that a client is told in place of the service's."""
        return {
            "direct": self.service.url,
            "model": self.broker.url,
            "upstream": f"{self.broker.url}/upstream/any",
            "front": f"http://127.0.0.1:{self.fronts['any']}",
            "upstream of ollama": f"{self.broker.url}/upstream/ollama",
            "front of ollama": f"http://127.0.0.1:{self.fronts['ollama']}",
        }[way]

    def client(self, library: str, way: str, *, awaited: bool = True, **more: Any) -> Any:
        """Make a client that asks this way, or give the one that is there already."""
        key = (library, way, awaited, repr(more))
        if key not in self.clients:
            made = self.clients[key] = client_of(library, self.url(way), awaited=awaited, **more)
            close = self.ending.push_async_callback if awaited else self.ending.callback
            close(made.close)
        return self.clients[key]

    async def served(self, name: str) -> int:
        return (await self.broker.status())["consumers"][name]["total_requests"]

    async def at_rest(self) -> None:
        """Wait until nobody waits or is served, here and there."""
        await self.broker.until("at rest", lambda s: not s["requests"] and not self.service.working)


@contextlib.asynccontextmanager
async def behind(directory: Path, **keys: Any) -> AsyncIterator[Behind]:
    """One service under two names: one that any library speaks to, and as its preset has Ollama.

    `keys` are more keys of the first, or the file's where they are none of a consumer. With another
    `url` it is down.
    """
    top = {name: keys.pop(name) for name in ("auth", "max_body_mib") if name in keys}
    fronts = {"any": free_port(), "ollama": free_port()}
    async with apis() as service:
        some = {"url": service.url, "health": {"path": "/health"}, "front": fronts["any"]}
        ollama = {"preset": "ollama", "url": service.url, "front": fronts["ollama"]}
        models = {OLLAMA_MODEL: {"vram_resident_mib": 6_000}}
        content = {
            "listen": "127.0.0.1:0",
            "gpu": {"sampler": "none", "total_mib": 24_000},
            "probe": {"interval_s": 0.2, "timeout_s": 5},
            "consumers": {
                "any": {**some, "models": [MODEL], **keys},
                "ollama": {**ollama, "models": models},
            },
            **top,
        }
        with mock.patch.dict(os.environ, NO_PROXY="127.0.0.1"):
            async with facade(directory, content) as broker, contextlib.AsyncExitStack() as ending:
                here = Behind(service, broker, fronts, ending)
                if "auth" not in top:
                    await broker.until("up", lambda s: _ready(s, down="url" in keys))
                yield here


def _ready(status: Any, *, down: bool) -> bool:
    rows = status["consumers"]
    any_ = next(row for name, row in rows.items() if name.startswith("any"))
    return any_["healthy"] is not down and rows[f"ollama/{OLLAMA_MODEL}"]["loaded"]

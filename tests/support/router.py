"""A stand-in for llama.cpp's server in router mode, in a process of its own, as recorded.

Several models behind one address. Each holds memory of its own on a simulated card, under the name
SERVICE/MODEL. Its traps: a load is answered before it is done, and what comes meanwhile gets a 500;
a model that works stays `loaded` for a while after its unload; a load that finds no memory is
answered as a good one and leaves `failed`.
"""

import asyncio
import json
import os
import re
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.gpu_service import Card, journal
from tests.support.upstream import IDLE_S, Request, Server


@dataclass(frozen=True)
class Models:
    name: str
    directory: str  # where the card and the journal of its host are
    mib: dict[str, int] = field(default_factory=dict)
    load_s: float = 0.1
    lingers_s: float = 1  # how long a model that works is loaded still after its unload
    autoload: bool = False
    port: int = 0  # 0: a free one


def told(body: object, status: int = 200) -> dict[str, str]:
    return {"do": "text", "status": str(status), "body": json.dumps(body)}


def refused(message: str, status: int = 400) -> dict[str, str]:
    return told({"error": {"code": status, "message": message}}, status)


def asked(body: bytes) -> str:
    """Give the model that JSON or a form asks for."""
    if in_form := re.search(rb'form-data; name="model"\r\n\r\n(.*)\r\n', body):
        return in_form[1].decode()
    return str(json.loads(body or b"{}").get("model", ""))


class Router(Server):
    def __init__(self, models: Models) -> None:
        super().__init__(IDLE_S)
        self._models = models
        self._card = Card(Path(models.directory))
        self._value = dict.fromkeys(models.mib, "unloaded")
        self._failed: set[str] = set()
        self._working = dict.fromkeys(models.mib, 0)
        self._unloading: set[str] = set()

    async def watched(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request
    ) -> bool:
        path = urlsplit(request.target).path
        model = asked(request.body)
        if path == "/health":
            request.orders = {**request.orders, **told({"status": "ok"})}
            return await super().watched(reader, writer, request)
        if path == "/models":
            request.orders = {**request.orders, **told({"data": [*map(self._row, self._value)]})}
            return await super().watched(reader, writer, request)
        with journal(Path(self._models.directory)).open("a") as lines:
            lines.write(f"{self._models.name} {request.method} {path} {model}\n")
        if path in {"/models/load", "/models/unload"}:
            act = self._load if path == "/models/load" else self._unload
            request.orders = {**request.orders, **act(model)}
            return await super().watched(reader, writer, request)
        if self._models.autoload and model in self._value:
            self._load(model)
            while self._value[model] == "loading":  # noqa: ASYNC110 - as a client sees it
                await asyncio.sleep(0.01)
        return await self._work(reader, writer, request, model)

    def _row(self, model: str) -> dict[str, object]:
        failed = {"failed": True, "exit_code": 1} if model in self._failed else {}
        return {"id": model, "object": "model", "status": {"value": self._value[model], **failed}}

    async def _work(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        request: Request,
        model: str,
    ) -> bool:
        value = self._value.get(model)
        if value is None:
            request.orders = {**request.orders, **refused(f"model '{model}' not found", 404)}
        elif value == "unloaded":
            request.orders = {**request.orders, **refused("model is not loaded")}
        elif value == "loading" or model in self._unloading:
            proxy = "proxy error: Could not establish connection"
            request.orders = {**request.orders, **refused(proxy, 500)}
        if request.number("status", 200) != 200:
            return await super().watched(reader, writer, request)
        self._working[model] += 1
        working = sum(self._working.values())
        self.counts["most_working"] = max(self.counts["most_working"], working)
        try:
            return await super().watched(reader, writer, request)
        finally:
            self._working[model] -= 1

    def _load(self, model: str) -> dict[str, str]:
        if model not in self._value:
            return refused(f"model '{model}' not found", 404)
        if self._value[model] != "unloaded":
            return refused("model is already running")
        self._value[model] = "loading"
        self._later(self._models.load_s, self._loaded, model)
        return told({"success": True})

    def _loaded(self, model: str) -> None:
        enough = self._card.take(self._named(model), self._models.mib[model])
        self._value[model] = "loaded" if enough else "unloaded"
        (self._failed.discard if enough else self._failed.add)(model)

    def _unload(self, model: str) -> dict[str, str]:
        if self._value.get(model, "unloaded") == "unloaded":
            return refused("model is not running")
        self._unloading.add(model)
        lingers_s = self._models.lingers_s if self._working[model] else 0.02
        self._later(lingers_s, self._unloaded, model)
        return told({"success": True})

    def _unloaded(self, model: str) -> None:
        self._unloading.discard(model)
        self._value[model] = "unloaded"
        self._card.give_back(self._named(model))

    def _named(self, model: str) -> str:
        return f"{self._models.name}/{model}"

    def _later(self, seconds: float, act: object, model: str) -> None:
        asyncio.get_running_loop().call_later(seconds, act, model)

    def give_back(self) -> None:
        for model in self._value:
            self._card.give_back(self._named(model))


async def main(models: Models) -> None:
    router = Router(models)
    server = await asyncio.start_server(router.connection, "127.0.0.1", models.port)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print(server.sockets[0].getsockname()[1], flush=True)
    await ended.wait()
    router.give_back()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(Models(**json.loads(sys.argv[1]))))

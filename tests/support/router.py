"""A stand-in for llama.cpp's server in router mode, in a process of its own, as recorded.

Several models behind one address. Each holds memory of its own on a simulated card, under the name
SERVICE/MODEL. Its traps: a load is answered before it is done, and what comes meanwhile gets a 500,
or with `autoload` waits; a model that works stays `loaded` for a while after its unload, which then
breaks off its work and leaves `failed`; so does a load that finds no memory, which is answered as a
good one.
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
from tests.support.upstream import IDLE_S, Request, Server, answer


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
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(status, "server_error")
    return told({"error": {"code": status, "message": message, "type": kind}}, status)


def asked(body: bytes) -> str:
    """Give the model that JSON or a form asks for."""
    if in_form := re.search(rb'form-data; name="model"\r\n\r\n(.*)\r\n', body):
        return in_form[1].decode()
    return str(json.loads(body or b"{}").get("model", ""))


async def broken_off(writer: asyncio.StreamWriter, request: Request) -> bool:
    """End work as the router does whose model died: a stream as if it were complete."""
    text = b"proxy error: Failed to read connection"
    if request.orders.get("do") != "stream":
        request.orders = {**request.orders, "status": "500"}
        return await answer(writer, request, text, "application/json")
    writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(text), text))
    await writer.drain()
    return False


class Router(Server):
    def __init__(self, models: Models) -> None:
        super().__init__(IDLE_S)
        self._models = models
        self._card = Card(Path(models.directory))
        self._value = dict.fromkeys(models.mib, "unloaded")
        self._failed: set[str] = set()
        self._working: dict[str, set[asyncio.Task[bool]]] = {model: set() for model in models.mib}
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
            await self._ready(model)
        return await self._work(reader, writer, request, model)

    async def _ready(self, model: str) -> None:
        """Wait until it is loaded, anew where it is told to go, or has failed."""
        while model in self._unloading:  # noqa: ASYNC110 - as a client sees it
            await asyncio.sleep(0.01)
        self._load(model)
        while self._value[model] == "loading":  # noqa: ASYNC110 - as a client sees it
            await asyncio.sleep(0.01)

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
        if not model:
            missing = "model name is missing from the request"
            request.orders = {**request.orders, **refused(missing)}
        elif value is None:
            request.orders = {**request.orders, **refused(f"model '{model}' not found")}
        elif value == "unloaded" and self._models.autoload:
            failed = f"model name={model} failed to load"
            request.orders = {**request.orders, **refused(failed, 500)}
        elif value == "unloaded":
            request.orders = {**request.orders, **refused("model is not loaded")}
        elif value == "loading" or model in self._unloading:
            proxy = "proxy error: Could not establish connection"
            request.orders = {**request.orders, **refused(proxy, 500)}
        if request.number("status", 200) != 200:
            return await super().watched(reader, writer, request)
        work = asyncio.create_task(super().watched(reader, writer, request))
        self._working[model].add(work)
        working = sum(map(len, self._working.values()))
        self.counts["most_working"] = max(self.counts["most_working"], working)
        try:
            return await work
        except asyncio.CancelledError:
            return await broken_off(writer, request)
        finally:
            self._working[model].discard(work)

    def _load(self, model: str) -> dict[str, str]:
        if model not in self._value:
            return refused("File Not Found", 404)
        if self._value[model] != "unloaded":
            return refused("model is already running")
        self._failed.discard(model)
        self._value[model] = "loading"
        self._later(self._models.load_s, self._loaded, model)
        return told({"success": True})

    def _loaded(self, model: str) -> None:
        if self._value[model] != "loading":
            return  # unloaded meanwhile
        enough = self._card.take(self._named(model), self._models.mib[model])
        self._value[model] = "loaded" if enough else "unloaded"
        (self._failed.discard if enough else self._failed.add)(model)

    def _unload(self, model: str) -> dict[str, str]:
        if model not in self._value:
            return refused("model is not found")
        if self._value[model] == "unloaded":
            return refused("model is not running")
        self._unloading.add(model)
        lingers_s = self._models.lingers_s if self._working[model] else 0.02
        self._later(lingers_s, self._unloaded, model)
        return told({"success": True})

    def _unloaded(self, model: str) -> None:
        self._unloading.discard(model)
        if self._working[model] or self._value[model] == "loading":
            self._failed.add(model)  # it is killed
        self._value[model] = "unloaded"
        for work in self._working[model]:
            work.cancel()
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

"""`mgpu serve`: the broker, its façade, signals, and an orderly end."""

import asyncio
import json
import logging
import resource
import signal
import socket
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from attrs import evolve
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from starlette.types import ASGIApp

from mgpu_effects.broker import Broker
from mgpu_effects.clock import Clock
from mgpu_effects.config_file import ConfigErrors, load_settings
from mgpu_effects.errors import BrokerError
from mgpu_effects.reading import ConfigError
from mgpu_effects.settings import Settings
from mgpu_effects.tunnel import MAX_MESSAGE_BYTES
from mgpu_http.app import Facade, make_app
from mgpu_http.connection import Connection
from mgpu_http.service_manager import ServiceManager

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
OPEN_FILES = 8 * MAX_CONNECTIONS  # per request: its connection, the service's, a temporary file
BACKLOG = 256
KEEP_ALIVE_S = 20  # also how long a client may take for the head of its request
# Beyond this Hypercorn ends the connection with a bare 431; below it the façade refuses.
MAX_HEAD_BYTES = 128 * 1024
NEEDS_RESTART = ("listen", "event_log")
# TCP asks a client that is silent for so long whether it is still there, so often, so many times:
# nothing else would ever notice that the other end of an idle WebSocket has vanished.
KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
LAST_ANSWERS_S = 5  # between the end of the broker and the end of all connections

TOO_MANY = BrokerError(
    code="overloaded",
    message=f"{MAX_CONNECTIONS} connections are open, which is the limit",
    retryable=True,
    retry_after=1,
)


class Server:
    """Accepts connections and serves them, until it is told to stop."""

    def __init__(self) -> None:
        self._config = hypercorn_config()
        self._context = WorkerContext(None)
        self._listeners: list[asyncio.Server] = []
        self.connections: dict[asyncio.Task[None], Connection] = {}

    async def listen(self, sock: socket.socket, app: ASGIApp) -> asyncio.Server:
        """Serve what comes there by the application; closing what this gives ends that."""
        wrapped = ASGIWrapper(app)  # type: ignore[arg-type]
        accept = partial(self._accept, wrapped)
        listener = await asyncio.start_server(accept, sock=sock, backlog=BACKLOG)
        self._listeners.append(listener)
        return listener

    def stop_accepting(self) -> None:
        for listener in self._listeners:
            listener.close()

    async def close(self) -> None:
        """End idle connections now, and those that are still answered after `LAST_ANSWERS_S`."""
        await self._context.terminated.set()
        for connection in self.connections.values():
            connection.close_if_idle()
        if self.connections:
            await asyncio.wait(self.connections, timeout=LAST_ANSWERS_S)
        for task in self.connections:
            task.cancel()
        await asyncio.gather(*self.connections, return_exceptions=True)

    async def _accept(
        self, app: ASGIWrapper, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if len(self.connections) >= MAX_CONNECTIONS:
            await turn_away(writer)
            return
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        connection = Connection(app, loop, self._config, self._context, {}, reader, writer)
        self.connections[task] = connection
        try:
            await connection
        except asyncio.CancelledError:
            pass  # by `close`; asyncio's streams would log a cancelled task as an error
        finally:
            del self.connections[task]


def hypercorn_config() -> Config:
    config = Config()
    config.include_server_header = False
    config.include_date_header = False  # the upstream's passes; `Reply` adds one of ours
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.h11_max_incomplete_size = MAX_HEAD_BYTES
    config.websocket_max_message_size = MAX_MESSAGE_BYTES
    config.errorlog = logging.getLogger("hypercorn.error")
    return config


async def turn_away(writer: asyncio.StreamWriter) -> None:
    body = json.dumps(TOO_MANY.to_json()).encode()
    head = (
        f"HTTP/1.1 {TOO_MANY.status} Too Many Requests\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: {TOO_MANY.retry_after}\r\n"
        "Connection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    writer.close()


def bind(addresses: Iterable[str]) -> list[socket.socket]:
    """Open the listening sockets; raises OSError that names the address."""
    sockets = []
    for address in addresses:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            sock = socket.create_server((host, int(port)), family=family_of(host))
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}") from error
        # asyncio sets it only on sockets that name their protocol; connections inherit it. Without
        # it the end of an answer waits 40 ms for the client to confirm its beginning.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sockets.append(sock)
    return sockets


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class Fronts:
    """The ports at which the broker stands for single services, as the configuration has them."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._app: Facade | None = None
        self._open: dict[str, asyncio.Server] = {}

    async def begin(self, app: Facade, settings: Settings) -> None:
        """Open those of the first configuration; raises OSError that names the address."""
        self._app = app
        await self.follow(settings)

    async def follow(self, settings: Settings) -> None:
        """Open what is new, then close what is no more.

        Raises OSError where an address is taken, and then nothing has changed.
        """
        assert self._app is not None
        wanted = {address for addresses in settings.fronts.values() for address in addresses}
        new = sorted(wanted - self._open.keys())
        for address, sock in zip(new, bind(new), strict=True):
            self._open[address] = await self._server.listen(sock, self._app.front(address))
        for address in self._open.keys() - wanted:
            self._open.pop(address).close()


class Reloader:
    """Reads the file anew, and lets the broker go on with the old one where it is wrong."""

    def __init__(self, broker: Broker, path: Path, manager: ServiceManager, fronts: Fronts) -> None:
        self._broker = broker
        self._path = path
        self._manager = manager
        self._fronts = fronts

    async def __call__(self) -> None:
        """Take the new configuration over; raises `ConfigErrors`."""
        with self._manager.reloading():
            await self._reload()

    async def _reload(self) -> None:
        new = await asyncio.to_thread(load_settings, self._path)
        for name in NEEDS_RESTART:
            old = getattr(self._broker.settings, name)
            if getattr(new, name) != old:
                log.warning("a new `%s` takes effect with the next start", name)
                new = evolve(new, **{name: old})
        try:
            await self._fronts.follow(new)
        except OSError as error:
            raise ConfigErrors((ConfigError(str(self._path), 1, 1, "", str(error)),)) from error
        await self._broker.reload(new)
        log.info("%s was read anew", self._path)

    async def on_signal(self) -> None:
        try:
            await self()
        except ConfigErrors as errors:
            log.warning("the old configuration goes on:\n%s", errors)


async def serve(path: Path) -> int:
    """Run the broker until SIGTERM or SIGINT; give the exit code.

    The order of the end: accept nothing more, refuse those who wait and let those served finish
    (`Broker.stop`), and only then close the connections.
    """
    manager = ServiceManager()
    clock = Clock()
    broker = Broker(load_settings(path), clock=clock)
    allow_open_files()
    sockets = bind(broker.settings.listen)
    server = Server()
    fronts = Fronts(server)
    reloader = Reloader(broker, path, manager, fronts)
    app = make_app(broker, clock, reloader)
    stopping = asyncio.Event()
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = asyncio.create_task(reloader.on_signal())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, reload)
    await fronts.begin(app, broker.settings)
    await broker.start()
    for sock in sockets:
        await server.listen(sock, app)
    urls = [url_of(sock) for sock in sockets]
    for url in urls:
        log.info("listening on %s", url)
    for consumer, addresses in broker.settings.fronts.items():
        log.info("listening for clients of %s on %s", consumer, " ".join(addresses))
    manager.tell("READY=1", f"STATUS=listening on {' '.join(urls)}")
    beats = asyncio.create_task(manager.keep_alive(broker.takes_events))
    failed = await first(stopping, broker.failed) is broker.failed
    beats.cancel()
    manager.tell("STOPPING=1", "STATUS=ending: what is served has its time")
    server.stop_accepting()
    await broker.stop()
    await server.close()
    return 1 if failed else 0


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def first(*events: asyncio.Event) -> asyncio.Event:
    """Wait until one of them is set, and give it."""
    waits = {asyncio.create_task(event.wait()): event for event in events}
    done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    return waits[done.pop()]


def allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

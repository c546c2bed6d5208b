"""One request of one client, as the handlers see it, and the broker that they ask."""

from collections.abc import Awaitable, Callable, Iterator
from itertools import count

from attrs import define, field

from mgpu_effects.broker import Broker
from mgpu_effects.clock import Clock
from mgpu_effects.jobs import Socket
from mgpu_http.auth import Caller
from mgpu_http.body import Intake
from mgpu_http.metrics import Metrics
from mgpu_http.respond import JobResponder, Reply


@define(kw_only=True, eq=False)
class Exchange:
    """What one request is answered with."""

    id: str  # ours: X-Mgpu-Request
    intake: Intake
    reply: Reply
    responder: JobResponder
    socket: Socket | None = None  # it came as a WebSocket
    caller: Caller = field(factory=Caller)
    kind: str | None = None  # of work, None where it asks the broker itself
    consumer: str = ""  # who does the work; empty before that is known


@define(kw_only=True, eq=False)
class Service:
    """What lives as long as the server. `reload` raises `ConfigErrors`."""

    broker: Broker
    clock: Clock
    metrics: Metrics
    reload: Callable[[], Awaitable[None]]
    _numbers: Iterator[int] = field(factory=lambda: count(1))

    def new_id(self) -> str:
        """Name a request."""
        return f"{self.broker.run}-{next(self._numbers)}"

"""GET /v1/events: each record of the event log as it happens, and from any event on that is kept.

    id: 1f3a77c2-17
    data: {"seq":17,"at":...,"event":{...},"effects":[...],"notes":[...],"crc":"9ae1f03b"}

The data are the bytes of the line in the log. A client that has to connect again sends the id of
the last event that it has, and gets what it missed: from memory, or else from the files. Who reads
so slowly that what it has not got yet is no longer in memory is told so, and ends.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from itertools import islice
from typing import Any, TypeAlias

from attrs import frozen
from starlette.requests import Request
from starlette.responses import Response

from mgpu_effects.broker import Broker
from mgpu_effects.errors import BrokerError
from mgpu_effects.event_log import EventLogError, Line, PastError, encode_gap, past
from mgpu_effects.waiting import within
from mgpu_http.exchange import Exchange, Service
from mgpu_http.respond import Reply

MOST_LISTENERS = 64
# So often something is sent where nothing happens, so that nobody on the way thinks it is over.
HEARTBEAT_S = 15.0
RETRY_MS = 1_000
# Read from files, and sent, in one piece.
PIECE_EVENTS = 128
JSON_LINES = {"application/jsonl", "application/x-ndjson"}

TOO_MANY = BrokerError(
    code="overloaded",
    message=f"{MOST_LISTENERS} clients listen to events, which is the limit",
    retryable=True,
    retry_after=1,
)
TOO_SLOW = BrokerError(
    code="overloaded",
    message="events come faster than they are read here, and those that come next are no longer in"
    " memory: connect again with the id of the last one",
    retryable=True,
)


Pieces: TypeAlias = AsyncGenerator[Sequence[Line], None]


@frozen
class Place:
    """After which event: its run and number."""

    run: str
    seq: int

    def __str__(self) -> str:
        return f"{self.run}-{self.seq}"


async def events(service: Service, exchange: Exchange, request: Request) -> Response | None:
    broker = service.broker
    accepted = {one.split(";")[0].strip() for one in request.headers.get("accept", "").split(",")}
    form: Form = JsonLines() if accepted & JSON_LINES else ServerSent()
    place = _place(broker, request)
    if broker.live.listeners >= MOST_LISTENERS:
        raise TOO_MANY
    async with aclosing(Following(broker, place).lines()) as lines:
        first = await anext(lines)  # what is wrong with the place shows here
        headers = {"content-type": form.media_type, "cache-control": "no-store"}
        if request.method == "HEAD":
            return Response(headers=headers)
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await exchange.reply.send(
            {"type": "http.response.start", "status": 200, "headers": encoded}
        )
        await _send(exchange.reply, form.beginning(place) + b"".join(map(form.line, first)))
        await _send_all(exchange, form, lines)
    return None


async def _send_all(exchange: Exchange, form: "Form", lines: Pieces) -> None:
    """Send what comes, until there is no more, or the client has left."""
    reply = exchange.reply
    leaving: asyncio.Future[Any] = asyncio.ensure_future(exchange.intake.gone.wait())
    try:
        while not reply.over and (piece := await _next(lines, leaving)) is not None:
            await _send(reply, b"".join(map(form.line, piece)) or form.heartbeat)
    except BrokerError as error:
        await _send(reply, form.error(error))
    finally:
        leaving.cancel()
    await reply.send({"type": "http.response.body", "body": b"", "more_body": False})


async def _next(lines: Pieces, leaving: "asyncio.Future[Any]") -> Sequence[Line] | None:
    """Give the next piece; None: there is none, or nobody for it."""
    coming = asyncio.ensure_future(anext(lines, None))
    try:
        await asyncio.wait((coming, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not coming.done():
            coming.cancel()
            await asyncio.wait((coming,))
    return None if coming.cancelled() else await coming


async def _send(reply: Reply, body: bytes) -> None:
    if body:
        await reply.send({"type": "http.response.body", "body": body, "more_body": True})


def _place(broker: Broker, request: Request) -> Place:
    """Give the place that the client asks for; where it asks for none, here and now."""
    given = request.headers.get("last-event-id") or request.query_params.get("since")
    if not given:
        return Place(broker.run, broker.live.seq)
    run, _, seq = given.rpartition("-")
    if not run or not (seq.isascii() and seq.isdecimal()) or len(seq) > 18:
        raise BrokerError(
            code="bad_request",
            message=f"{given[:80]!r} is no id of an event: it is given as RUN-SEQ, as in `id:`",
        )
    if run == broker.run and int(seq) > broker.live.seq:
        raise BrokerError(code="not_found", message=f"event {seq} of run {run} is still to come")
    return Place(run, int(seq))


# ------------------------------------------------------------------------------------ the lines


class Following:
    """Gives the lines after a place, piece by piece; an empty one now and then where none comes.

    Raises `not_found` for a place that is no longer kept, before the first piece; `overloaded`
    where who takes the pieces is too slow.
    """

    def __init__(self, broker: Broker, place: Place) -> None:
        self._broker = broker
        self._live = broker.live
        self._place = place

    async def lines(self) -> Pieces:
        with self._live.listening() as woken:
            if not self._is_here():
                async for piece in self._past():
                    yield piece
            else:
                yield []
            while (came := self._live.after(self._place.seq)) is not None:
                woken.clear()
                if came:
                    for piece in _pieces(came):
                        self._place = Place(self._live.run, piece[-1].seq)
                        yield piece
                elif self._live.closed:
                    return
                else:
                    try:
                        await within(HEARTBEAT_S, woken.wait())
                    except TimeoutError:
                        yield []
            raise TOO_SLOW

    def _is_here(self) -> bool:
        here = self._live.after(self._place.seq) is not None
        return here and self._place.run == self._live.run

    async def _past(self) -> Pieces:
        """Catch up from the files, at the client's pace, until the rest is in memory."""
        while True:
            began, place = self._place.seq, self._place
            try:
                found = await asyncio.to_thread(past, self._broker.log_dir, place.run, place.seq)
            except PastError as error:
                raise _gone(error) from error
            except EventLogError as error:
                raise BrokerError(code="not_found", message=str(error)) from error
            while piece := await asyncio.to_thread(_some, found):
                self._place = Place(piece[-1].run, piece[-1].seq)
                yield piece
            if self._live.after(self._place.seq) is not None:
                return
            if self._place.seq == began:  # the disk had no room for what came next
                yield [self._lost()]

    def _lost(self) -> Line:
        last = self._live.first
        text = encode_gap(self._place.seq + 1, last)
        self._place = Place(self._live.run, last)
        return Line(self._live.run, last, text)


def _some(lines: Iterator[Line]) -> Sequence[Line]:
    return list(islice(lines, PIECE_EVENTS))


def _pieces(lines: Sequence[Line]) -> list[Sequence[Line]]:
    return [lines[n : n + PIECE_EVENTS] for n in range(0, len(lines), PIECE_EVENTS)]


def _gone(error: PastError) -> BrokerError:
    go_on = f"; the oldest that is kept comes after {error.first}" if error.first else ""
    return BrokerError(code="not_found", message=f"{error}{go_on}")


# ------------------------------------------------------------------------------------- the form


class ServerSent:
    """Server-sent events, as a browser's EventSource reads them."""

    media_type = "text/event-stream"
    heartbeat = b":\n\n"

    def beginning(self, place: Place) -> bytes:
        """Say where it begins: who loses the connection before the first event can go on too."""
        return b"retry: %d\nid: %b\n\n" % (RETRY_MS, str(place).encode())

    def line(self, line: Line) -> bytes:
        return b"id: %b-%d\ndata: %b\n" % (line.run.encode(), line.seq, line.text)

    def error(self, error: BrokerError) -> bytes:
        return b"event: error\ndata: %b\n\n" % _encoded(error.to_json())


class JsonLines:
    """The lines as they stand in the log; the last one may be an error."""

    media_type = "application/jsonl"
    heartbeat = b""

    def beginning(self, _place: Place) -> bytes:
        return b""

    def line(self, line: Line) -> bytes:
        return line.text

    def error(self, error: BrokerError) -> bytes:
        return _encoded(error.to_json()) + b"\n"


Form = ServerSent | JsonLines


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode("ascii")

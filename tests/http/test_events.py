"""GET /v1/events over real connections: everything, in order, once, also after a reconnect."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mgpu_core.events import Cancel, Drain
from mgpu_http import events, respond
from mgpu_http.auth import hash_key
from tests.support.facade import LIMIT_S, Client, Facade, config, facade
from tests.support.upstream import Upstream, eventually

SEEN = "GET", "/v1/events"


@dataclass
class Listener:
    """Reads server-sent events, as a browser does."""

    client: Client
    last_id: str = ""
    retry: str = ""
    comments: int = 0
    _rest: bytes = field(default=b"")

    async def next(self) -> dict[str, str] | None:
        """Give the next event with its fields; None: the stream has ended."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                while b"\n\n" not in self._rest:
                    size = int(await self.client.reader.readuntil(b"\r\n"), 16)
                    self._rest += await self.client.reader.readexactly(size)
                    await self.client.reader.readexactly(2)
                    if not size:
                        return None
                block, self._rest = self._rest.split(b"\n\n", 1)
                lines = [line.split(": ", 1) for line in block.decode().split("\n")]
                if lines == [[":"]]:
                    self.comments += 1
                    continue
                told = dict(line for line in lines if len(line) == 2)
                self.last_id = told.get("id", self.last_id)
                self.retry = told.get("retry", self.retry)
                if "data" in told:
                    return told

    async def until(self, kind: str) -> list[dict[str, Any]]:
        """Give the records up to the first event of that type."""
        records = []
        while not records or records[-1]["event"]["type"] != kind:
            told = await self.next()
            assert told is not None, records
            assert set(told) == {"id", "data"}
            records.append(json.loads(told["data"]))
            assert told["id"].rpartition("-")[2] == str(records[-1]["seq"])
        return records

    async def rest(self) -> list[dict[str, str]]:
        told = []
        while (one := await self.next()) is not None:
            told.append(one)
        return told


@asynccontextmanager
async def listening(
    broker: Facade, *headers: str, target: str = "/v1/events"
) -> AsyncIterator[Listener]:
    async with broker.connect() as client:
        await client.send("GET", target, *headers)
        head = await client.head()
        assert head.status == 200
        assert head.headers["content-type"] == "text/event-stream"
        yield Listener(client)


def written(broker: Facade) -> list[bytes]:
    """Give the lines of the events in the log, as they stand there."""
    files = sorted(broker.path.parent.glob("log/events-*.jsonl"), key=lambda p: p.name[-16:])
    lines = [line for path in files for line in path.read_bytes().splitlines(keepends=True)]
    return [line for line in lines if line.startswith(b'{"seq"')]


async def test_a_request_is_followed_from_its_arrival_to_its_end(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream)) as broker, listening(broker) as listener:
        answer = await broker.ask("POST", "/v1/tts", body=b"text")
        records = [*await listener.until("Request"), *await listener.until("ServeDone")]
        asked = next(one for one in records if one["event"]["type"] == "Request")
        request = answer.headers["x-mgpu-request"]
        assert asked["event"]["request"] == request
        assert {"type": "Serve", "request": request, "consumer": "worker"} in asked["effects"]
        assert records[-1]["event"]["request"] == request
        seqs = [one["seq"] for one in records]
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
        assert listener.retry == "1000"


async def test_the_data_are_the_bytes_of_the_log(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        target = f"/v1/events?since={broker.broker.run}-0"
        async with listening(broker, target=target) as listener:
            await broker.ask("POST", "/v1/drain")
            told = [await listener.next()]
            while json.loads(told[-1]["data"])["event"]["type"] != "Drain":
                told.append(await listener.next())
            lines = written(broker)[: len(told)]
            assert [one["data"].encode() + b"\n" for one in told] == lines
            assert json.loads(lines[0])["seq"] == 1


async def test_as_json_lines_it_is_the_log_itself(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker, broker.connect() as client:
        target = f"/v1/events?since={broker.broker.run}-0"
        await client.send("GET", target, "Accept: application/jsonl")
        assert (await client.head()).headers["content-type"] == "application/jsonl"
        size = int(await client.reader.readuntil(b"\r\n"), 16)
        piece = await client.reader.readexactly(size)
        assert piece == b"".join(written(broker)[: piece.count(b"\n")])


@pytest.mark.parametrize("kept", [10_000, 3])
async def test_who_connects_again_gets_what_was_missed_once(tmp_path: Path, kept: int) -> None:
    """From memory, or from the files where that holds three events."""
    async with facade(tmp_path, config(None)) as broker:
        broker.broker.live.kept_events = kept
        seen = []
        async with listening(broker) as listener:
            await broker.ask("POST", "/v1/drain")
            seen += await listener.until("Drain")
            last = listener.last_id
        for _ in range(50):
            await broker.ask("POST", "/v1/resume")
        async with listening(broker, f"Last-Event-ID: {last}") as listener:
            assert listener.last_id == ""
            for _ in range(50):
                seen += await listener.until("Resume")
            await broker.ask("POST", "/v1/consumers/worker/pin")
            seen += await listener.until("Pin")
        seqs = [one["seq"] for one in seen]
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
        by_seq = {json.loads(line)["seq"]: json.loads(line) for line in written(broker)}
        assert seen == [by_seq[seq] for seq in seqs]


async def test_it_goes_on_in_the_next_run_of_the_broker(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker, listening(broker) as listener:
        await broker.ask("POST", "/v1/drain")
        last = (await listener.until("Drain"))[-1]["seq"]
        place = listener.last_id
    async with facade(tmp_path, config(None)) as broker:
        async with listening(broker, f"Last-Event-ID: {place}") as listener:
            records = await listener.until("Started")
        assert [one["seq"] for one in records] == list(range(last + 1, last + len(records) + 1))
        assert "Shutdown" in [one["event"]["type"] for one in records]
        assert listener.last_id.startswith(broker.broker.run)
        # What the last run left is being compressed.
        old = [
            path
            for path in (tmp_path / "log").glob("events-*.jsonl")
            if broker.broker.run not in path.name
        ]
        await eventually(lambda: not any(path.exists() for path in old))
        for path in (tmp_path / "log").glob("events-*.gz"):
            path.unlink()
        gone = await broker.ask(*SEEN, f"Last-Event-ID: {place}")
        assert (gone.status, gone.error) == (404, "not_found")
        oldest = f"{broker.broker.run}-{records[-1]['seq'] - 1}"
        assert gone.json()["message"].endswith(f"the oldest that is kept comes after {oldest}")
        async with listening(broker, target=f"/v1/events?since={oldest}") as listener:
            assert (await listener.until("Started"))[-1]["seq"] == records[-1]["seq"]


async def test_what_is_damaged_in_between_is_a_gap(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        for _ in range(3):
            await broker.ask("POST", "/v1/drain")
        broker.broker.live.kept_events = 0
        await broker.ask("POST", "/v1/resume")
        (path,) = (tmp_path / "log").glob("events-*.jsonl")
        lines = path.read_bytes().splitlines(keepends=True)
        place = next(n for n, line in enumerate(lines) if b'"Drain"' in line)
        lines[place] = lines[place].replace(b'"Drain"', b'"Train"')
        path.write_bytes(b"".join(lines))
        async with listening(broker, target=f"/v1/events?since={broker.broker.run}-0") as listener:
            told = [json.loads((await listener.next() or {})["data"]) for _ in range(place + 1)]
        assert (told[place - 1]["first"], told[place - 1]["last"]) == (place, place)
        assert told[place]["seq"] == place + 1


async def test_who_is_too_slow_is_cut_and_can_go_on(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker, listening(broker) as listener:
        await broker.ask("POST", "/v1/drain")
        await listener.until("Drain")
        long = "x" * 20_000
        for number in range(2_000):  # more than sockets take, and memory keeps
            await broker.broker.apply(
                lambda at, number=number: Cancel(at=at, request=f"{number}-{long}")
            )
        told = await listener.rest()
        assert told[-1]["event"] == "error"
        error = json.loads(told[-1]["data"])
        assert (error["error"], error["retryable"]) == ("overloaded", True)
        assert "connect again with the id of the last one" in error["message"]
        await broker.ask("POST", "/v1/resume")
        seqs = [json.loads(one["data"])["seq"] for one in told[:-1]]
        async with listening(broker, f"Last-Event-ID: {told[-2]['id']}") as again:
            seqs += [one["seq"] for one in await again.until("Resume")]
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
        assert len(seqs) > 2_000


async def test_who_takes_nothing_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(respond, "TAKES_NOTHING_S", 0.2)
    async with facade(tmp_path, config(None)) as broker, listening(broker):
        assert broker.broker.live.listeners == 1
        async with asyncio.timeout(LIMIT_S):
            while broker.broker.live.listeners:
                await broker.broker.apply(lambda at: Cancel(at=at, request="x" * 100_000))


async def test_the_end_of_the_broker_is_the_end_of_the_stream(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        target = f"/v1/events?since={broker.broker.run}-0"
        async with listening(broker, target=target) as listener:
            broker.server.stop_accepting()
            ending = asyncio.create_task(broker.broker.stop())
            told = await listener.rest()
            await ending
            assert any('"Shutdown"' in one["data"] for one in told)
            await broker.server.close()
            assert await listener.client.closed() == b""


async def test_who_leaves_is_forgotten(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        async with listening(broker):
            assert broker.broker.live.listeners == 1
        await eventually(lambda: broker.broker.live.listeners == 0)


async def test_where_nothing_happens_something_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "HEARTBEAT_S", 0.01)
    content = config(None, probe={"interval_s": 60})
    async with facade(tmp_path, content) as broker, listening(broker) as listener:
        reading = asyncio.create_task(listener.next())
        await eventually(lambda: listener.comments >= 2)
        await broker.broker.apply(lambda at: Drain(at=at))
        await reading


async def test_no_more_listen_than_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_LISTENERS", 1)
    async with facade(tmp_path, config(None)) as broker, listening(broker):
        refused = await broker.ask(*SEEN)
        assert (refused.status, refused.error) == (429, "overloaded")
        assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("place", "status", "code"),
    [
        ("17", 400, "bad_request"),
        ("run-x", 400, "bad_request"),
        ("-5", 400, "bad_request"),
        ("elsewhere-1", 404, "not_found"),
        ("RUN-99999", 404, "not_found"),
    ],
)
async def test_a_place_that_is_none_is_a_clear_error(
    tmp_path: Path, place: str, status: int, code: str
) -> None:
    async with facade(tmp_path, config(None)) as broker:
        given = place.replace("RUN", broker.broker.run)
        answer = await broker.ask(*SEEN, f"Last-Event-ID: {given}")
        assert (answer.status, answer.error) == (status, code)
        assert broker.broker.live.listeners == 0


async def test_seeing_takes_a_clients_key(tmp_path: Path) -> None:
    keys = [{"name": "phone", "hash": hash_key("secret")}]
    async with facade(tmp_path, config(None, auth={"keys": keys})) as broker:
        assert (await broker.ask(*SEEN)).status == 401
        async with listening(broker, "Authorization: Bearer secret") as listener:
            await broker.broker.apply(lambda at: Drain(at=at))
            await listener.until("Drain")


async def test_a_head_has_no_stream(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        head = await broker.ask("HEAD", "/v1/events")
        assert (head.status, head.headers["content-type"]) == (200, "text/event-stream")

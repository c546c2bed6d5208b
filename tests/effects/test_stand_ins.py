"""The stand-ins answer as the real servers were recorded to.

The recordings themselves lie outside of the repository; where they are, they are played against
the stand-ins. What matters most of them is told anew below, and always checked.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.comfyui import comfyui
from tests.support.gpu_host import gpu_host
from tests.support.stand_ins.base import StandIn, card, running
from tests.support.stand_ins.faster_whisper import FasterWhisper
from tests.support.stand_ins.llama_server import LlamaServer
from tests.support.stand_ins.piper import Piper
from tests.support.stand_ins.whisper import MODEL, Whisper

RECORDINGS = Path(__file__).parents[3] / "shared" / "recordings"
recorded = pytest.mark.skipif(not RECORDINGS.is_dir(), reason="the recordings are not here")

Kind = type[Whisper] | type[FasterWhisper] | type[Piper] | type[LlamaServer]
# Of each recording the lines that are played, by their `n`: those of its first process that ask
# one thing at a time, and what the stand-in is there for.
PLAYED: dict[str, tuple[Kind, range, frozenset[int]]] = {
    "whisper-server/whisper.jsonl": (Whisper, range(4, 61), frozenset({8, 43})),
    "faster-whisper-server/fws.jsonl": (FasterWhisper, range(4, 42), frozenset({10, 11})),
    "piper-http/piper.jsonl": (Piper, range(4, 42), frozenset()),
    "llama-server/single.jsonl": (
        LlamaServer,
        range(6, 44),
        # Work and pages that no preset and no client of a preset asks for.
        frozenset({15, 20, 23, 24, 25, 29, 30, 31, 32, 33, 34, 37, 38, 42}),
    ),
}


def lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as text:
        yield from map(json.loads, text)


def shape(value: Any) -> Any:
    """Give what a JSON value looks like: keys and kinds, and of a list its first member."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value[:1]]
    return "number" if isinstance(value, int | float) else type(value).__name__


def within(part: Any, whole: Any) -> bool:
    """Say whether a shape has nothing that the other has not; what is null may be anything."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and within(part[key], whole[key]) for key in part)
    if isinstance(part, list) and isinstance(whole, list):
        return not part or (bool(whole) and within(part[0], whole[0]))
    return bool(part == whole) or "NoneType" in (part, whole)


def is_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


# ------------------------------------------------------------------------- one request of a record

FORM = re.compile(r"multipart fields=(\[.*?\]) file=(\S+) \((\d+) bytes\)")
FIELD = re.compile(r"\('(\w+)', '([^']*)'\)")


def sent(line: dict[str, Any]) -> tuple[dict[str, str], bytes | None]:
    """Give headers and body of a recorded request; forms are told in words there."""
    body, note = line.get("request_body"), line.get("note") or ""
    if "without boundary" in note:
        return {"Content-Type": "multipart/form-data"}, b"garbage"
    if body is None:
        return {}, None
    if form := FORM.match(body):
        fields = dict(FIELD.findall(form[1]))
        small = int(form[3]) < 200
        sound = b"" if "empty" in note else b"no sound" if small else b"RIFF" + bytes(100)
        named = (
            None
            if note in {"no file", "no file field"}
            else "audio"
            if "named audio" in note
            else "file"
        )
        return multipart({**fields, **({named: sound} if named else {})})
    if body.startswith("multipart "):
        key, _, value = body.removeprefix("multipart ").partition("=")
        return multipart({key: value})
    kind = "multipart/form-data; boundary=x" if body == "garbage" else "application/json"
    return {"Content-Type": kind}, body.encode()


def multipart(fields: dict[str, str | bytes]) -> tuple[dict[str, str], bytes]:
    body = b""
    for name, value in fields.items():
        file = '; filename="short.wav"' if isinstance(value, bytes) else ""
        body += f'--x\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        body += (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    return {"Content-Type": "multipart/form-data; boundary=x"}, body + b"--x--\r\n"


async def ask(
    url: str, method: str, path: str, headers: dict[str, str], body: bytes | None
) -> tuple[int, str, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url + path, headers=headers, data=body) as answer,
    ):
        text = (await answer.read()).decode("latin-1")
        return answer.status, answer.headers.get("Content-Type", ""), text


def media(kind: str) -> str:
    return kind.partition(";")[0].strip()


# --------------------------------------------------------------------------------- the recordings


@recorded
@pytest.mark.parametrize("name", PLAYED)
async def test_a_recording_is_answered_alike(name: str, tmp_path: Path) -> None:
    kind, numbers, left_out = PLAYED[name]
    service: StandIn = kind(card(tmp_path))
    asked = [
        line
        for line in lines(RECORDINGS / name)
        if line.get("method") and line["n"] in numbers and line["n"] not in left_out
    ]
    if isinstance(service, Whisper):
        (service.disk / "ggml-other.bin").write_bytes(MODEL)
        (service.disk / "ggml-tiny.en.bin").write_bytes(MODEL)
    async with running(service):
        for line in asked:
            status, media_type, text = await ask(
                service.url, line["method"], line["path"], *sent(line)
            )
            where = f"{name}:{line['n']} {line['method']} {line['path']} ({line.get('note')})"
            assert status == line["status"], where
            told = {key.lower(): each for key, each in line["response_headers"].items()}
            if text and "content-type" in told:
                assert media(media_type) == media(told["content-type"]), where
            theirs, ours = is_json(str(line.get("response_body"))), is_json(text)
            if theirs is not None and line["method"] != "HEAD":
                assert within(shape(ours), shape(theirs)), (where, ours)
    assert len(asked) > 20


# Its health and list, and what it says to work and orders before, and while, a model loads.
ROUTER = frozenset({4, 8, 18, 21, 24, 25, 27, 28, 29})


@recorded
async def test_the_router_answers_its_recording_alike(tmp_path: Path) -> None:
    with gpu_host(tmp_path) as host:
        router = host.start_router("router", mib={"gemma-a": 400, "gemma-b": 400}, load_s=5)
        for line in lines(RECORDINGS / "llama-server" / "router.jsonl"):
            if line.get("n") in ROUTER and line.get("method"):
                asked = line["method"], line["path"], *sent(line)
                status, _, text = await ask(router.url, *asked)
                assert status == line["status"], line
                theirs, ours = is_json(str(line["response_body"])), is_json(text)
                if status < 400:
                    assert within(shape(ours), shape(theirs)), line


@recorded
@pytest.mark.parametrize(
    ("name", "until_ms"),
    # Up to what goes by another address, and to what ended without being seen to.
    [("02_job.jsonl", 6_900), ("03_queue_cancel.jsonl", 3_700), ("04_free.jsonl", 16_500)],
)
async def test_comfyui_answers_its_recording_alike(name: str, until_ms: int) -> None:
    """The stand-in runs a prompt until it is told, so where the record has its end it is told."""
    known: dict[str, str] = {}  # the recorded id: that of the stand-in
    played = 0
    async with comfyui() as service:
        records = [
            line
            for line in lines(RECORDINGS / "comfyui" / name)
            if line.get("method")
            and line["t_ms"] < until_ms
            and re.match(r"/(prompt|queue|interrupt|history/|free)", line["path"])
        ]
        for line in sorted(records, key=lambda line: line["t_ms"]):
            path, body = line["path"], line.get("request_body")
            theirs = is_json(str(line["response_body"]))
            for old, new in known.items():
                path = path.replace(old, new)
                body = body.replace(old, new) if body else body
            await _end_what_has_ended(service, line, theirs, known)
            if body and is_json(body) is None:  # it was cut
                body = json.dumps({"prompt": {"1": {}}})
            headers = {"Content-Type": "application/json"}
            status, _, text = await ask(
                service.url, line["method"], path, headers, body.encode() if body else None
            )
            ours = is_json(text)
            assert status == line["status"], line
            if (line["method"], path) == ("POST", "/prompt"):
                known[theirs["prompt_id"]] = ours["prompt_id"]
            if theirs is not None and path.startswith("/history"):
                assert bool(ours) == bool(theirs), line
            elif theirs is not None and line["path"] == "/queue":
                assert _queued(ours) == {known[each] for each in _queued(theirs)}, line
            elif theirs is not None:
                assert within(shape(ours), shape(theirs)), line
            played += 1
    assert played >= 5


def _queued(queue: dict[str, Any]) -> set[str]:
    return {row[1] for rows in queue.values() for row in rows}


async def _end_what_has_ended(
    service: Any, line: dict[str, Any], theirs: Any, known: dict[str, str]
) -> None:
    """Bring the stand-in to where the recorded server was."""
    if line["method"] != "GET" or theirs is None:
        return
    if line["path"].startswith("/history/") and theirs:
        (prompt,) = theirs
        if known[prompt] in service.running:
            service.end(known[prompt])
    elif line["path"] == "/queue":
        there = {known[each] for each in _queued(theirs)}
        while service.running and service.running[0] not in there:
            service.end(service.running[0])


# -------------------------------------------------------------------- what they say, always checked

SOUND = multipart({"file": b"RIFF1234"})
NO_SOUND = multipart({"file": b"no sound"})
JSON = {"Content-Type": "application/json"}
OK = {"status": "ok"}
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
# In order: what is asked, the status, and the JSON or how the text begins.
TOLD: dict[str, tuple[Kind, list[tuple[str, str, Any, int, Any]]]] = {
    "whisper": (
        Whisper,
        [
            ("GET", "/health", None, 200, OK),
            ("POST", "/inference", SOUND, 200, {"text": " Hello.\n"}),
            ("POST", "/inference", NO_SOUND, 400, "Invalid request"),
            ("POST", "/inference", (JSON, b'{"file": "x"}'), 400, "Invalid request"),
            ("POST", "/v1/audio/transcriptions", SOUND, 404, "File Not Found"),
            ("POST", "/load", multipart({"model": "missing.bin"}), 400, "Invalid request"),
            ("GET", "/health", None, 404, "File Not Found (/health)"),
            ("POST", "/inference", SOUND, 200, {"text": " Hello.\n"}),
            ("POST", "/load", multipart({"model": "tiny.bin"}), 200, "Load was successful!"),
            ("GET", "/health", None, 200, OK),
            ("POST", "/load", (JSON, b'{"model": "tiny.bin"}'), 400, "Invalid request"),
            ("GET", "/health", None, 404, "File Not Found (/health)"),
        ],
    ),
    "faster-whisper-server": (
        FasterWhisper,
        [
            ("GET", "/health", None, 200, OK),
            ("GET", "/v1/models", None, 404, {"detail": "Not Found"}),
            ("POST", "/v1/audio/transcriptions", SOUND, 200, {"text": " Hello."}),
            ("POST", "/v1/audio/translations", SOUND, 200, {"text": " Hello."}),
            ("POST", "/v1/audio/transcriptions", NO_SOUND, 500, "Internal Server Error"),
            ("GET", "/v1/audio/transcriptions", None, 405, {"detail": "Method Not Allowed"}),
        ],
    ),
    "piper": (
        Piper,
        [
            ("GET", "/health", None, 404, "<!doctype html>"),
            ("POST", "/synthesize", (JSON, b'{"text": "Hello."}'), 200, "RIFF"),
            ("POST", "/synthesize", ({}, b'{"text": "Hello."}'), 200, "RIFF"),
            ("POST", "/synthesize", (JSON, b'{"text": " "}'), 500, "<!doctype html>"),
            ("POST", "/synthesize", (JSON, b"{bad"), 500, "<!doctype html>"),
            ("POST", "/unload", (JSON, b"{}"), 404, "<!doctype html>"),
            ("GET", "/synthesize?text=hello", None, 405, "<!doctype html>"),
        ],
    ),
    "llama-server": (
        LlamaServer,
        [
            ("GET", "/health", None, 200, OK),
            ("POST", "/v1/chat/completions", (JSON, b'{"max_tokens": 4}'), 400, '{"error"'),
            ("POST", "/v1/chat/completions", (JSON, b'{"messages": []}'), 200, '{"choices"'),
            ("POST", "/models/unload", (JSON, b"{}"), 404, '{"error"'),
        ],
    ),
}


@pytest.mark.parametrize("name", TOLD)
async def test_what_a_real_one_said_its_stand_in_says(name: str, tmp_path: Path) -> None:
    kind, said = TOLD[name]
    async with running(kind(card(tmp_path))) as (service,):
        for method, path, body, expected, answer in said:
            headers, content = body or ({}, None)
            status, _, text = await ask(service.url, method, path, headers, content)
            assert status == expected, (method, path)
            if isinstance(answer, str):
                assert text.startswith(answer)
            else:
                assert is_json(text) == answer


async def test_while_llama_server_loads_everything_is_a_503(tmp_path: Path) -> None:
    async with running(LlamaServer(card(tmp_path), loading=True)) as (service,):
        for path in ("/health", "/v1/models", "/nothing"):
            status, _, text = await ask(service.url, "GET", path, {}, None)
            assert (status, is_json(text)) == (503, LOADING)


async def test_whisper_ends_with_a_file_that_is_no_model(tmp_path: Path) -> None:
    service = Whisper(card(tmp_path))
    (service.disk / "notes.txt").write_bytes(b"buy milk")
    async with running(service):
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await ask(service.url, "POST", "/load", *multipart({"model": "notes.txt"}))
        with pytest.raises(aiohttp.ClientConnectionError):
            await ask(service.url, "GET", "/health", {}, None)
    assert service.held_mib() == 0


async def test_comfyui_loses_what_comes_while_its_worker_is_busy_and_keeps_the_flag() -> None:
    free = ({"Content-Type": "application/json"}, b'{"unload_models": true, "free_memory": true}')
    async with comfyui() as service:
        for _ in range(2):  # the second while the first is carried out
            assert (await ask(service.url, "POST", "/free", *free))[0] == 200
        assert (service.freed, service.collecting, service.flagged) == (0, True, True)
        service._free()
        assert (service.freed, service.flagged) == (1, True)  # and stays so
        assert (await ask(service.url, "POST", "/free", *free))[0] == 200
        assert (service.collecting, service.flagged) == (True, False)

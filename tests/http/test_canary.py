"""What clients send, what services answer and what the configuration keeps to itself turns up in
nothing that the broker writes or tells of itself: a word is put everywhere, and looked for.
"""

import gzip
import json
import signal
from pathlib import Path
from urllib.parse import quote

from mgpu_http.auth import hash_key
from tests.support.facade import ServeProcess, config, serve_process
from tests.support.upstream import Upstream

CANARY = "canary7f3a9"
KEY = f"mgpu_{CANARY}"
AUTH = f"Authorization: Bearer {KEY}"
FORM = "\r\n".join(
    [
        "--edge",
        f'Content-Disposition: form-data; name="file"; filename="{CANARY}.wav"',
        f"Content-Type: audio/{CANARY}",
        "",
        CANARY,
        "--edge--",
        "",
    ]
).encode()


def content(upstream: Upstream) -> dict[str, object]:
    """One that works, one whose process ends at once; with secrets in all that can hold one."""
    told = config(
        upstream,
        auth={"keys": [{"name": "phone", "hash": hash_key(KEY), "admin": True}]},
        worker={
            "url": f"{upstream.url}/{CANARY}",
            "headers": {"X-Secret": CANARY},
            "paths": {kind: {"path": f"/{CANARY}/{kind}"} for kind in ("tts", "stt", "llm")},
            "load": {"path": f"/{CANARY}/load"},
            "unload": {"path": f"/{CANARY}/unload", "body": {"secret": CANARY}},
            "vram_resident_mib": 9_000,
        },
    )
    told["consumers"]["dead"] = {
        "url": f"http://127.0.0.1:9/{CANARY}",
        "health": {"path": f"/{CANARY}"},
        "paths": {"image": {"path": f"/{CANARY}"}},
        "vram_resident_mib": 20_000,
        "driver": {
            "process": {
                "command": f"python3 -c 'raise SystemExit(3)' {CANARY}",
                "env": {"S": CANARY},
            }
        },
    }
    told["routing"] |= {"image": "dead"}
    return told


async def work(broker: ServeProcess) -> None:
    """Ask for all that can be asked for, in all ways that end well or not."""
    prompt = json.dumps({"prompt": CANARY, "messages": [{"content": CANARY}]}).encode()
    secrets = (f"X-{CANARY}: {CANARY}", f"Cookie: s={CANARY}", f"User-Agent: {CANARY}")
    odd = quote("X (bad)" + CANARY)
    for orders in (
        "",
        f"do=text&status=500&body={CANARY}",
        f"do=text&header=X-{CANARY}:{CANARY}&body={CANARY}",
        f"do=text&header={odd}:{CANARY}",
        "do=drop",
        "do=garbage",
        "do=stream&die=1",
    ):
        target = f"/v1/llm?{orders}&secret={CANARY}"
        await broker.ask("POST", target, AUTH, *secrets, body=prompt)
    form = "Content-Type: multipart/form-data; boundary=edge"
    await broker.ask("POST", "/v1/stt", AUTH, form, body=FORM)
    await broker.ask("POST", "/v1/image", AUTH, body=prompt)
    await broker.ask("GET", f"/audio/{CANARY}.wav?{CANARY}", AUTH)


async def misuse(broker: ServeProcess) -> None:
    """Say the word where it does not belong."""
    for method, target, *headers in (
        ("POST", "/v1/tts", f"X-Api-Key: {CANARY}"),
        ("POST", "/v1/tts", AUTH, f"X-Mgpu-Priority: {CANARY}"),
        ("POST", "/v1/tts", AUTH, f"X-Mgpu-Max-Wait: {CANARY}"),
        ("GET", f"/{CANARY}/../{CANARY}", AUTH),
        (CANARY.upper(), "/v1/tts", AUTH),
        ("GET", f"/v1/requests/{CANARY}", AUTH),
        ("DELETE", f"/v1/requests/{CANARY}", AUTH),
        ("POST", f"/v1/consumers/{CANARY}/load", AUTH),
        ("GET", "/v1/events", AUTH, f"Last-Event-ID: {CANARY}-1"),
    ):
        assert (await broker.ask(method, target, *headers, body=CANARY.encode())).status >= 400
    async with broker.connect() as client:
        await client.send("POST", "/v1/tts", AUTH, f"X-{CANARY}: {CANARY}", "Content-Length: 99")
    async with broker.connect() as client:
        client.writer.write(f"{CANARY} {CANARY}\r\n\r\n".encode())
        await client.closed()


async def told_of_itself(broker: ServeProcess) -> dict[str, bytes]:
    """Give what the broker tells whoever may see."""
    told = {path: (await broker.ask("GET", path, AUTH)).body for path in ("/v1/status", "/metrics")}
    run = json.loads(told["/v1/status"])["run"]
    async with broker.connect() as client:
        await client.send("GET", f"/v1/events?since={run}-0", AUTH)
        assert (await client.head()).status == 200
        events = b""
        while b'"Drain"' not in events:  # the last thing that was asked for
            size = int(await client.reader.readuntil(b"\r\n"), 16)
            events += await client.reader.readexactly(size + 2)
        told["/v1/events"] = events
    requests = {
        json.loads(line[6:])["event"].get("request")
        for line in events.splitlines()
        if line.startswith(b"data: ")
    } - {None}
    assert len(requests) > 6
    for request in requests:
        told[request] = (await broker.ask("GET", f"/v1/requests/{request}", AUTH)).body
    return told


async def test_the_word_is_nowhere(tmp_path: Path, upstream: Upstream) -> None:
    with serve_process(tmp_path, content(upstream), talkative=True) as broker:
        await broker.ask("POST", "/v1/consumers/worker/unload", AUTH)
        await work(broker)
        await misuse(broker)
        await broker.ask("POST", "/v1/drain", AUTH)
        told = await told_of_itself(broker)
        broker.signal(signal.SIGTERM)
        assert await broker.exit_code() == 0
    assert any(CANARY in target for target in upstream.stats()["targets"])  # it was really said
    text = "".join(broker.lines)
    assert "DEBUG" in text
    for path in (tmp_path / "log").glob("events-*"):
        data = path.read_bytes()
        told[path.name] = gzip.decompress(data) if path.suffix == ".gz" else data
    assert any(name.startswith("events-") for name in told)
    assert all(b"worker" in told[path] for path in ("/v1/status", "/v1/events", "/metrics"))
    where = [name for name, data in told.items() if CANARY.encode() in data.lower()]
    assert where == []
    said = [line for line in text.splitlines() if CANARY in line.lower()]
    assert said == []

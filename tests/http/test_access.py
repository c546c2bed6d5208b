"""http.md section 4: who may."""

from pathlib import Path
from typing import Any

import pytest

from mgpu_http.auth import hash_key
from mgpu_http.operations import OPERATIONS
from tests.support.facade import config, facade
from tests.support.upstream import Upstream

CLIENT, ADMIN, LOW = "key-of-a-client", "key-of-an-admin", "key-of-low-priority"
KEYS = {
    "keys": [
        {"name": "client", "hash": hash_key(CLIENT)},
        {"name": "admin", "hash": hash_key(ADMIN), "admin": True},
        {"name": "low", "hash": hash_key(LOW), "priority": 1},
    ]
}


def with_keys(upstream: Upstream | None, **changes: Any) -> dict[str, Any]:
    return config(upstream, auth=KEYS, **changes)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.id)
async def test_each_operation_asks_for_the_key_that_it_needs(
    operation: Any, tmp_path: Path
) -> None:
    target = operation.path.replace("{name}", "x").replace("{id}", "x").replace("{path:path}", "x")
    method = "HEAD" if target == "/v1/events" else operation.method  # that has no end
    async with facade(tmp_path, with_keys(None)) as broker:

        async def allowed(*headers: str) -> bool:
            answer = await broker.ask(method, target, *headers, body=b"")
            return answer.status not in {401, 403}

        assert await allowed(f"X-Api-Key: {ADMIN}")
        assert await allowed(f"X-Api-Key: {CLIENT}") is (operation.access != "admin")
        assert await allowed() is (operation.access == "open")


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Authorization: Bearer {CLIENT}", 200),
        (f"authorization: bearer {CLIENT}", 200),
        (f"X-Api-Key: {CLIENT}", 200),
        (f"Authorization: Basic {CLIENT}", 401),
        (f"Authorization: Bearer {CLIENT}x", 401),
        (f"Authorization: Bearer {hash_key(CLIENT)}", 401),
        ("Authorization: Bearer", 401),
        ("X-Api-Key:", 401),
    ],
)
async def test_a_key_comes_in_one_of_two_headers(header: str, status: int, tmp_path: Path) -> None:
    async with facade(tmp_path, with_keys(None)) as broker:
        assert (await broker.ask("GET", "/v1/status", header)).status == status


async def test_a_client_without_a_key_is_refused_before_its_body_is_read(tmp_path: Path) -> None:
    async with facade(tmp_path, with_keys(None)) as broker, broker.connect() as client:
        await client.send("POST", "/v1/tts", "Content-Length: 5")  # and no body
        assert (await client.answer()).error == "unauthorized"


@pytest.mark.parametrize("header", [f"Authorization: Bearer {CLIENT}", f"X-Api-Key: {CLIENT}"])
async def test_the_clients_key_goes_nowhere(
    header: str, tmp_path: Path, upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    content = with_keys(upstream, worker={"headers": {"Authorization": "Bearer the-services"}})
    async with facade(tmp_path, content) as broker:
        for method, target in (("POST", "/v1/tts"), ("GET", "/audio/x")):
            answer = await broker.ask(method, target, header, body=b"")
            assert CLIENT.encode() not in answer.body
            assert b"Bearer the-services" in answer.body
        log = "".join(path.read_text() for path in (tmp_path / "log").glob("events-*"))
        assert '"type":"Request"' in log
        assert CLIENT not in log
        assert CLIENT not in caplog.text


async def test_hop_by_hop_headers_are_dropped_and_the_client_is_named(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream)) as broker:
        headers = ("Connection: keep-alive, X-Mine", "X-Mine: 1", "TE: trailers", "X-Kept: 1")
        answer = await broker.ask("POST", "/v1/tts", *headers, body=b"")
        seen = {name.lower(): value for name, value in answer.json()["headers"]}
        assert seen["x-kept"] == "1"
        assert not {"x-mine", "te", "connection", "keep-alive"} & seen.keys()
        assert seen["x-forwarded-for"] == "127.0.0.1"
        assert seen["x-forwarded-host"] == "localhost"


@pytest.mark.parametrize(
    ("header", "key", "priority"),
    [
        (None, CLIENT, None),
        ("4", CLIENT, 2),  # at most the consumer's
        ("0", CLIENT, 0),
        ("4", LOW, 1),  # at most the key's
        (None, LOW, 1),
    ],
)
async def test_a_request_is_at_most_as_urgent_as_its_consumer_or_key(
    header: str | None, key: str, priority: int | None, tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, with_keys(upstream)) as broker:
        asked = [f"X-Mgpu-Priority: {header}"] if header else []
        await broker.ask("POST", "/v1/tts", f"X-Api-Key: {key}", *asked, body=b"")
        log = "".join(path.read_text() for path in (tmp_path / "log").glob("events-*"))
        wanted = "null" if priority is None else str(priority)
        assert f'"kind":"tts","priority":{wanted},' in log


# ------------------------------------------------------------------- loopback without keys


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8770", 200),
        ("127.0.0.1:8770", 200),
        ("127.1.2.3", 200),
        ("[::1]:8770", 200),
        ("gpu.internal", 200),
        ("gpu.internal:8770", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
async def test_a_foreign_host_is_refused(host: str, status: int, tmp_path: Path) -> None:
    content = config(None, allowed_hosts=["gpu.internal"])
    async with facade(tmp_path, content) as broker:
        for target in ("/v1/status", "/", "/healthz"):
            answer = await broker.ask("GET", target, host=host)
            assert answer.status == status
            assert status == 200 or answer.error == "forbidden"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://app.example", 200),
        ("http://localhost", 200),  # its own: that is the Host
        ("http://evil.example", 403),
        ("http://localhost:3000", 403),
        ("null", 403),
    ],
)
async def test_a_foreign_origin_is_refused(origin: str, status: int, tmp_path: Path) -> None:
    content = config(None, allowed_origins=["http://app.example"])
    async with facade(tmp_path, content) as broker:
        answer = await broker.ask("POST", "/v1/drain", f"Origin: {origin}")
        assert answer.status == status
        allowed = answer.headers.get("access-control-allow-origin")
        assert allowed == (origin if origin == "http://app.example" else None)
        assert (await broker.status())["draining"] is (status == 200)


async def test_with_keys_any_host_will_do(tmp_path: Path) -> None:
    async with facade(tmp_path, with_keys(None)) as broker:
        key = f"X-Api-Key: {CLIENT}"
        assert (await broker.ask("GET", "/v1/status", key, host="evil.example")).status == 200
        assert (await broker.ask("GET", "/v1/status", host="evil.example")).status == 401


async def test_open_means_anybody(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None, auth="open", listen="0.0.0.0:0")) as broker:
        assert (await broker.ask("POST", "/v1/drain", host="any.example")).status == 200


@pytest.mark.parametrize("auth", [{}, KEYS])
async def test_preflight_is_answered_for_allowed_origins_only(
    auth: dict[str, Any], tmp_path: Path
) -> None:
    content = config(None, auth=auth, allowed_origins=["http://app.example"])
    async with facade(tmp_path, content) as broker:

        async def preflight(origin: str) -> Any:
            return await broker.ask(
                "OPTIONS",
                "/v1/tts",
                f"Origin: {origin}",
                "Access-Control-Request-Method: POST",
                "Access-Control-Request-Headers: content-type, x-api-key",
            )

        answer = await preflight("http://app.example")
        assert answer.status == 204
        assert answer.headers["access-control-allow-origin"] == "http://app.example"
        assert answer.headers["access-control-allow-headers"] == "content-type, x-api-key"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["vary"] == "Origin"
        answer = await preflight("http://evil.example")
        assert (answer.status, answer.error) == (403, "forbidden")
        assert "access-control-allow-origin" not in answer.headers


async def test_options_without_an_origin_is_no_preflight(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        answer = await broker.ask("OPTIONS", "/v1/tts", "Access-Control-Request-Method: POST")
        assert (answer.status, answer.error) == (405, "method_not_allowed")


# --------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("target", "seen"),
    [
        ("/audio/a/../b.wav", "/audio/b.wav"),
        ("/audio//x///y", "/audio/x/y"),
        ("/audio/%2e/x", "/audio/x"),
        ("/audio/a%2Fb", "/audio/a%2Fb"),
        ("/audio/dir/", "/audio/dir/"),
        ("/audio/a%252e%252e/x", "/audio/a%252e%252e/x"),
        ("//audio/x", "/audio/x"),
    ],
)
async def test_paths_are_normalised(
    target: str, seen: str, tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream)) as broker:
        assert (await broker.ask("GET", target)).json()["target"] == seen


@pytest.mark.parametrize(
    "target",
    [
        "/audio/../secret",
        "/audio/%2e%2e/secret",
        "/audio/%2E%2E%2Fsecret",
        "/audio/x/..%5c..%5csecret",
        "/audio/../../secret",
        "/audio/.%2e/secret",
        "/audio/%00",
        "http://elsewhere/audio/x",
    ],
)
async def test_no_path_leaves_its_prefix(target: str, tmp_path: Path, upstream: Upstream) -> None:
    async with facade(tmp_path, config(upstream)) as broker:
        assert (await broker.ask("GET", target)).error in {"bad_request", "not_found"}
        targets = upstream.stats()["targets"]
        assert isinstance(targets, list)
        assert set(targets) <= {"GET /health"}

"""What the presets llama-server and llama-router say of llama.cpp's server, seen at the server
itself, without a broker: a scene for each sentence.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from broker import free_ports
from client import CALL_S, check, question
from environment import Files

from mgpu_effects import presets

READY_S = 30
LOOK_S = 0.01
# For a server that looks once a second, on a machine with other work; its answers take a minute.
SOON_S = 4
# Polled so often, a server that looks at its clients once a second never does.
POLL_S = 0.3
ENDLESS = question("Tell a story.", tokens=3000, ignore_eos=True)
SHORT = question("Hello.", tokens=4)


class Server(NamedTuple):
    """One that runs."""

    session: aiohttp.ClientSession
    process: asyncio.subprocess.Process

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(path) as response:
            return response.status, await response.json(content_type=None)

    async def post(self, path: str, body: Mapping[str, object]) -> tuple[int, Any]:
        async with self.session.post(path, json=body) as response:
            return response.status, await response.json(content_type=None)

    async def ask(self, body: Mapping[str, object]) -> tuple[int, bytes]:
        """Give an answer as it comes."""
        async with self.session.post("/v1/chat/completions", json=body) as response:
            return response.status, await response.read()

    async def stream(self, model: str = "") -> aiohttp.ClientResponse:
        """Give an endless stream that has begun."""
        body = {**ENDLESS, "stream": True, "model": model}
        response = await self.session.post("/v1/chat/completions", json=body)
        check(response.status == 200, f"a stream was refused: {response.status}")
        await response.content.readany()
        return response

    async def works(self, model: str = "") -> bool:
        _, slots = await self.get(f"/slots?model={model}")
        return any(slot["is_processing"] for slot in slots)

    async def rests(self, model: str = "") -> bool:
        return not await self.works(model)

    async def abandon(self, model: str = "") -> None:
        """Ask for an endless answer that is not streamed, and leave."""
        body = {**ENDLESS, "model": model}
        asking = asyncio.create_task(self.post("/v1/chat/completions", body))
        await self.until(lambda: self.works(model))
        asking.cancel()
        await asyncio.wait((asking,))

    async def model(self, name: str) -> dict[str, Any]:
        """Give the status that the router tells of a model."""
        _, models = await self.get("/models")
        return next(dict(row["status"]) for row in models["data"] if row["id"] == name)

    async def until(self, holds: Callable[[], Awaitable[object]]) -> float:
        """Wait until it holds, and give the seconds that this took."""
        began = time.monotonic()
        async with asyncio.timeout(CALL_S):
            while True:
                if await holds():
                    return time.monotonic() - began
                await asyncio.sleep(LOOK_S)

    async def is_at(self, name: str, value: str) -> bool:
        return (await self.model(name))["value"] == value

    async def ended(self, within_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), within_s)
        return self.process.returncode is not None


Fact = Callable[[Files, Path], Awaitable[str]]
FACTS: dict[str, dict[str, Fact]] = {"llama-server": {}, "llama-router": {}}


def shows(preset: str, *sentences: str) -> Callable[[Fact], Fact]:
    """Mark what shows these sentences of the preset, or one of its keys."""

    def mark(fact: Fact) -> Fact:
        FACTS[preset].update(dict.fromkeys(sentences, fact))
        return fact

    return mark


async def prove(files: Files, folder: Path) -> None:
    """Show everything that the two presets say."""
    for name, facts in FACTS.items():
        known = presets.preset(name)
        print(f"what the preset {name} says:", flush=True)
        unseen = set(known.traps) - facts.keys()
        check(not unseen, f"nothing here shows that: {unseen}")
        for sentence, fact in facts.items():
            print(f"  {sentence}", flush=True)
            print(f"    {await fact(files, folder)}", flush=True)


@contextlib.asynccontextmanager
async def started(files: Files, folder: Path, *more: str) -> AsyncIterator[Server]:
    """Run a server that need not answer yet."""
    (port,) = free_ports(1)
    own = ["--ctx-size", "4096", "--parallel", "1", "--threads", "1", "--port", port]
    with (folder / "llama-server.log").open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            files.llama_server, *own, *more, stdout=output, stderr=output
        )
    # A connection for each call: none that is left over keeps it from ending.
    connector = aiohttp.TCPConnector(force_close=True)
    timeout = aiohttp.ClientTimeout(total=CALL_S)
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
            yield Server(session, process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def single(files: Files, folder: Path, *more: str) -> AsyncIterator[Server]:
    async with started(files, folder, "--model", str(files.gemma), "--slots", *more) as server:
        await healths(server)
        yield server


@contextlib.asynccontextmanager
async def router(files: Files, folder: Path, *more: str) -> AsyncIterator[Server]:
    directory = models(files, folder)
    async with started(files, folder, "--models-dir", str(directory), *more) as server:
        await healths(server)
        yield server
        for name in ("first", "second", "large"):
            await server.post("/models/unload", {"model": name})
        server.process.terminate()
        check(await server.ended(within_s=READY_S), "the router does not end on SIGTERM")


def models(files: Files, folder: Path) -> Path:
    """Make a directory of three models, which are one, and of one that is none."""
    directory = folder / "models"
    if not directory.exists():
        directory.mkdir()
        for name in ("first", "second", "large"):
            (directory / f"{name}.gguf").symlink_to(files.gemma)
        (directory / "broken.gguf").write_text("no model")
    return directory


async def healths(server: Server) -> Sequence[int]:
    """Wait until it is well, and give each status of /health on the way, 0 for a refusal."""
    seen: list[int] = []
    async with asyncio.timeout(READY_S):
        while seen[-1:] != [200]:
            try:
                status, _ = await server.get("/health")
            except aiohttp.ClientConnectionError:
                status = 0
            seen += [status] if seen[-1:] != [status] else []
            await asyncio.sleep(LOOK_S)
    return seen


# --------------------------------------------------------------------------------------- one model


@shows("llama-server", "health: 503 while it loads")
async def loading_is_not_well(files: Files, folder: Path) -> str:
    async with started(files, folder, "--model", str(files.gemma)) as server:
        seen = await healths(server)
    check(seen[-2:] == [503, 200], f"/health went through {seen}")
    return f"/health went through {', '.join(map(str, seen))} (0: refused)"


@shows(
    "llama-server",
    "While it works, a SIGTERM need not end it: a second one does, or the end of its connections.",
)
async def ends_when_nobody_is_connected(files: Files, folder: Path) -> str:
    async def lives_on(how: Callable[[Server, aiohttp.ClientResponse], None]) -> bool:
        async with single(files, folder) as server:
            stream = await server.stream()
            server.process.terminate()
            lives = not await server.ended(within_s=1)
            if lives:
                how(server, stream)
            check(await server.ended(within_s=3), "it did not end then either")
            return lives

    def signalled(server: Server, _: aiohttp.ClientResponse) -> None:
        server.process.terminate()

    def left(_: Server, stream: aiohttp.ClientResponse) -> None:
        stream.close()

    ways = [signalled, left] * 3
    lived = sum([await lives_on(way) for way in ways])
    return f"with a stream it lived on in {lived} of {len(ways)} times, until one of the two"


@shows(
    "llama-server",
    "A call without streaming ends up to a second after its client left, one with it at once.",
    "on_client_gone: it ends the work",
)
async def leaving_ends_the_work(files: Files, folder: Path) -> str:
    async with single(files, folder) as server:
        stream = await server.stream()
        check(await server.works(), "a stream is no work")
        stream.close()
        took_s = await server.until(server.rests)
        check(took_s < SOON_S, f"it streamed on for {took_s:.1f} s")
        await server.abandon()
        await asyncio.sleep(SOON_S)
        check(not await server.works(), f"it works on {SOON_S} s after its client left")
    return f"the slot of the stream was free after {took_s:.2f} s, the other after {SOON_S} s"


@shows(
    "llama-server",
    "Polling GET /slots or /metrics keeps it from noticing that clients have left.",
)
async def polling_keeps_work_alive(files: Files, folder: Path) -> str:
    async with single(files, folder, "--metrics") as server:
        for path in ("/slots", "/metrics"):
            await server.abandon()
            left = time.monotonic()
            while time.monotonic() - left < 4:
                async with server.session.get(path) as response:
                    await response.read()
                await asyncio.sleep(POLL_S)
            check(await server.works(), f"it noticed while {path} was polled")
            await asyncio.sleep(SOON_S)
            check(not await server.works(), f"it works on {SOON_S} s after the last GET {path}")
    return f"polled each {POLL_S} s it worked on for 4 s; left alone it ended within {SOON_S} s"


@shows("llama-server", "Without --sleep-idle-seconds, of which the broker would not know.")
async def sleep_looks_like_health(files: Files, folder: Path) -> str:
    async with single(files, folder, "--sleep-idle-seconds", "1") as server:

        async def sleeps() -> bool:
            return bool((await server.get("/props"))[1]["is_sleeping"])

        await server.until(sleeps)
        check((await server.get("/health"))[0] == 200, "its health tells that it sleeps")
        check(await sleeps(), "asking for its health woke it")
    return "asleep it answers /health with 200"


# ------------------------------------------------------------------------------------- the router


@shows("llama-router", "health: of the router, whatever its models do")
async def healthy_without_models(files: Files, folder: Path) -> str:
    async with router(files, folder) as server:
        check(await server.is_at("first", "unloaded"), "a model is loaded at the start")
        await server.post("/models/load", {"model": "broken"})
        await server.until(lambda: server.is_at("broken", "unloaded"))
        check((await server.get("/health"))[0] == 200, "not well after a model failed")
    return "200 with no model loaded, and after one has failed"


@shows(
    "llama-router",
    "POST /models/load answers before the model is loaded, so this preset loads by the first"
    " request.",
)
async def load_answers_at_once(files: Files, folder: Path) -> str:
    async with router(files, folder) as server:
        began = time.monotonic()
        status, _ = await server.post("/models/load", {"model": "first"})
        answered_s = time.monotonic() - began
        check(status == 200, f"a load was answered with {status}")
        check(await server.is_at("first", "loading"), "it was loaded when the load was answered")
        loaded_s = await server.until(lambda: server.is_at("first", "loaded"))
        check(loaded_s > answered_s, "the answer took longer than what was left of the load")
    return f"answered after {answered_s * 1000:.0f} ms, loaded {loaded_s:.1f} s later"


@shows(
    "llama-router",
    "An unload breaks off its model's work, in up to ten seconds: streams lack [DONE], others get a"
    " 500.",
)
async def unload_at_work(files: Files, folder: Path) -> str:
    async with router(files, folder) as server:
        told = [
            await _unloaded_at_work(server, streamed=True),
            await _unloaded_at_work(server, streamed=False),
        ]
    return "; ".join(told)


async def _unloaded_at_work(server: Server, *, streamed: bool) -> str:
    body = {**ENDLESS, "model": "first", "stream": streamed}
    async with asyncio.TaskGroup() as group:
        working = group.create_task(server.ask(body))
        await server.until(lambda: server.is_at("first", "loaded"))
        await server.until(lambda: server.works("first"))
        began = time.monotonic()
        status, _ = await server.post("/models/unload", {"model": "first"})
        check(status == 200, f"the unload was answered with {status}")
        await server.until(lambda: server.is_at("first", "unloaded"))
        took_s = time.monotonic() - began
    status, text = working.result()
    check(b"[DONE]" not in text, "the stream came to its end")
    check(status == (200 if streamed else 500), f"the work was answered with {status}")
    check(took_s < 15, f"it was unloaded only after {took_s:.1f} s")
    return f"unloaded after {took_s:.1f} s, the work got {status}, ending in {text[-38:]!r}"


@shows(
    "llama-router",
    "A call without streaming works on when its client has left; one with it ends in a moment.",
    "on_client_gone: a stream ends",
)
async def leaving_ends_streams_only(files: Files, folder: Path) -> str:
    async with router(files, folder) as server:
        stream = await server.stream("first")
        check(await server.works("first"), "a stream is no work")
        stream.close()
        took_s = await server.until(lambda: server.rests("first"))
        check(took_s < SOON_S, f"it streamed on for {took_s:.1f} s")
        await server.abandon("first")
        await asyncio.sleep(2 * SOON_S)
        check(await server.works("first"), "it had noticed that its client left")
    return (
        f"the stream was over after {took_s:.2f} s, the call without worked on for {2 * SOON_S} s"
    )


@shows("llama-router", "An unload within that moment may take the ten seconds, too.")
async def unload_before_it_notices(files: Files, folder: Path) -> str:
    took_s = []
    async with router(files, folder) as server:
        for pause_s in (0, 0.005, 0.02, 0.05, 0.1):
            (await server.stream("first")).close()
            await asyncio.sleep(pause_s)
            await server.post("/models/unload", {"model": "first"})
            took_s.append(await server.until(lambda: server.is_at("first", "unloaded")))
    check(max(took_s) < 15, f"unloads took {took_s} s")
    return (
        f"unloaded as their streams were left, they took {', '.join(f'{t:.1f}' for t in took_s)} s"
    )


@shows("llama-router", "GETs load models too, as /props?model=NAME; GET /models does not.")
async def gets_load(files: Files, folder: Path) -> str:
    async with router(files, folder) as server:
        await server.get("/models")
        check(await server.is_at("first", "unloaded"), "GET /models loads")
        await server.get("/props?model=first")
        check(await server.is_at("first", "loaded"), "GET /props?model=first loads nothing")
    return "GET /props?model=first loaded it"


@shows(
    "llama-router",
    "A model that cannot be loaded is answered as a success; the status of it says `failed`.",
)
async def failed_loads_look_good(files: Files, folder: Path) -> str:
    async with router(files, folder) as server:
        status, answer = await server.post("/models/load", {"model": "broken"})
        check(status == 200 and answer == {"success": True}, f"{status}, {answer}")
        await server.until(lambda: server.is_at("broken", "unloaded"))
        told = await server.model("broken")
        check(told.get("failed") is True, f"its status is {told}")
        asked = await server.post("/v1/chat/completions", {**SHORT, "model": "broken"})
    return f"its status: {told['value']}, failed: {told['failed']}; a request got {asked}"


@shows("llama-router", "unload: 400, it was not loaded")
async def not_loaded(files: Files, folder: Path) -> str:
    async with router(files, folder) as server:
        status, answer = await server.post("/models/unload", {"model": "first"})
        check(status == 400, f"{status}, {answer}")
    return f"{status}: {answer['error']['message']}"

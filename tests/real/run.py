"""`make real`: the broker in front of real services that share a budget too small for all of them.

Works through the broker as clients do, and watches the process table meanwhile. Afterwards what was
recorded is replayed and simulated. Exit status 0: all is as it must be.
"""

import asyncio
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import environment
import llama
import recorded
import router
import services
from broker import Broker, Host, Scene, Stage, running_broker
from client import CALL_S, CheckError, Client, check
from watch import Watch

ALL_S = 300
PLAYS = (services, router)


async def play(
    host: Host, broker: Broker, watch: Watch, scenes: Sequence[tuple[str, Scene]]
) -> None:
    timeout = aiohttp.ClientTimeout(total=CALL_S)
    async with (
        asyncio.timeout(ALL_S),
        aiohttp.ClientSession(broker.url, timeout=timeout) as session,
    ):
        stage = Stage(host, Client(session), watch)
        await broker.ready(stage.client)
        for name, scene in (*scenes, ("nothing is left", nothing_is_left)):
            print(f"{name}:", flush=True)
            try:
                print(f"  {await scene(stage)}", flush=True)
            except Exception:
                await show_status(stage.client)
                raise


async def nothing_is_left(stage: Stage) -> str:
    """The books agree with what the process table showed."""
    status = await stage.client.status()
    check(status["requests"] == [], f"requests are left: {status['requests']}")
    rows = status["consumers"]
    alive = sorted(stage.watch.alive().keys() & rows.keys())
    resident = sorted(name for name, row in rows.items() if row["residency"] == "resident")
    check(alive == resident, f"alive: {alive}, by the books: {resident}")
    loads, evictions = await stage.swaps()
    seen = {name: len(pids) for name, pids in stage.watch.seen.items() if name in rows}
    by_books = status["scheduler"]["loads"]
    # Who is loaded by his first request is nobody's load in the books.
    check(by_books in (loads, 0), f"{by_books} loads by the books, but processes seen: {seen}")
    return (
        f"loads: {loads} ({', '.join(f'{n} of {k}' for k, n in seen.items())}), by the books "
        f"{by_books}, evictions: {evictions}, resident: {', '.join(resident)}"
    )


async def show_status(client: Client) -> None:
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
        print("status of the broker:", json.dumps(await client.status(), indent=1))


def end(broker: Broker, watch: Watch) -> str:
    """SIGTERM to the broker takes its services with it."""
    statuses = broker.stop()
    check(not any(statuses), f"mgpu serve, and what ran beside it, ended with {statuses}")
    left = watch.kill_all()
    check(not left, f"processes lived on after the broker: {left}")
    watch.stop()
    check(not watch.beyond, f"more lived at one moment than there is room for: {watch.beyond[:3]}")
    return (
        f"no process is left; in {watch.looks} looks never more services lived than there is room "
        "for"
    )


def run(host: Host, folder: Path, scenes: Sequence[tuple[str, Scene]]) -> None:
    with running_broker(host, folder) as (broker, watch):
        try:
            asyncio.run(play(host, broker, watch, scenes))
            print(f"the end:\n  {end(broker, watch)}")
        except Exception:
            print(f"the last words of the broker:\n{broker.last_words()}")
            raise
    recorded.look_back(host)


def all_of_it(folder: Path) -> None:
    files = environment.files()
    asyncio.run(llama.prove(files, folder))
    for each in PLAYS:
        print(f"\n== {each.NAME} ==", flush=True)
        own = folder / each.CONFIG.stem
        own.mkdir()
        run(each.host(files, own), own, each.SCENES)


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="mgpu-real-"))
    began = time.monotonic()
    try:
        environment.install()
        all_of_it(folder)
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - shown, and told by the exit status
        if not isinstance(error, CheckError):
            traceback.print_exception(error)
        print(f"FAILED: {error}\nall logs are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(f"OK, after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

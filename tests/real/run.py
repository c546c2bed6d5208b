"""`make real`: the broker in front of real speech services, which take turns in a budget that has
room for one of them.

Speaks sentences through the broker, sends what it hears back through the broker, and watches the
process table meanwhile. Exit status 0: all is as it must be.
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
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import aiohttp
import environment
from broker import CALL_S, Broker, CheckError, Client, check, running_broker, words
from watch import Watch

# The tiny Whisper model gets each of these right with this voice, dozens of times out of dozens.
SENTENCES = (
    "A good plan is better than a quick answer.",
    "She put the old book back on the shelf and closed the door.",
    "The ship left the harbor early in the morning.",
)
# Told twice it keeps Whisper busy for some seconds.
STORY = """The ship left the harbor early in the morning, long before the sun was up.
She put the old book back on the shelf and closed the door behind her.
A plan that works is better than an answer that comes too soon.
In the evening the whole family sat around the table and talked about the day.
Nobody could say where the road ended, but everyone knew where it began. """
ROUNDS = 3
ALL_S = 300


class Stage(NamedTuple):
    """What every scene plays on."""

    broker: Broker
    client: Client
    watch: Watch

    async def swaps(self) -> tuple[int, int]:
        """How many loads and evictions there were."""
        scheduler = (await self.client.status())["scheduler"]
        return scheduler["loads"], scheduler["evictions"]


async def there_and_back(stage: Stage) -> str:
    """Speak, listen, again and again: each call needs the other service gone and its own there."""
    for sentence in (SENTENCES * ROUNDS)[:ROUNDS]:
        spoken = await stage.client.speak(sentence)
        heard, listened = await stage.client.listen(spoken.body)
        check(words(heard) == words(sentence), f"said: {sentence!r}, heard: {heard!r}")
        print(f"  said:  {sentence}\n  heard: {heard}")
        for path, answer in (("/v1/tts", spoken), ("/v1/stt", listened)):
            print(f"    {path} took {answer.took_s:.2f} s, {answer.loading_s:.2f} s of it the swap")
            check(answer.loading_s > 0, f"{path} was answered without a swap")
    found = await stage.swaps()
    check(found == (2 * ROUNDS, 2 * ROUNDS - 1), f"loads and evictions are {found}")
    return f"{2 * ROUNDS} calls took {found[0]} loads and {found[1]} evictions"


async def all_at_once(stage: Stage) -> str:
    """Mixed calls together: each gets its own answer, and those of one kind share a swap."""
    client = stage.client
    recordings = {text: (await client.speak(text)).body for text in SENTENCES}
    before, _ = await stage.swaps()
    async with asyncio.TaskGroup() as group:
        spoken = [group.create_task(client.speak(text)) for text in SENTENCES]
        heard = {text: group.create_task(client.listen(wav)) for text, wav in recordings.items()}
    for text, task in heard.items():
        answer, _ = task.result()
        check(words(answer) == words(text), f"sent {text!r}, got the answer {answer!r}")
    for text, speech in zip(SENTENCES, spoken, strict=True):
        answer, _ = await client.listen(speech.result().body)
        check(words(answer) == words(text), f"asked for {text!r}, got the speech {answer!r}")
    loads = (await stage.swaps())[0] - before
    check(loads < len(SENTENCES), f"{loads} loads: the calls of one kind did not share a swap")
    return f"{2 * len(SENTENCES)} calls at once, each with its own answer; loads: {loads}"


async def a_client_leaves(stage: Stage) -> str:
    """Whisper works on for who has left: it counts as at work, and alive, until it is done."""
    client = stage.client
    wav = (await client.speak(STORY * 2)).body
    heard, whole = await client.listen(wav)
    work_s = whole.took_s - whole.queued_s
    check(words(heard)[:9] == words(STORY)[:9], f"the long recording came back as {heard!r}")

    leaving = asyncio.create_task(client.listen(wav))
    await until(stage, "the call is at work", lambda row: row["active"] == 1)
    leaving.cancel()
    await asyncio.wait((leaving,))
    left = time.monotonic()
    next_call = asyncio.create_task(client.speak(SENTENCES[0]))
    down = await until(stage, "the abandoned work is over", lambda row: row["active"] == 0)
    worked_on_s = time.monotonic() - left
    spoken = await next_call

    check(not down, "whisper was called down for not answering probes while it worked")
    check(worked_on_s > work_s / 3, f"at work for {worked_on_s:.1f} s of {work_s:.1f} s only")
    check(spoken.queued_s > work_s / 3, f"the next call waited {spoken.queued_s:.1f} s only")
    return (
        f"a transcription of {work_s:.1f} s was abandoned; whisper worked on for "
        f"{worked_on_s:.1f} s, and piper came {spoken.queued_s:.1f} s after it was asked for"
    )


async def nothing_is_left(stage: Stage) -> str:
    """The books agree with what the process table showed."""
    status = await stage.client.status()
    check(status["requests"] == [], f"requests are left: {status['requests']}")
    scheduler = status["scheduler"]
    seen = {name: len(pids) for name, pids in stage.watch.seen.items()}
    check(
        scheduler["loads"] == sum(seen.values()),
        f"{scheduler['loads']} loads by the books, but processes seen: {seen}",
    )
    rows = {name: row["residency"] for name, row in status["consumers"].items()}
    alive = sorted(stage.watch.alive())
    resident = sorted(name for name, residency in rows.items() if residency == "resident")
    check(alive == resident, f"alive: {alive}, by the books: {rows}")
    return (
        f"loads: {scheduler['loads']} ({', '.join(f'{n} of {k}' for k, n in seen.items())}), "
        f"evictions: {scheduler['evictions']}, resident: {', '.join(resident)}"
    )


SCENES: tuple[tuple[str, Callable[[Stage], Awaitable[str]]], ...] = (
    ("there and back", there_and_back),
    ("all at once", all_at_once),
    ("a client leaves", a_client_leaves),
    ("nothing is left", nothing_is_left),
)


async def until(stage: Stage, what: str, holds: Callable[[dict[str, object]], object]) -> bool:
    """Wait until it holds of whisper's status; was it called down meanwhile?"""
    deadline = time.monotonic() + CALL_S
    down = False
    while time.monotonic() < deadline:
        row = (await stage.client.status())["consumers"]["whisper"]
        if holds(row):
            return down
        down = down or (row["active"] and row["healthy"] is False)
        await asyncio.sleep(0.05)
    raise CheckError(f"not within {CALL_S} s: {what}")


async def play(broker: Broker, watch: Watch) -> None:
    timeout = aiohttp.ClientTimeout(total=CALL_S)
    async with (
        asyncio.timeout(ALL_S),
        aiohttp.ClientSession(broker.url, timeout=timeout) as session,
    ):
        stage = Stage(broker, Client(session), watch)
        await broker.ready(stage.client)
        for name, scene in SCENES:
            print(f"{name}:", flush=True)
            try:
                print(f"  {await scene(stage)}", flush=True)
            except Exception:
                await show_status(stage.client)
                raise


async def show_status(client: Client) -> None:
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
        print("status of the broker:", json.dumps(await client.status(), indent=1))


def end(broker: Broker, watch: Watch) -> str:
    """SIGTERM to the broker takes the services with it."""
    returncode = broker.stop()
    check(returncode == 0, f"mgpu serve ended with {returncode}")
    left = watch.kill_all()
    check(not left, f"processes lived on after the broker: {left}")
    watch.stop()
    check(not watch.together, f"lived at one moment: {watch.together[:3]}")
    return f"the broker took its services with it; in {watch.looks} looks never two services lived"


def run(folder: Path) -> None:
    with running_broker(folder) as (broker, watch):
        try:
            asyncio.run(play(broker, watch))
            print(f"the end:\n  {end(broker, watch)}")
        except Exception:
            print(f"the last words of the broker:\n{broker.last_words()}")
            raise


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="mgpu-real-"))
    began = time.monotonic()
    try:
        environment.install()
        run(folder)
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

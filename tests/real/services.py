"""Three services that take turns in a budget with room for one: Piper speaks, faster-whisper hears
it, llama.cpp's server answers.
"""

import asyncio
import time
from pathlib import Path

import environment
from broker import Host, Scene, Stage, free_ports
from client import check, question, words
from environment import Files

NAME = "three services take turns"
CONFIG = Path(__file__).with_suffix(".yaml")

# The tiny Whisper model gets each of these right with this voice, dozens of times out of dozens.
SENTENCES = (
    "A good plan is better than a quick answer.",
    "She put the old book back on the shelf and closed the door.",
    "The ship left the harbor early in the morning.",
)
# What the LLM is asked to go on with, and how that goes on.
ROWS = {
    "1, 2, 3, 4, 5,": "6, 7, 8, 9, 10, 11, 12",
    "Monday, Tuesday, Wednesday,": "Thursday, Friday, Saturday, Sunday",
    "January, February, March,": "April, May, June, July, August, September, October, November",
}
TOKENS = 40
# Told twice it keeps Whisper busy for some seconds.
STORY = """The ship left the harbor early in the morning, long before the sun was up.
She put the old book back on the shelf and closed the door behind her.
A plan that works is better than an answer that comes too soon.
In the evening the whole family sat around the table and talked about the day.
Nobody could say where the road ended, but everyone knew where it began. """
# An answer that would take a minute and more.
ENDLESS = question(STORY, tokens=3000, ignore_eos=True)
SOON_S = 20.0
# Half of its driver's `grace_s`: then it gets a second SIGTERM.
ASKED_TWICE_S = 5.0
ROUNDS = 3


def host(files: Files, folder: Path) -> Host:
    broker, piper, whisper, llama = free_ports(4)
    return Host(
        config=CONFIG,
        variables={
            "REAL_BROKER_PORT": broker,
            "REAL_PIPER_PORT": piper,
            "REAL_WHISPER_PORT": whisper,
            "REAL_LLAMA_PORT": llama,
            "REAL_PYTHON": str(environment.PYTHON),
            "REAL_VOICE": str(files.voice),
            "REAL_WHISPER": str(files.whisper),
            "REAL_LLAMA_SERVER": str(files.llama_server),
            "REAL_GEMMA": str(files.gemma),
            "REAL_LOG_DIR": str(folder / "events"),
        },
        processes={
            "piper": ("--port", piper),
            "whisper": ("--port", whisper),
            "llama": ("--port", llama),
        },
    )


async def there_and_back(stage: Stage) -> str:
    """Speak, listen, ask, again and again: each call needs the others gone and its own there."""
    for sentence, (row, rest) in zip(SENTENCES, ROWS.items(), strict=True):
        spoken = await stage.client.speak(sentence)
        heard, listened = await stage.client.listen(spoken.body)
        check(words(heard) == words(sentence), f"said: {sentence!r}, heard: {heard!r}")
        stream, answered = await stage.client.ask_streamed(question(row, tokens=TOKENS), "llama")
        check(goes_on(stream.text, rest), f"asked: {row!r}, answered: {stream.text!r}")
        print(f"  said:  {sentence}\n  heard: {heard}")
        print(f"  asked: {row}\n  told:  {' '.join(stream.text.split())}")
        print(f"    streamed: {stream.check_pace()}")
        for path, answer in (("tts", spoken), ("stt", listened), ("llm", answered)):
            print(f"    {path} took {answer.took_s:.2f} s, {answer.loading_s:.2f} s of it the load")
            check(answer.loading_s > 0, f"{path} was answered without a load")
    found = await stage.swaps()
    check(found == (3 * ROUNDS, 3 * ROUNDS - 1), f"loads and evictions are {found}")
    return f"{3 * ROUNDS} calls took {found[0]} loads and {found[1]} evictions"


async def all_at_once(stage: Stage) -> str:
    """Mixed calls together: each gets its own answer, and those of one kind share a load."""
    client = stage.client
    alone = {row: await _ask(stage, row) for row in ROWS}
    recordings = {text: (await client.speak(text)).body for text in SENTENCES}
    before, _ = await stage.swaps()
    async with asyncio.TaskGroup() as group:
        spoken = [group.create_task(client.speak(text)) for text in SENTENCES]
        await stage.until("piper", "it speaks", lambda row: row["active"] == 1)
        heard = {text: group.create_task(client.listen(wav)) for text, wav in recordings.items()}
        told = {row: group.create_task(_ask(stage, row)) for row in ROWS}
    loads = (await stage.swaps())[0] - before
    for text, task in heard.items():
        answer, _ = task.result()
        check(words(answer) == words(text), f"sent {text!r}, got the answer {answer!r}")
    for row, asked in told.items():
        answer = asked.result()
        check(answer == alone[row], f"{row!r}: {answer!r}, but alone it was {alone[row]!r}")
    for text, speech in zip(SENTENCES, spoken, strict=True):
        answer, _ = await client.listen(speech.result().body)
        check(words(answer) == words(text), f"asked for {text!r}, got the speech {answer!r}")
    check(loads == 2, f"{loads} loads: Piper was there, and each of the others comes once")
    return f"{3 * ROUNDS} calls at once, each with its own answer; loads: {loads}"


async def a_client_leaves(stage: Stage) -> str:
    """Whisper works on for who has left: it counts as at work, and alive, until it is done."""
    client = stage.client
    wav = (await client.speak(STORY * 2)).body
    heard, whole = await client.listen(wav)
    work_s = whole.took_s - whole.queued_s
    check(words(heard)[:9] == words(STORY)[:9], f"the long recording came back as {heard!r}")

    leaving = asyncio.create_task(client.listen(wav))
    await stage.until("whisper", "the call is at work", lambda row: row["active"] == 1)
    leaving.cancel()
    await asyncio.wait((leaving,))
    left = time.monotonic()
    next_call = asyncio.create_task(client.speak(SENTENCES[0]))
    down = await stage.until("whisper", "the work is over", lambda row: row["active"] == 0)
    worked_on_s = time.monotonic() - left
    spoken = await next_call

    check(not down, "whisper was called down for not answering probes while it worked")
    check(worked_on_s > work_s / 3, f"at work for {worked_on_s:.1f} s of {work_s:.1f} s only")
    check(spoken.queued_s > work_s / 3, f"the next call waited {spoken.queued_s:.1f} s only")
    return (
        f"a transcription of {work_s:.1f} s was abandoned; whisper worked on for "
        f"{worked_on_s:.1f} s, and piper came {spoken.queued_s:.1f} s after it was asked for"
    )


async def a_reader_leaves(stage: Stage) -> str:
    """llama.cpp stops at once for who leaves its stream: its one slot is free for the next."""
    stream, _ = await stage.client.ask_streamed(ENDLESS, "llama", leave_after=20)
    left = time.monotonic()
    before = await stage.swaps()
    await _ask(stage, next(iter(ROWS)))
    waited_s = time.monotonic() - left
    check(await stage.swaps() == before, "the next question needed a load")
    check(waited_s < SOON_S, f"the next answer came {waited_s:.1f} s after the client had left")

    await stage.client.ask_streamed(ENDLESS, "llama", leave_after=20)
    spoken = await stage.client.speak(SENTENCES[0])
    gone_s = spoken.queued_s - spoken.loading_s
    check(
        gone_s < ASKED_TWICE_S, f"llama.cpp was gone only {gone_s:.1f} s after its client had left"
    )
    return (
        f"a stream was left after {len(stream.pieces)} pieces of 3000: the next answer was there "
        f"{waited_s:.1f} s later; left again, llama.cpp was gone {gone_s:.1f} s later"
    )


async def an_asker_leaves(stage: Stage) -> str:
    """It looks once a second whether somebody waits for an answer that is not streamed."""
    leaving = asyncio.create_task(stage.client.ask(ENDLESS, "llama"))
    await stage.until("llama", "the question is at work", lambda row: row["active"] == 1)
    await asyncio.sleep(1)  # well within the answer
    leaving.cancel()
    await asyncio.wait((leaving,))
    left = time.monotonic()
    await _ask(stage, next(iter(ROWS)))
    waited_s = time.monotonic() - left
    check(waited_s < SOON_S, f"the next answer came {waited_s:.1f} s after the client had left")
    return f"the next answer was there {waited_s:.1f} s after it was asked for"


async def _ask(stage: Stage, row: str) -> str:
    told, _ = await stage.client.ask(question(row, tokens=TOKENS), "llama")
    check(goes_on(told, ROWS[row]), f"asked: {row!r}, answered: {told!r}")
    return told


def goes_on(told: str, rest: str) -> bool:
    return words(told)[: len(words(rest))] == words(rest)


SCENES: tuple[tuple[str, Scene], ...] = (
    ("there and back", there_and_back),
    ("all at once", all_at_once),
    ("a client leaves", a_client_leaves),
    ("a reader of a stream leaves", a_reader_leaves),
    ("an asker leaves", an_asker_leaves),
)

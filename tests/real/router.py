"""The models of one router of llama.cpp in one budget: the two small ones beside each other, or
the large one.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
from broker import Host, Scene, Stage, free_ports
from client import CALL_S, CheckError, check, question, words
from environment import Files
from llama import models

NAME = "three models of one router"
CONFIG = Path(__file__).with_suffix(".yaml")
NAMES = ("first", "second", "large")
TOKENS = 32
ROW, REST = "10, 20, 30, 40,", "50, 60, 70, 80, 90"
ENDLESS = {"tokens": 3000, "ignore_eos": True}
# What the router gives a model that works and is told to go, before it is killed.
STOP_S = 10.0
SLOW_S = 5.0  # for a machine with other work
NOTICED_S = 2.0


def host(files: Files, folder: Path) -> Host:
    broker, port = free_ports(2)
    directory = models(files, folder)
    files_of = {name: str(directory / f"{name}.gguf") for name in NAMES}
    return Host(
        config=CONFIG,
        variables={
            "REAL_BROKER_PORT": broker,
            "REAL_ROUTER_PORT": port,
            "REAL_LOG_DIR": str(folder / "events"),
        },
        # This model was never taught to chat: it goes on with what it is given.
        beside=(
            *(str(files.llama_server), "--models-dir", str(directory), "--models-max", "4"),
            *("--ctx-size", "4096", "--parallel", "1", "--threads", "1"),
            *("--chat-template", "{{ messages[-1]['content'] }}"),
            *("--host", "127.0.0.1", "--port", port),
        ),
        processes={
            "router": ("--port", port),
            **{f"router/{name}": ("--model", file) for name, file in files_of.items()},
        },
    )


async def small_or_large(stage: Stage) -> str:
    """The small ones fit together, and both have to go for the large one."""
    await stage.until("router/first", "the router answers", lambda row: row["healthy"])
    texts = []
    for name in ("first", "second", "large", "second", "first", "second"):
        stream, answer = await _ask_streamed(stage, name)
        texts.append(stream.text)
        print(f"  {name}: {' '.join(stream.text.split())!r}")
        print(f"    {stream.check_pace()}, after {answer.took_s:.2f} s")
        await _agree(stage)
    check(len(set(texts)) == 1, f"one model, but the answers differ: {texts}")
    found = await stage.swaps()
    check(found == (5, 3), f"loads and evictions are {found}")
    check(
        stage.watch.alive().keys() >= {"router/first", "router/second"},
        "the small ones do not live beside each other",
    )
    return f"6 calls took {found[0]} loads and {found[1]} evictions"


async def all_at_once(stage: Stage) -> str:
    """Calls for all models together, in this order: those of one model share its load."""
    before, _ = await stage.swaps()
    asked = [name for name in NAMES for _ in range(2)]
    tasks = []
    async with asyncio.TaskGroup() as group:
        for name in asked:
            known = await _known(stage)
            tasks.append(group.create_task(_ask(stage, name)))
            while await _known(stage) == known:  # noqa: ASYNC110 - nobody tells us
                await asyncio.sleep(0.02)
    texts = {task.result() for task in tasks}
    check(len(texts) == 1, f"one model, but the answers differ: {texts}")
    await _agree(stage)
    loads = (await stage.swaps())[0] - before
    check(loads == 1, f"{loads} loads: the small ones were there, and the large one comes once")
    return f"{len(asked)} calls at once; loads: {loads}"


async def unloaded_past_the_broker(stage: Stage) -> str:
    """The broker sees it at the router, and has it loaded again for the next request."""
    await _ask(stage, "large")
    before, _ = await stage.swaps()
    await _router(stage, "POST", "/models/unload", {"model": "large"})
    await stage.until("router/large", "it is seen", lambda row: not row["loaded"])
    await _ask(stage, "large")
    await _agree(stage)
    loads = (await stage.swaps())[0] - before
    check(loads == 1, f"{loads} loads")
    return "seen, and loaded again for the next request"


async def a_reader_leaves(stage: Stage) -> str:
    """A stream ends for who leaves it, and so its model can go, once the router has noticed."""
    waits_s = []
    for pause_s in (NOTICED_S, 0):
        asked = question(ROW, **ENDLESS, model="large")
        await stage.client.ask_streamed(asked, "router/large", leave_after=20)
        await asyncio.sleep(pause_s)
        waits_s.append(await _wait_of(stage, "first"))
    check(
        waits_s[0] < STOP_S / 2, f"the model of an abandoned stream went after {waits_s[0]:.1f} s"
    )
    check(waits_s[1] < STOP_S + SLOW_S, f"the model was not ended: {waits_s[1]:.1f} s")
    return (
        f"unloaded {NOTICED_S} s after its client had left, its model was gone {waits_s[0]:.1f} s "
        f"later; unloaded at once, {waits_s[1]:.1f} s later"
    )


async def an_asker_leaves(stage: Stage) -> str:
    """The router does not pass on that nobody waits for a whole answer: its model works on, and is
    killed when it does not go.
    """
    await _ask(stage, "large")
    asked = question(ROW, **ENDLESS, model="large")
    leaving = asyncio.create_task(stage.client.ask(asked, "router/large"))
    await stage.until("router/large", "the question is at work", lambda row: row["active"] == 1)
    await asyncio.sleep(1)  # well within the answer
    leaving.cancel()
    await asyncio.wait((leaving,))
    await asyncio.sleep(NOTICED_S)
    waited_s = await _wait_of(stage, "first")
    check(waited_s < STOP_S + SLOW_S, f"the model was not ended: {waited_s:.1f} s")
    return f"told to go after its client had left, its model was gone {waited_s:.1f} s later"


async def one_is_broken(stage: Stage) -> str:
    """A model that can't be loaded gets the router's own error, and takes no room from others."""
    await _ask(stage, "first")
    try:
        await _ask(stage, "broken")
    except CheckError as error:
        told = str(error)
    else:
        raise CheckError("a file that is no model answers")
    check(" 500 " in told, told)
    await _ask(stage, "second")
    await _agree(stage)
    return f"it was answered: {told}"


SCENES: tuple[tuple[str, Scene], ...] = (
    ("small or large", small_or_large),
    ("all at once", all_at_once),
    ("unloaded past the broker", unloaded_past_the_broker),
    ("a reader of a stream leaves", a_reader_leaves),
    ("an asker leaves", an_asker_leaves),
    ("one is broken", one_is_broken),
)


async def _ask(stage: Stage, model: str) -> str:
    asked = question(ROW, tokens=TOKENS, model=model)
    text, _ = await stage.client.ask(asked, f"router/{model}")
    check(words(text)[:5] == words(REST), f"asked: {ROW!r}, answered: {text!r}")
    return text


async def _wait_of(stage: Stage, model: str) -> float:
    """Give the seconds until a request is granted, when another model has to go for it."""
    asked = question(ROW, tokens=1, model=model)
    _, answer = await stage.client.ask(asked, f"router/{model}")
    await _agree(stage)
    return answer.queued_s


async def _ask_streamed(stage: Stage, model: str) -> tuple[Any, Any]:
    asked = question(ROW, tokens=TOKENS, model=model)
    return await stage.client.ask_streamed(asked, f"router/{model}")


async def _known(stage: Stage) -> int:
    """How many requests the broker has heard of."""
    status = await stage.client.status()
    served = sum(row["total_requests"] - row["active"] for row in status["consumers"].values())
    return served + len(status["requests"])


async def _agree(stage: Stage) -> None:
    """The broker, the router and the process table say that the same models are loaded."""
    told = (await _router(stage, "GET", "/models"))["data"]
    by_router = {row["id"] for row in told if row["status"]["value"] == "loaded"}
    rows = (await stage.client.status())["consumers"]
    by_broker = {name.removeprefix("router/") for name, row in rows.items() if row["loaded"]}
    alive = {name.removeprefix("router/") for name in stage.watch.alive()} - {"router"}
    found = f"by the router {by_router}, by the broker {by_broker}, alive {alive}"
    check(by_router == by_broker == alive, found)


async def _router(
    stage: Stage, method: str, path: str, body: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """Ask the router past the broker."""
    timeout = aiohttp.ClientTimeout(total=CALL_S)
    url = f"http://127.0.0.1:{stage.host.variables['REAL_ROUTER_PORT']}"
    async with (
        aiohttp.ClientSession(url, timeout=timeout) as session,
        session.request(method, path, json=body) as response,
    ):
        check(response.status == 200, f"{method} {path}: {response.status}")
        told: dict[str, Any] = await response.json()
        return told

"""`make page`: ComfyUI's own page, in Chromium, at the broker's front port.

Behind it are a stand-in for ComfyUI, which answers as real ones were recorded, and an LLM that
wants the same memory. What is checked is what the page shows, and what the broker did. Exit status
0: all is as it must be.
"""

import argparse
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

from tests.page.browser import BrowserError, Tab
from tests.page.comfyui import NAME, RESIDUE_MIB
from tests.page.stage import (
    CANCEL,
    COMFYUI_MIB,
    IDLE_S,
    PICTURES,
    CheckError,
    Stage,
    check,
    leave,
    set_up,
    until,
)

LEFT_OPEN_S = 60
GONE_S = 8  # how long what was evicted is watched
ALL_S = 540
PICTURE = "comfyui-page.png"
OTHER_WORKFLOW = {
    "1": {"class_type": "UNETLoader", "inputs": {}},
    "2": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "steps": 8}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "other"}},
}


async def it_loads(stage: Stage) -> str:
    """The page asks for the same, and gets the same, as without a broker."""
    took_s, opened = [], []
    for where in (stage.service.url, stage.front):
        began = time.monotonic()
        opened.append(await stage.open(where))
        took_s.append(time.monotonic() - began)
    direct, through = opened
    await direct.close()
    stage.tabs.append(through)
    for line in sorted({each.line for each in through.asked.values() if not each.ours}):
        print(f"  outside this host: {line}")
    for line in failures(through):
        print(f"  refused by the service: {line}")
    for line in through.complaints:
        print(f"  on the console: {line[:200]}")
    check(failures(through) == failures(direct), f"directly other things fail: {failures(direct)}")
    check(through.complaints == direct.complaints, f"directly it says: {direct.complaints}")
    row = await stage.row()
    check((row["total_requests"], row["loaded"]) == (0, False), f"it was used: {row}")
    return (
        f"{len(through.asked)} requests and a socket in {took_s[1]:.1f} s (without the broker "
        f"{took_s[0]:.1f} s), the same ones fail; ComfyUI stays unloaded"
    )


def failures(tab: Tab) -> list[str]:
    return sorted({each.line for each in tab.asked.values() if each.failed and each.ours})


async def it_shows_the_queue(stage: Stage) -> str:
    """Jobs of somebody else run on the page, and their pictures are there."""
    await stage.open_queue()
    stage.service.go.clear()
    jobs = [asyncio.create_task(stage.post(OTHER_WORKFLOW)) for _ in range(2)]
    for said in ("1 active", "1 running"):
        await stage.tab.until_says(said)
    await stage.until("the second one waits", lambda row: row["waiting"] == 1)
    stage.service.go.set()
    answers = [(await job).status for job in jobs]
    check(answers == [200, 200], f"the jobs were answered {answers}")
    await stage.until("both are over", lambda row: row["active"] == 0)
    for said in ("0 active", "other_00001_.png", "other_00002_.png"):
        await stage.tab.until_says(said)
    await stage.tab.until("their pictures are there", f"{PICTURES} >= 2")
    return "two jobs of somebody else: one runs on the page, then the pictures of both are there"


async def a_job_of_its_own(stage: Stage) -> str:
    """Run on the page is a request like any other; its turn lasts until the job is over."""
    stage.service.go.clear()
    asked = await stage.press_run(stage.tab)
    request = await stage.admitted(asked)
    await stage.tab.until(
        "its title tells of progress", r"/[1-9]\d*%.*KSampler/.test(document.title)"
    )
    title = await stage.tab.run("document.title")
    request = await stage.admitted(asked)
    check((request["state"], request["kind"]) == ("serving", "image"), f"its request: {request}")
    check(stage.host.card.held_mib[NAME] == COMFYUI_MIB, "the stand-in holds no memory")
    stage.service.go.set()
    await stage.served(asked)
    await stage.tab.until_says("ComfyUI_00003_.png")
    await stage.tab.until("its picture is there", f"{PICTURES} >= 3")
    await stage.tab.run("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    await asyncio.sleep(1)  # it glides there
    (stage.folder / PICTURE).write_bytes(await stage.tab.screenshot())
    return f"{request['id']} was served while the page said {title!r}, and until its picture came"


async def cancelled_on_the_page(stage: Stage) -> str:
    """The page's own button ends the job, and with it the turn."""
    stage.service.go.clear()
    asked = await stage.press_run(stage.tab)
    await stage.admitted(asked)
    await stage.tab.until_says("1 active")
    await stage.tab.click(CANCEL)
    await until("it is told to stop", lambda: "POST /api/interrupt" in stage.service.calls)
    stage.service.go.set()
    request = await stage.served(asked)
    await stage.tab.until_says("0 active")
    check(stage.service.in_state("cancelled"), "the job was not cancelled")
    return f"{request['id']} ended with it"


async def reloaded_in_mid_job(stage: Stage) -> str:
    """The page comes back as the client that it was, and sees its job to the end."""
    stage.service.go.clear()
    asked = await stage.press_run(stage.tab)
    await stage.admitted(asked)
    client = await stage.tab.run("window.app.api.clientId")
    await stage.tab.reload()
    await stage.is_there(stage.tab)
    check(await stage.tab.run("window.app.api.clientId") == client, "it is another client now")
    await stage.tab.until_says("1 active")
    stage.service.go.set()
    await stage.served(asked)
    await stage.tab.until_says("0 active")
    await stage.open_queue()
    check(list(stage.service.sockets) == [client], "the service does not know its socket")
    return "it is the same client, shows its job again, and sees the end"


async def it_waits_for_its_turn(stage: Stage) -> str:
    """The other service is at work: the page's POST waits, then ComfyUI comes in for it."""
    busy = await stage.llm_at_work()
    before, jobs = await stage.broker.status(), len(stage.service.jobs)
    asked = await stage.press_run(stage.tab)
    status = await stage.broker.until("it waits", lambda s: s["consumers"][NAME]["waiting"] == 1)
    [why] = [each["why"]["text"] for each in status["requests"] if each["consumer"] == NAME]
    await stage.tab.until_says("Job queuing")
    check(not asked.over and len(stage.service.jobs) == jobs, "its POST did not wait")
    await leave(busy)
    await stage.served(asked)
    after = await stage.broker.status()
    evictions = after["scheduler"]["evictions"] - before["scheduler"]["evictions"]
    check(evictions == 1, f"{evictions} evictions for it")
    check(not after["consumers"]["llm"]["loaded"], "the LLM is still there")
    return f"the page said that it queues, the broker: {why}; then the LLM was evicted for it"


async def left_open(stage: Stage) -> str:
    """A minute with the page open: unloaded for idleness, evicted, and never brought back."""
    before = (await stage.row())["total_requests"]
    await stage.until("unloaded for idleness", lambda row: not row["loaded"])
    looks = await sits_still(stage, LEFT_OPEN_S)
    await stage.served(await stage.press_run(stage.tab))
    check((await stage.row())["loaded"], "its job loaded nothing")
    check(await stage.ask_llm() == 200, "the LLM did not answer")
    looks += await sits_still(stage, GONE_S)
    check((await stage.row())["total_requests"] == before + 1, "a request came of it")
    return (
        f"unloaded after {IDLE_S} s and evicted after another job, absent in all of {looks} looks, "
        f"{LEFT_OPEN_S} s and {GONE_S} s long"
    )


async def sits_still(stage: Stage, how_long_s: float) -> int:
    """Watch that ComfyUI stays absent and takes no turn; give how often it was looked at."""
    looks, asked, end = 0, len(stage.tab.asked), time.monotonic() + how_long_s
    while time.monotonic() < end:
        row = await stage.row()
        check(row["residency"] == "absent" and not row["active"], f"it is not at rest: {row}")
        held_mib = stage.host.card.held_mib.get(NAME)
        check(held_mib == RESIDUE_MIB, f"the stand-in holds {held_mib} MiB")
        looks += 1
        await asyncio.sleep(0.5)
    new = [each.line for each in stage.tab.asked.values()][asked:]
    check(not [line for line in new if "/api/view" not in line], f"the page asked for {new}")
    return looks


async def the_service_restarts(stage: Stage) -> str:
    """ComfyUI goes down under the open page, and comes back: so does the page's socket."""
    sockets = len(stage.tab.sockets)
    await stage.service.stop()
    await stage.tab.until_says("Reconnecting")
    await stage.until("it is seen to be down", lambda row: row["healthy"] is False)
    await stage.service.start()
    await stage.tab.until_says("Reconnected")
    await stage.until("it is seen to be up", lambda row: row["healthy"])
    new = stage.tab.sockets[sockets:]
    check(new.count("answered 101") == 1, f"its sockets: {new}")
    await stage.served(await stage.press_run(stage.tab))
    await stage.tab.until_says("ComfyUI_00001_.png")
    return f"the page said so, came back with socket number {new.count('created')}, and drew"


async def a_second_tab(stage: Stage) -> str:
    """Two pages: one queue for both, and each hears of its own job."""
    second = await stage.open(stage.front)
    stage.tabs.append(second)
    names = {await tab.run("window.app.api.clientId") for tab in stage.tabs}
    check(len(names) == 2 and None not in names, f"their clients are {names}")
    stage.service.go.clear()
    asked = [await stage.press_run(tab) for tab in stage.tabs]
    await stage.until("one waits", lambda row: (row["active"], row["waiting"]) == (1, 1))
    stage.service.go.set()
    for each in asked:
        await stage.served(each)
    for tab in stage.tabs:
        await tab.call("Page.bringToFront")
        await tab.until_says("0 active")
    return "their jobs took turns; both pages show an empty queue at the end"


async def a_refusal(stage: Stage) -> str:
    """An error of the broker's own stands on the page, in its words."""
    await stage.broker.ask("POST", "/v1/drain")
    try:
        asked = await stage.press_run(stage.tab)
        await until("its POST is answered", lambda: asked.over)
    finally:
        await stage.broker.ask("POST", "/v1/resume")
    check(asked.status == 503, asked.line)
    await stage.tab.until_says("the broker takes no new work")
    return "a broker that drains refuses a job, and the page shows why"


async def closed_while_it_waits(stage: Stage) -> str:
    """Who closes the page while its POST waits is out of the queue at once."""
    jobs, busy = len(stage.service.jobs), await stage.llm_at_work()
    await stage.press_run(stage.tabs[-1])
    await stage.until("it waits", lambda row: row["waiting"] == 1)
    await stage.tabs.pop().close()
    await stage.until("it waits no more", lambda row: row["waiting"] == 0)
    await leave(busy)
    await stage.broker.until("at rest", lambda status: not status["requests"])
    check(len(stage.service.jobs) == jobs, "its job came to the service")
    return "it is out of the queue, and its job never came to the service"


async def closed_in_mid_job(stage: Stage) -> str:
    """The page had its answer: its job goes on, and holds its turn to the end."""
    stage.service.go.clear()
    asked = await stage.press_run(stage.tab)
    await stage.admitted(asked)
    await stage.tabs.pop().close()
    await until("its socket is closed at the service", lambda: not stage.service.sockets)
    request = await stage.admitted(asked)
    check(request["state"] == "serving", f"its request: {request}")
    stage.service.go.set()
    await stage.served(asked)
    last = list(stage.service.jobs.values())[-1]
    check(last.state == "completed", f"its job is {last.state}")
    return "its job went on to its end, as it does without a broker"


async def the_end(stage: Stage) -> str:
    """An open page does not keep the broker from ending; its log has what was submitted."""
    status = await stage.broker.status()
    check(status["requests"] == [], f"requests are left: {status['requests']}")
    lines = [
        line
        for path in (stage.folder / "log").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    events = [json.loads(line).get("event", {}) for line in lines]
    asked = {each["request"]: each for each in events if each.get("type") == "Request"}
    found = sum(each["consumer"] == NAME for each in asked.values())
    check(found == stage.submitted, f"{found} requests in the log, {stage.submitted} were made")
    left = {each["request"] for each in events if each.get("type") == "Cancel"}
    check(left <= set(asked), f"events of what took no turn: {left - set(asked)}")
    stage.tabs.append(await stage.open(stage.front))
    stage.broker.signal(signal.SIGTERM)
    code = await stage.broker.exit_code()
    check(code == 0, f"mgpu serve ended with {code}")
    await stage.tab.until_says("Reconnecting")
    return f"all {found} jobs are in the event log, nothing else; the broker ended under the page"


SCENES: tuple[tuple[str, Callable[[Stage], Awaitable[str]]], ...] = (
    ("it loads", it_loads),
    ("it shows the queue", it_shows_the_queue),
    ("a job of its own", a_job_of_its_own),
    ("cancelled on the page", cancelled_on_the_page),
    ("reloaded in mid-job", reloaded_in_mid_job),
    ("it waits for its turn", it_waits_for_its_turn),
    ("left open", left_open),
    ("the service restarts", the_service_restarts),
    ("a second tab", a_second_tab),
    ("a refusal", a_refusal),
    ("closed while it waits", closed_while_it_waits),
    ("closed in mid-job", closed_in_mid_job),
    ("the end", the_end),
)


async def play(folder: Path) -> None:
    async with asyncio.timeout(ALL_S), set_up(folder) as stage:
        for name, scene in SCENES:
            print(f"{name}:", flush=True)
            try:
                print(f"  {await scene(stage)}", flush=True)
            except Exception:
                with contextlib.suppress(Exception):
                    await stage.show()
                raise


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(description="ComfyUI's page at a front port of the broker")
    parser.add_argument("--picture", type=Path, help="where to put what the page looks like")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mgpu-page-"))
    began = time.monotonic()
    try:
        asyncio.run(play(folder))
        if arguments.picture is not None:
            shutil.copy(folder / PICTURE, arguments.picture)
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - shown, and told by the exit status
        if not isinstance(error, (CheckError, BrowserError)):
            traceback.print_exception(error)
        print(f"FAILED: {error}\nlogs and pictures are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(f"OK, after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

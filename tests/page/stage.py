"""What the scenes play on: a broker, ComfyUI's stand-in and an LLM behind it, and a browser."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import aiohttp

from tests.page.browser import Asked, Browser, BrowserError, Tab, chromium
from tests.page.comfyui import NAME, ComfyUI, comfyui
from tests.support.dev_http import free_port
from tests.support.facade import Answer, ServeProcess
from tests.support.gpu_host import GpuHost, gpu_host, ready

TOTAL_MIB, COMFYUI_MIB, LLM_MIB = 16_000, 13_000, 8_000  # not both at once
IDLE_S = 10
LIMIT_S = 30
RUN = "[data-testid=queue-button]"
CANCEL = "[aria-label='Cancel current run']"
QUEUE = "[data-testid=queue-overlay-toggle]"
LIST = "Clear queue"  # what the list of jobs has at its head
WORKFLOW_NODES = 10
PICTURES = """[...document.querySelectorAll('img')]
  .filter(image => image.src.includes('/api/view') && image.naturalWidth > 0).length"""
POST = "POST /api/prompt"
LAST = "/api/experiment/models"  # of what a page asks for when it is opened


class CheckError(Exception):
    """Something is not as it must be; the message says what."""


def check(condition: object, otherwise: str) -> None:
    if not condition:
        raise CheckError(otherwise)


async def until(what: str, holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        check(time.monotonic() < deadline, f"not within {LIMIT_S} s: {what}")
        await asyncio.sleep(0.02)


async def leave(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])


def posts(tab: Tab) -> list[Asked]:
    return [asked for asked in tab.asked.values() if asked.line.startswith(POST)]


def lacks(tab: Tab) -> list[str]:
    """Name what it has not yet: its socket, or what it wants to know from the service."""
    asked = [each for each in tab.asked.values() if "/api/" in each.line]
    lacking = [each.line for each in asked if not each.over]
    if not any(LAST in each.line for each in asked):
        lacking.append(LAST)
    return lacking if "answered 101" in tab.sockets else [*lacking, "its socket"]


@dataclass
class Stage:
    folder: Path
    host: GpuHost
    broker: ServeProcess
    service: ComfyUI
    browser: Browser
    front: str
    session: aiohttp.ClientSession
    tabs: list[Tab] = field(default_factory=list)
    submitted: int = 0  # jobs for ComfyUI that were asked for

    @property
    def tab(self) -> Tab:
        return self.tabs[0]

    # -------------------------------------------------------------------------- the browser

    async def open(self, where: str) -> Tab:
        """Open the page, and wait until it has its workflow and all else that it wants."""
        tab = await self.browser.open(f"{where}/")
        await self.is_there(tab)
        return tab

    async def is_there(self, tab: Tab) -> None:
        await tab.until("the page is there", f"document.querySelector('{RUN}') !== null")
        nodes = f"window.app?.rootGraph?.nodes.length === {WORKFLOW_NODES}"
        await tab.until("the workflow is there", nodes)
        try:
            await until("it has all that it asked for", lambda: not lacks(tab))
        except CheckError as error:
            raise CheckError(f"{error}; it lacks {lacks(tab)}") from None

    async def open_queue(self) -> None:
        """Have the list of jobs stay open on the page."""
        for _ in range(5):
            await self.tab.click(QUEUE)
            with contextlib.suppress(BrowserError):
                return await self.tab.until_says(LIST, limit_s=5)
        raise CheckError("the list of jobs does not open")

    async def press_run(self, tab: Tab) -> Asked:
        """Have the page submit its workflow, and give its request."""
        before = len(posts(tab))
        await tab.click(RUN)
        self.submitted += 1
        await until("the page posts its job", lambda: len(posts(tab)) > before)
        return posts(tab)[-1]

    # --------------------------------------------------------------------------- the broker

    async def row(self) -> dict[str, Any]:
        """Give what the status says of ComfyUI."""
        row: dict[str, Any] = (await self.broker.status())["consumers"][NAME]
        return row

    async def until(self, what: str, holds: Callable[[dict[str, Any]], object]) -> None:
        """Wait until it holds of ComfyUI in the status."""
        await self.broker.until(what, lambda status: holds(status["consumers"][NAME]))

    async def post(self, prompt: dict[str, Any]) -> Answer:
        """Submit a job as somebody else, past the page."""
        self.submitted += 1
        body = json.dumps({"prompt": prompt}).encode()
        return await self.broker.ask("POST", "/v1/image", body=body)

    async def admitted(self, asked: Asked) -> dict[str, Any]:
        """Wait until a job of the page is at the service; give its request's row."""
        await until("the page's POST is answered", lambda: asked.over)
        check(asked.status == 200, asked.line)
        return await self._request(asked)

    async def served(self, asked: Asked) -> dict[str, Any]:
        """Wait until the broker says that the job is over; give its request's row."""
        await self.admitted(asked)
        deadline = time.monotonic() + LIMIT_S
        while (row := await self._request(asked))["state"] != "ended":
            check(time.monotonic() < deadline, f"not within {LIMIT_S} s: the job ends: {row}")
            await asyncio.sleep(0.05)
        check(row["outcome"] == "served", f"its request ended as {row['outcome']}")
        return row

    async def _request(self, asked: Asked) -> dict[str, Any]:
        target = f"/v1/requests/{asked.headers['x-mgpu-request']}"
        answer = await self.broker.ask("GET", target)
        check(answer.status == 200, f"{asked.line} was no work: {target} is unknown")
        row: dict[str, Any] = answer.json()
        return row

    async def llm_at_work(self) -> asyncio.Task[int]:
        """Have the other service work until the call is cancelled."""
        call = asyncio.create_task(self.ask_llm("?do=never"))
        await self.broker.until("the LLM works", lambda s: s["consumers"]["llm"]["active"] == 1)
        return call

    async def ask_llm(self, query: str = "") -> int:
        async with self.session.post(f"{self.broker.url}/v1/llm{query}", data=b"{}") as answer:
            return answer.status

    async def show(self) -> None:
        """Keep what helps to see what went wrong."""
        status = json.dumps(await self.broker.status(), indent=1)
        pieces = {"status.json": status, "broker.log": "".join(self.broker.lines)}
        pieces["calls.log"] = "\n".join(self.service.calls)
        for name, text in pieces.items():
            (self.folder / name).write_text(text)
        for number, tab in enumerate(self.tabs):
            (self.folder / f"tab-{number}.png").write_bytes(await tab.screenshot())


@contextlib.asynccontextmanager
async def set_up(folder: Path) -> AsyncIterator[Stage]:
    port = free_port()
    page = Path(str(files("comfyui_frontend_package"))) / "static"
    async with contextlib.AsyncExitStack() as stack:
        host = stack.enter_context(gpu_host(folder, TOTAL_MIB))
        host.start("llm", mib=LLM_MIB)
        service = await stack.enter_async_context(comfyui(page, host.card, COMFYUI_MIB))
        consumers = {
            NAME: {
                "preset": "comfyui",
                "url": service.url,
                "front": port,
                "vram_resident_mib": COMFYUI_MIB,
                "idle_unload_s": IDLE_S,
            },
            "llm": {
                "paths": {"llm": {"path": "/chat"}},
                "vram_resident_mib": LLM_MIB,
                "load": {"path": "/load"},
                "unload": {"path": "/unload"},
            },
        }
        routing = {"image": NAME, "llm": "llm"}
        broker = stack.enter_context(host.serve(consumers=consumers, routing=routing))
        await ready(broker)
        browser = await stack.enter_async_context(chromium(folder))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield Stage(folder, host, broker, service, browser, f"http://127.0.0.1:{port}", session)

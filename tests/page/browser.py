"""Debian's Chromium without a screen, driven over the DevTools protocol.

    async with chromium(folder) as browser:
        tab = await browser.open("http://127.0.0.1:8188/")
        await tab.until("it is there", "document.querySelector('canvas')")
        await tab.click("[data-testid=queue-button]")

It finds nobody but this host: no other name resolves.
"""

import asyncio
import base64
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

LIMIT_S = 60
MAX_MESSAGE_BYTES = 256 << 20
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
    "--window-size=1400,900",
    "--remote-debugging-port=0",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
WHAT_TO_INSTALL = "there is no chromium here; on Debian: apt-get install chromium"


class BrowserError(Exception):
    """The browser or a page of it did not do what it should; the message says what."""


@dataclass
class Asked:
    """One request of a page."""

    method: str
    url: str
    document: str  # of which opening of the page it is a part
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)  # of the answer, names in small letters
    error: str | None = None
    over: bool = False

    @property
    def ours(self) -> bool:
        """Whether it went to this host at all."""
        return urlsplit(self.url).hostname == "127.0.0.1"

    @property
    def line(self) -> str:
        """Name it, without what differs from one opening of the page to the next."""
        parts = urlsplit(self.url)
        target = parts._replace(scheme="", netloc="", query="" if not self.ours else parts.query)
        where = target.geturl() if self.ours else f"{parts.hostname}{parts.path}"
        return f"{self.method} {where}: {self.error or self.status}"

    @property
    def failed(self) -> bool:
        # What a page does not read to its end counts as aborted, and has a status.
        return self.status >= 400 if self.status is not None else self.error is not None


@dataclass
class Tab:
    browser: "Browser"
    session: str
    target: str
    document: str = ""  # the one that is open: each opening of a page is another
    asked: dict[str, Asked] = field(default_factory=dict)
    sockets: list[str] = field(default_factory=list)  # what became of its WebSockets
    complaints: list[str] = field(default_factory=list)  # errors on its console

    async def call(self, method: str, **params: Any) -> Any:
        return await self.browser.call(method, self.session, **params)

    async def run(self, script: str) -> Any:
        """Give what the script comes to, in the page."""
        answer = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise BrowserError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, what: str, script: str, limit_s: float = LIMIT_S) -> Any:
        """Wait until the script comes to something, and give that."""
        deadline = time.monotonic() + limit_s
        while not (found := await self.run(script)):
            if time.monotonic() > deadline:
                shown = await self.text()
                raise BrowserError(f"not within {limit_s} s: {what}; it shows {shown!r}")
            await asyncio.sleep(0.1)
        return found

    async def text(self) -> str:
        """Give the words on the page."""
        text: str = await self.run("document.body.innerText")
        return text

    async def until_says(self, words: str, limit_s: float = LIMIT_S) -> None:
        script = f"document.body.innerText.includes({json.dumps(words)})"
        await self.until(f"the page says {words!r}", script, limit_s)

    async def click(self, selector: str) -> None:
        """Click on what the selector finds.

        In one go: a page that draws itself anew between a mouse's down and up would miss it.
        """
        await self.call("Page.bringToFront")
        found = f"document.querySelector({json.dumps(selector)})"
        await self.until(f"there is {selector}", f"({found}?.click(), {found} !== null)")

    async def screenshot(self) -> bytes:
        answer = await self.call("Page.captureScreenshot", format="png")
        picture: bytes = base64.b64decode(answer["data"])
        return picture

    async def reload(self) -> None:
        """Open the page anew; what it asked and said before is forgotten."""
        loaded = self.document
        await self.call("Page.reload")
        deadline = time.monotonic() + LIMIT_S
        while self.document == loaded:
            if time.monotonic() > deadline:
                raise BrowserError(f"not within {LIMIT_S} s: the page is loaded anew")
            await asyncio.sleep(0.05)

    def _opened(self, document: str) -> None:
        """Let go of what the document before this one was about: nobody tells how that ended."""
        self.document = document
        self.asked = {key: each for key, each in self.asked.items() if each.document == document}
        self.sockets.clear()
        self.complaints.clear()

    async def close(self) -> None:
        await self.browser.call("Target.closeTarget", targetId=self.target)

    def heard(self, method: str, told: dict[str, Any]) -> None:
        match method:
            # What has another scheme is the page's own: blob:, data:.
            case "Network.requestWillBeSent" if told["request"]["url"].startswith("http"):
                request = told["request"]
                asked = Asked(request["method"], request["url"], told["loaderId"])
                self.asked[told["requestId"]] = asked
            case "Network.responseReceived" if told["requestId"] in self.asked:
                asked, answer = self.asked[told["requestId"]], told["response"]
                asked.status = answer["status"]
                asked.headers = {name.lower(): text for name, text in answer["headers"].items()}
            case "Network.loadingFinished" if told["requestId"] in self.asked:
                self.asked[told["requestId"]].over = True
            case "Network.loadingFailed" if told["requestId"] in self.asked:
                asked = self.asked[told["requestId"]]
                asked.error, asked.over = told["errorText"], True
            case "Network.webSocketCreated":
                self.sockets.append("created")
            case "Network.webSocketHandshakeResponseReceived":
                self.sockets.append(f"answered {told['response']['status']}")
            case "Network.webSocketClosed":
                self.sockets.append("closed")
            case "Page.frameNavigated" if "parentId" not in told["frame"]:
                self._opened(told["frame"]["loaderId"])
            case "Page.javascriptDialogOpening":  # "leave this page?"
                self.browser.meanwhile(self.call("Page.handleJavaScriptDialog", accept=True))
            case "Runtime.exceptionThrown":
                details = told["exceptionDetails"]
                thrown = details.get("exception", {}).get("description", "")
                self.complaints.append(f"{details['text']} {thrown}")
            case "Runtime.consoleAPICalled" if told["type"] == "error":
                said = [str(each.get("value", each.get("description"))) for each in told["args"]]
                self.complaints.append(" ".join(said))


class Browser:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._tabs: dict[str, Tab] = {}
        self._count = 0
        self._meanwhile: set[asyncio.Task[Any]] = set()

    async def open(self, url: str) -> Tab:
        """Open a page in a window of its own."""
        target = (await self.call("Target.createTarget", url="about:blank", newWindow=True))[
            "targetId"
        ]
        attached = await self.call("Target.attachToTarget", targetId=target, flatten=True)
        tab = Tab(self, attached["sessionId"], target)
        self._tabs[tab.session] = tab
        for domain in ("Page", "Network", "Runtime"):
            await tab.call(f"{domain}.enable")
        await tab.call("Page.navigate", url=url)
        return tab

    async def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        answer = self._answers[self._count] = asyncio.get_running_loop().create_future()
        await self._socket.send_json(message)
        async with asyncio.timeout(LIMIT_S):
            return await answer

    def meanwhile(self, call: Coroutine[Any, Any, Any]) -> None:
        """Make a call whose answer nobody waits for."""
        task = asyncio.create_task(call)
        self._meanwhile.add(task)
        task.add_done_callback(self._meanwhile.discard)

    async def listen(self) -> None:
        """Take in what it says, until it says no more."""
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                answer = self._answers.pop(told["id"])
                if answer.done():
                    continue
                if "error" in told:
                    answer.set_exception(BrowserError(told["error"]["message"]))
                else:
                    answer.set_result(told["result"])
            elif tab := self._tabs.get(told.get("sessionId", "")):
                tab.heard(told["method"], told["params"])
        for answer in self._answers.values():
            answer.cancel()


@contextlib.asynccontextmanager
async def chromium(folder: Path) -> AsyncIterator[Browser]:
    """Run it with a profile of its own, and end it with all that it started."""
    program = shutil.which("chromium")
    if program is None:
        raise BrowserError(WHAT_TO_INSTALL)
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as profile:
        with (folder / "chromium.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                program,
                *FLAGS,
                f"--user-data-dir={profile}",
                "about:blank",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            address = await _address(Path(profile) / "DevToolsActivePort", process)
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(address, max_msg_size=MAX_MESSAGE_BYTES) as socket,
            ):
                browser = Browser(socket)
                listening = asyncio.create_task(browser.listen())
                try:
                    yield browser
                finally:
                    with contextlib.suppress(BrowserError, ConnectionError, TimeoutError):
                        await browser.call("Browser.close")
                    listening.cancel()
        finally:
            await _end(process)


async def _address(path: Path, process: asyncio.subprocess.Process) -> str:
    """Wait until it has written down where it listens."""
    deadline = time.monotonic() + LIMIT_S
    while len(lines := _lines(path)) < 2:
        if process.returncode is not None or time.monotonic() > deadline:
            raise BrowserError("chromium did not start: see chromium.log")
        await asyncio.sleep(0.05)
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"


def _lines(path: Path) -> list[str]:
    return path.read_text().split("\n") if path.exists() else []


async def _end(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(10):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()

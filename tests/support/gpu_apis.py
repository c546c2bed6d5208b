"""A stand-in that speaks OpenAI's and Anthropic's protocols, in a process of its own, and needs
memory of a simulated card for it.

`/load`, `/unload`  take its memory and give it back, as its `Habits` say
`/state`            says whether it holds it, and what went wrong: asked without being loaded, not
                    enough memory, its memory gone under its work

A `lazy` one takes its memory for the first work.
"""

import asyncio
import json
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.support.apis import Apis, Asked, apis, refusal, whole
from tests.support.gpu_service import Card, Habits

LOAD_S, WORK_S = 0.05, 0.01


@dataclass(kw_only=True)
class GpuApis(Apis):
    habits: Habits
    holds: bool = False
    wrong: list[str] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        match request.path:
            case "/state":
                size = self.habits.mib << 20 if self.holds else 0
                state = {"holds": self.holds, "bytes": size, "working": self.working}
                return await self.send(request, whole({**state, "wrong": self.wrong}))
            case "/load":
                return await self._answer_whether(request, await self._load())
            case "/unload":
                await self._unload()
                return await self._answer_whether(request, True)
        return await super().answer(request)

    async def work(self, request: web.Request, call: str, asked: Asked) -> web.StreamResponse:
        if not self.holds and not (self.habits.lazy and await self._load()):
            self.wrong.append(f"{call} without memory")
            return await self._answer_whether(request, False)
        await asyncio.sleep(WORK_S)
        answer = await super().work(request, call, asked)
        if not self.holds:
            self.wrong.append(f"unloaded under {call}")
        return answer

    async def _answer_whether(self, request: web.Request, well: bool) -> web.StreamResponse:
        reply = whole({}) if well else refusal(500, "CUDA out of memory", "server_error")
        return await self.send(request, reply)

    @property
    def _card(self) -> Card:
        return Card(Path(self.habits.directory))

    async def _load(self) -> bool:
        await asyncio.sleep(LOAD_S)
        self.holds = self.holds or self._card.take(self.habits.name, self.habits.mib)
        if not self.holds:
            self.wrong.append("out of memory")
        return self.holds

    async def _unload(self) -> None:
        self.holds = False
        await asyncio.sleep(self.habits.free_s)
        self._card.give_back(self.habits.name)


async def main(told: Any) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with apis(GpuApis(habits=Habits(**told))) as service:
        print(service.url.rpartition(":")[2], flush=True)
        await ended.wait()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))

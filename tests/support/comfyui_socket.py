"""ComfyUI's WebSocket beside the stand-in for its HTTP: who hears what of a prompt, as recorded.

    async with comfyui(Talking) as service:
        ...                                     # a client connects to /ws, and posts a prompt
        await service.begin(service.running[0])  # its client is told so
        await service.progress(1)
        await service.finish()

`status` goes to all, the rest to the client of the prompt. A prompt without a client has its
progress told to all. A socket that closes takes its client's name out of the table, even if a newer
one of that name is there: the newer one hears nothing from then on.
"""

import asyncio
import json
import struct
import uuid
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType, web

from tests.support.comfyui import ComfyUI

AT_MS = 1_795_255_871_581
STEPS = 3
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(300)
PREVIEW, PREVIEW_WITH_METADATA = 1, 4
FLAGS = {"supports_preview_metadata": True, "max_upload_size": 104_857_600}


@dataclass
class Talking(ComfyUI):
    sockets: dict[str, web.WebSocketResponse] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)  # of a client, by its name
    owners: dict[str, str | None] = field(default_factory=dict)  # who posted a prompt
    transports: list[asyncio.Transport] = field(default_factory=list)
    prompt_id: str = ""  # at work
    node: str | None = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path in {"/ws", "/api/ws"}:
            return await self._socket(request)
        answer = await super().answer(request)
        if (request.method, request.path) == ("POST", "/prompt") and answer.status == 200:
            prompt = json.loads(answer.body)["prompt_id"]
            self.owners[prompt] = self.bodies[-1].get("client_id")
            await self._tell_status()
        return answer

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        name = request.query.get("clientId") or uuid.uuid4().hex
        self.sockets[name] = socket
        self.transports.append(request.transport)
        await self._tell("status", {**self._status(), "sid": name}, name)
        if self.node is not None and self.owners[self.prompt_id] == name:
            await self._tell("executing", {"node": self.node}, name)
        first = True
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT and first:
                    await self._hear(json.loads(message.data), name)
                first = False
        finally:
            self.sockets.pop(name, None)
        return socket

    async def _hear(self, told: Any, name: str) -> None:
        if told["type"] == "feature_flags":
            self.flags[name] = told["data"]
            await self._tell("feature_flags", FLAGS, name)

    def drop(self) -> None:
        """Let all sockets go as a killed process does: without a word."""
        for transport in self.transports:
            transport.abort()

    # ------------------------------------------------------------------------- the way of a prompt

    async def begin(self, prompt_id: str) -> None:
        """Work up to its second node."""
        self.prompt_id = prompt_id
        about = {"prompt_id": prompt_id, "timestamp": AT_MS}
        await self._tell_status()
        await self._tell_owner("execution_start", about)
        await self._tell_owner("execution_cached", {"nodes": [], **about})
        await self._enter("1")
        await self._enter("2")

    async def progress(self, step: int) -> None:
        await self._tell_progress_state(step)
        at = {"value": step, "max": STEPS, "prompt_id": self.prompt_id, "node": "2"}
        await self._tell_watching("progress", at)
        for name in self._watching():
            await self._show(name)

    async def finish(self) -> None:
        await self._enter("3")
        image = {"filename": "a b&c.png", "subfolder": "of/today", "type": "output"}
        about = {"prompt_id": self.prompt_id}
        done = {"node": "3", "display_node": "3", "output": {"images": [image]}, **about}
        await self._tell_owner("executed", done)
        await self._tell_progress_state(STEPS)
        await self._tell_owner("execution_success", {**about, "timestamp": AT_MS})
        self.node = None
        self.end(self.prompt_id)  # not in the history before that
        await self._tell_status()
        await self._tell_owner("executing", {"node": None, **about})

    async def _enter(self, node: str) -> None:
        self.node = node
        await self._tell_progress_state(0)
        about = {"node": node, "display_node": node, "prompt_id": self.prompt_id}
        await self._tell_owner("executing", about)

    # ----------------------------------------------------------------------------- who is told what

    def _watching(self) -> list[str]:
        owner = self.owners[self.prompt_id]
        return list(self.sockets) if owner is None else [owner]

    async def _tell_owner(self, kind: str, data: Any) -> None:
        if (owner := self.owners[self.prompt_id]) is not None:
            await self._tell(kind, data, owner)

    async def _tell_watching(self, kind: str, data: Any) -> None:
        for name in self._watching():
            await self._tell(kind, data, name)

    async def _tell_progress_state(self, value: int) -> None:
        state = {"value": value, "max": STEPS, "state": "running", "node_id": self.node}
        told = {"prompt_id": self.prompt_id, "nodes": {self.node: state}}
        await self._tell_watching("progress_state", told)

    async def _tell_status(self) -> None:
        for name in list(self.sockets):
            await self._tell("status", self._status(), name)

    def _status(self) -> dict[str, Any]:
        remaining = len(self.running) + len(self.pending)
        return {"status": {"exec_info": {"queue_remaining": remaining}}}

    async def _show(self, name: str) -> None:
        """Send a preview: with what it is of, to those who said that they understand that."""
        frame = struct.pack(">II", PREVIEW, 1) + JPEG
        if self.flags.get(name, {}).get("supports_preview_metadata"):
            about = {"node_id": self.node, "prompt_id": self.prompt_id, "image_type": "image/jpeg"}
            metadata = json.dumps(about).encode()
            frame = struct.pack(">II", PREVIEW_WITH_METADATA, len(metadata)) + metadata + JPEG
        if name in self.sockets:
            await self.sockets[name].send_bytes(frame)

    async def _tell(self, kind: str, data: Any, name: str) -> None:
        if name in self.sockets and not self.sockets[name].closed:
            await self.sockets[name].send_json({"type": kind, "data": data})

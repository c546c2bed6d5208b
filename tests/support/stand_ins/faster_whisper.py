"""faster-whisper-server (the package of that name), as recorded.

Its traps: its work blocks everything, its health as well; a transcription goes on when its client
has left; its first one loads the model; a wrong path of a model shows only then; three shapes of
errors.
"""

import asyncio
from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn, form_of

FORMATS = ("json", "verbose_json")
TEXT = {"text": " Hello."}
VERBOSE = {"task": "transcribe", "language": "en", "duration": 2.4, **TEXT}
MISSING = {"type": "missing", "loc": ["body", "file"], "msg": "Field required", "input": None}
NUMBER = {"type": "float_parsing", "loc": ["body", "temperature"], "msg": "not a number"}


class FasterWhisper(StandIn):
    name = "faster-whisper-server"
    ends_with_client = False

    def __init__(self, card: Card, mib: int = 1_000, *, found: bool = True, **more: Any) -> None:
        super().__init__(card, mib, **more)
        self.found = found  # its model is where its command says
        self._turn = asyncio.Lock()  # its event loop

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health, allow_head=False),
            web.post("/v1/audio/transcriptions", self.transcribe),
            web.post("/v1/audio/translations", self.transcribe),
        ]

    def unknown(self, error: web.HTTPException) -> web.Response:
        return web.json_response({"detail": error.reason}, status=error.status)

    async def health(self, _request: web.Request) -> web.Response:
        async with self._turn:
            return web.json_response({"status": "ok"})

    async def transcribe(self, request: web.Request) -> web.StreamResponse:
        kind = request.headers.get("Content-Type", "")
        if kind.startswith("multipart/") and "boundary=" not in kind:
            detail = {"detail": "Missing boundary in multipart."}
            return web.json_response(detail, status=400)
        form = await form_of(request)
        if error := self._refusal(form):
            return error
        async with self._turn:
            if not self.found or form["file"][:4] != b"RIFF":
                return web.Response(status=500, text="Internal Server Error")
            self.take()
            verbose = form.get("response_format") == b"verbose_json"
            return await self.answer_work(request, web.json_response(VERBOSE if verbose else TEXT))

    def _refusal(self, form: dict[str, bytes]) -> web.Response | None:
        wanted = form.get("response_format", b"json").decode()
        if "file" not in form:
            return web.json_response({"detail": [MISSING]}, status=422)
        if not form.get("temperature", b"0").replace(b".", b"").isdigit():
            return web.json_response({"detail": [NUMBER]}, status=422)
        if wanted not in FORMATS:
            error = {"message": f"Unsupported response_format: {wanted}", "type": "invalid"}
            return web.json_response({"detail": {"error": error}}, status=400)
        return None

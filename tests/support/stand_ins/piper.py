"""Piper's HTTP server, as recorded.

Its traps: no unload, and no health but /info; sound comes as text/html; every bad input is a 500;
what a client has left is spoken to its end; all requests are worked on at once.
"""

import json
from typing import Any

from aiohttp import web

from tests.support.stand_ins.base import StandIn

PAGE = "<!doctype html>\n<title>{0}</title>\n"


class Piper(StandIn):
    name = "piper"
    ends_with_client = False

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.last: dict[str, Any] | None = None

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/info", self.info),
            web.get("/voices", self.voices),
            web.get("/", self.page, allow_head=False),
            web.post("/synthesize", self.synthesize),
            web.options("/synthesize", self.page),
        ]

    def unknown(self, error: web.HTTPException) -> web.Response:
        text = PAGE.format(f"{error.status} {error.reason}")
        return web.Response(status=error.status, text=text, content_type="text/html")

    async def info(self, _request: web.Request) -> web.Response:
        voice = {"language": "en-us", "name": "en_US-joe-medium", "num_speakers": 1}
        return web.json_response({"last": self.last, "voice": voice})

    async def voices(self, _request: web.Request) -> web.Response:
        return web.json_response({"en_US-joe-medium": {"language": {"code": "en-us"}}})

    async def page(self, _request: web.Request) -> web.Response:
        return web.Response(text=PAGE.format("Piper"), content_type="text/html")

    async def synthesize(self, request: web.Request) -> web.StreamResponse:
        try:
            asked = json.loads(await request.read())
            spoken = any(letter.isalpha() for letter in asked["text"])
            float(asked.get("length_scale", 1))
        except (ValueError, KeyError, TypeError):
            spoken = False
        if not spoken:
            raise web.HTTPInternalServerError
        self.last = {"text": asked["text"], "alignments": []}
        sound = web.Response(body=b"RIFF" + bytes(40), content_type="text/html", charset="utf-8")
        return await self.answer_work(request, sound)

"""A stand-in for mVoice: speaks and hears with one model, which it loads and unloads when told.

Its vices: an unload is answered before it is done, a load needs more than what stays afterwards,
and now and then a load or a piece of work fails. It is loaded from its start on.
"""

import asyncio
import json
import uuid
from collections.abc import Callable, Iterable

from aiohttp import web
from attrs import define, field

from mgpu_http.demo.services.common import Service, content_of
from mgpu_http.demo.services.sound import SoundError, heard, spoken

RESIDENT_MIB = 2_345
LOAD_PEAK_MIB = 2_800
LOAD_S = 0.8
LOAD_FAILURE_RATE = 0.04
WORK_S = (0.15, 0.5)
WORK_FAILURE_RATE = 0.02
MAX_SOUNDS = 100  # kept for `GET /audio/{name}`


@define(eq=False)
class MVoice(Service):
    finishes_requests = True

    _loaded: bool = field(default=False, init=False)
    # Work, loads and unloads take turns, in the order in which they came.
    _turn: asyncio.Lock = field(factory=asyncio.Lock, init=False)
    _sounds: dict[str, bytes] = field(factory=dict, init=False)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self._health),
            web.post("/tts", self._tts),
            web.post("/stt", self._stt),
            web.get("/audio/{name}", self._audio),
            web.post("/load", self._load),
            web.post("/unload", self._unload),
        ]

    def models_mib(self) -> Iterable[int]:
        return [RESIDENT_MIB] if self._loaded else []

    async def begin(self) -> None:
        self.tasks.create_task(self._bring_in())

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "loaded": self._loaded})

    async def _tts(self, request: web.Request) -> web.Response:
        try:
            text = json.loads(await request.read())["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str) or not text:
            return problem(400, 'the body must be JSON: {"text": "what to say"}')
        return await self._work(lambda: self._sound(spoken(text)))

    async def _stt(self, request: web.Request) -> web.Response:
        try:
            text = heard(await content_of(request))
        except SoundError as error:
            return problem(400, f"the body, or its field `file`, must be a WAV file: {error}")
        return await self._work(lambda: web.json_response({"text": text}))

    async def _audio(self, request: web.Request) -> web.Response:
        try:
            sound = self._sounds[request.match_info["name"]]
        except KeyError:
            return problem(404, "there is no such sound, or no more")
        return web.Response(body=sound, content_type="audio/wav")

    async def _load(self, _: web.Request) -> web.Response:
        if await self._bring_in():
            return web.json_response({"status": "loaded"})
        return problem(500, "the model could not be read")

    async def _unload(self, _: web.Request) -> web.Response:
        self.tasks.create_task(self._let_go())
        return web.json_response({"status": "unloading"})

    async def _work(self, result: Callable[[], web.Response]) -> web.Response:
        async with self._turn:
            if not self._loaded:
                return problem(503, "the model is not loaded")
            await asyncio.sleep(self.chance.uniform(*WORK_S))
            if self.happens(WORK_FAILURE_RATE):
                return problem(500, "the model gave nothing that is of use")
            return result()

    def _sound(self, sound: bytes) -> web.Response:
        name = f"{uuid.uuid4()}.wav"
        self._sounds[name] = sound
        if len(self._sounds) > MAX_SOUNDS:
            del self._sounds[next(iter(self._sounds))]
        headers = {"X-Audio": f"/audio/{name}"}
        return web.Response(body=sound, content_type="audio/wav", headers=headers)

    async def _bring_in(self) -> bool:
        async with self._turn:
            if self._loaded:
                return True
            await self.take(LOAD_PEAK_MIB, LOAD_S)
            if self.happens(LOAD_FAILURE_RATE):
                await self.give_back(LOAD_PEAK_MIB)
                await self.card.say("load_failed", LOAD_PEAK_MIB)
                return False
            await self.give_back(LOAD_PEAK_MIB - RESIDENT_MIB)
            self._loaded = True
            await self.card.say("load", RESIDENT_MIB)
            return True

    async def _let_go(self) -> None:
        async with self._turn:
            if self._loaded:
                self._loaded = False
                await self.give_back(RESIDENT_MIB)
                await self.card.say("unload", RESIDENT_MIB)


def problem(status: int, error: str) -> web.Response:
    return web.json_response({"error": error}, status=status)

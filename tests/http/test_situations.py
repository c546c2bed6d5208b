"""The situations of config/examples/, lived through from one end to the other.

Each file is taken as it is, with stand-ins for its services that hold what it says they need (see
`Situation`). What has to go, and what has not, follows from its numbers, which each story reckons.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.support.comfyui import ComfyUI
from tests.support.engine import Engine
from tests.support.facade import Address, Answer, Facade
from tests.support.gpu_host import counts, ready
from tests.support.situations import Situation, drawing, situation
from tests.support.stand_ins.kokoro import Kokoro
from tests.support.stand_ins.mvoice import Mvoice
from tests.support.stand_ins.ollama import Ollama
from tests.support.upstream import eventually

FORM = "Content-Type: multipart/form-data; boundary=x"
SOUND = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF1234\r\n'
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--x--\r\n'
)
T = TypeVar("T")
OPENAI, TRANSCRIBE = "/v1/chat/completions", "/v1/audio/transcriptions"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    engine = Engine(folder)
    yield engine
    engine.close()


async def ask(broker: Address, path: str, by: str, **body: Any) -> Answer:
    """Ask for work, and see who did it."""
    answer = await broker.ask("POST", path, body=json.dumps(body).encode())
    assert (answer.status, answer.complete) == (200, True), answer.body
    assert answer.headers["x-mgpu-consumer"] == by
    return answer


async def chat(broker: Address, path: str, model: str, by: str) -> Any:
    said = [{"role": "user", "content": "Hello."}]
    return (await ask(broker, path, by, model=model, messages=said, stream=False)).json()


async def speak(broker: Address, by: str) -> bytes:
    return (await ask(broker, "/v1/tts", by, text="Hello.", input="Hello.")).body


async def hear(broker: Address, path: str, by: str) -> str:
    answer = await broker.ask("POST", path, FORM, body=SOUND)
    assert (answer.status, answer.headers["x-mgpu-consumer"]) == (200, by), answer.body
    text: str = answer.json()["text"]
    return text.strip()


def waits(consumer: str, why: str) -> Any:
    """Say of a status whether somebody waits for that consumer, and why."""
    return lambda status: any(
        (row["consumer"], (row["why"] or {}).get("type")) == (consumer, why)
        for row in status["requests"]
    )


def loaded(status: Any) -> set[str]:
    return {name for name, row in status["consumers"].items() if row["loaded"]}


async def costs(
    at: Situation, broker: Facade, work: Awaitable[T], evicted: set[str], loads: int = 0
) -> T:
    """Give what comes of the work; just these had to go for it, and so many loads were needed."""
    before = await at.seen(broker)
    answer = await work
    after = await at.seen(broker)
    assert loaded(before) - loaded(after) == evicted
    changes = [now - then for now, then in zip(counts(after), counts(before), strict=True)]
    assert changes == [len(evicted), loads]
    return answer


# ------------------------------------------------------------------- four services, one card


async def test_four_services_on_one_card(tmp_path: Path) -> None:
    """16,384 MiB: the desktop 768, the voice 2,345 (2,800 while it loads), dictation 2,100, chat
    6,000, a picture 13,000.
    """
    async with situation(tmp_path, "four-services-one-card") as at:
        voice = await at.add(Mvoice(at.card(), 2_345, load_mib=2_800, loaded=True))
        ollama = await at.add(Ollama(at.card(), {"qwen3:8b": 6_000}))
        at.starts("whisper-server", mib=2_100)
        pictures = await at.draws()
        async with at.broker() as broker:
            await broker.until("probed", lambda s: s["consumers"]["mvoice"]["healthy"])
            await all_but_pictures(at, broker)
            await a_picture_while_ollama_holds_a_model(at, broker, pictures, ollama)
            await a_chat_beside_a_picture(at, broker, pictures, ollama)
            await an_evening_without_requests(at, broker, ollama)
        assert (voice.broken, ollama.broken) == (0, 0)


async def all_but_pictures(at: Situation, broker: Facade) -> None:
    """They fit beside each other."""
    assert await costs(at, broker, speak(broker, "mvoice"), set()) == b"RIFF"
    sound = await broker.ask("GET", "/audio/1.wav")
    assert (sound.status, sound.body) == (200, b"sound of 1.wav")
    assert await costs(at, broker, hear(broker, "/v1/stt", "mvoice"), set()) == "Hello."
    heard = hear(broker, TRANSCRIBE, "whisper-server")
    assert await costs(at, broker, heard, set(), loads=1) == "Hello."
    said = await costs(at, broker, chat(broker, "/v1/llm", "qwen3:8b", "ollama"), set())
    assert said["message"]["content"] == "Hello."
    assert at.card().held_mib == {
        "the desktop": 768,
        "mvoice": 2_345,
        "whisper-server": 2_100,
        "ollama/qwen3:8b": 6_000,
    }


async def a_picture_while_ollama_holds_a_model(
    at: Situation, broker: Facade, pictures: ComfyUI, ollama: Ollama
) -> None:
    """Nobody is unloaded for it at first, as that would be too little; but ComfyUI is told to let
    go of what it might hold, and once more as nothing came of it.

    Without Ollama's model 11,171 are free, where 13,256 are needed: the voice has been idle for
    longer than dictation, and is enough. Who wants to speak meanwhile does so when it is drawn.
    """

    async def with_speech() -> bytes:
        async with drawing(broker, pictures):
            spoken = asyncio.create_task(speak(broker, "mvoice"))
            status = await broker.until("speech waits", waits("mvoice", "victim_at_work"))
            assert loaded(status) == {"comfyui", "ollama", "whisper-server"}
        return await spoken

    drawn = asyncio.create_task(with_speech())
    status = await broker.until("in vain", waits("comfyui", "memory"))
    assert (counts(status), pictures.times("POST /free")) == ((1, 1), 2)
    await eventually(lambda: pictures.freed == 2)
    assert loaded(status) == {"mvoice", "ollama", "whisper-server"}

    ollama.keep_alive_ends()
    assert await drawn == b"RIFF"
    status = await at.seen(broker)
    assert (counts(status), loaded(status)) == ((3, 2), {"mvoice", "ollama", "whisper-server"})
    told = [call for call in at.calls if call.endswith("load")]
    assert told == ["mvoice POST /unload", "mvoice POST /load"]


async def a_chat_beside_a_picture(
    at: Situation, broker: Facade, pictures: ComfyUI, ollama: Ollama
) -> None:
    """Nobody goes for Ollama, so its model is put on the processor."""

    async def with_chat() -> Any:
        async with drawing(broker, pictures):
            asked = asyncio.create_task(chat(broker, OPENAI, "qwen3:8b", "ollama"))
            await broker.until("chat waits", waits("ollama", "slot"))
        return await asked

    assert await hear(broker, TRANSCRIBE, "whisper-server") == "Hello."
    said = await costs(at, broker, with_chat(), {"mvoice"})
    assert said["choices"][0]["message"]["content"] == "Hello."
    assert ollama.sizes_mib == {"qwen3:8b": 0}


async def an_evening_without_requests(at: Situation, broker: Facade, ollama: Ollama) -> None:
    """The picture's memory comes free by itself, and then the voice is back."""
    ollama.keep_alive_ends()
    await at.reconfigure(broker, "comfyui", idle_unload_s=0.1)
    await broker.until("out", lambda s: s["consumers"]["comfyui"]["residency"] == "absent")
    await at.seen(broker)
    await at.reconfigure(broker, restore_after_s=0.1)
    status = await broker.until("back", lambda s: "mvoice" in loaded(s))
    assert counts(status) == (5, 3)
    assert await costs(at, broker, speak(broker, "mvoice"), set()) == b"RIFF"
    await costs(at, broker, chat(broker, OPENAI, "qwen3:8b", "ollama"), set())
    assert ollama.sizes_mib["qwen3:8b"] > 0


# -------------------------------------------------------------------- one card, many models


async def test_many_models_on_one_card(tmp_path: Path) -> None:
    """24,576 MiB, less 512 for the desktop: as many models as fit, and of the others those have to
    go that were used least lately, as many as it takes.
    """
    sizes_mib = {"qwen3:8b": 6_800, "gemma3:12b": 9_900, "phi4-mini": 3_400}
    async with situation(tmp_path, "one-card-many-models") as at:
        ollama = await at.add(Ollama(at.card(), sizes_mib))
        kokoro = await at.add(Kokoro(at.card(), 1_200))
        await at.routes(**{"coder-7b": 5_600, "writer-14b": 10_400, "embed-300m": 700})
        pictures = await at.draws()
        async with at.broker() as broker:
            await ready(broker)
            await all_are_listed(broker)
            await models_make_room_for_each_other(at, broker)
            await one_that_nobody_named(at, broker)
            await a_picture_and_what_fits_beside(at, broker, pictures, ollama)
            await after_the_picture(at, broker)
        assert (ollama.broken, kokoro.broken) == (0, 0)
        unloaded = [call for call in at.router_calls() if "/models/unload" in call]
        assert [call.split()[-1] for call in unloaded] == ["coder-7b", "writer-14b"]


async def all_are_listed(broker: Facade) -> None:
    listed = (await broker.ask("GET", "/v1/models")).json()["data"]
    assert {row["id"]: row["owned_by"] for row in listed} == {
        "chat": "ollama",
        "coder-7b": "router",
        "embed-300m": "router",
        "gemma3:12b": "ollama",
        "kokoro": "kokoro",
        "phi4-mini": "ollama",
        "qwen3:8b": "ollama",
        "tts-1": "kokoro",
        "writer-14b": "router",
    }


async def embed(broker: Facade) -> None:
    asked = {"model": "embed-300m", "input": "Hello."}
    answer = await ask(broker, "/v1/embeddings", "router/embed-300m", **asked)
    assert (answer.json()["target"], json.loads(answer.json()["body"])) == ("/v1/embeddings", asked)


async def models_make_room_for_each_other(at: Situation, broker: Facade) -> None:
    # 15,324 with the desktop: all of these fit.
    said = await costs(at, broker, chat(broker, OPENAI, "chat", "ollama/qwen3:8b"), set(), loads=1)
    assert (said["model"], said["choices"][0]["message"]["content"]) == ("qwen3:8b", "Hello.")
    await costs(at, broker, embed(broker), set())
    await costs(at, broker, chat(broker, OPENAI, "coder-7b", "router/coder-7b"), set())
    text = {"model": "tts-1", "input": "Hello.", "voice": "af_heart"}
    speech = await costs(at, broker, ask(broker, "/v1/audio/speech", "kokoro", **text), set())
    assert speech.body == b"ID3"
    # 9,764 are free, 10,156 needed: qwen3 was used first, and is enough.
    asked = chat(broker, "/v1/llm", "gemma3:12b", "ollama/gemma3:12b")
    await costs(at, broker, asked, {"ollama/qwen3:8b"}, loads=1)
    # 6,664 are free, 7,056 needed: the embedder is pinned, so it is the coder.
    asked = chat(broker, OPENAI, "qwen3:8b", "ollama/qwen3:8b")
    await costs(at, broker, asked, {"router/coder-7b"}, loads=1)
    # 5,464 are free, 10,656 needed: the voice is older than gemma3, but no help beside it.
    asked = chat(broker, OPENAI, "writer-14b", "router/writer-14b")
    await costs(at, broker, asked, {"ollama/gemma3:12b"})


async def one_that_nobody_named(at: Situation, broker: Facade) -> None:
    """It takes 3,400 of 4,964, and is measured."""
    asked = chat(broker, "/v1/llm", "phi4-mini", "ollama/phi4-mini")
    await costs(at, broker, asked, set(), loads=1)
    status = await at.seen(broker)
    assert status["consumers"]["ollama/phi4-mini"]["gpu_resident_mib"] == 3_400


async def a_picture_and_what_fits_beside(
    at: Situation, broker: Facade, pictures: ComfyUI, ollama: Ollama
) -> None:
    """1,564 are free, 13,256 needed: qwen3 and the writer have to go. Beside the picture there is
    an answer in the second slot, and voice without a slot.
    """

    async def with_others() -> None:
        async with drawing(broker, pictures):
            ollama.go.clear()
            asked = asyncio.create_task(chat(broker, OPENAI, "phi4-mini", "ollama/phi4-mini"))
            await broker.until("both slots taken", lambda s: s["scheduler"]["in_flight"] == 2)
            assert await speak(broker, "kokoro") == b"ID3"
            embedded = asyncio.create_task(embed(broker))
            await broker.until("a third waits", waits("router/embed-300m", "slot"))
            ollama.go.set()
            await asyncio.gather(asked, embedded)

    await costs(at, broker, with_others(), {"ollama/qwen3:8b", "router/writer-14b"})


async def after_the_picture(at: Situation, broker: Facade) -> None:
    # 5,764 are free, 10,156 needed: both that were used before the picture was done.
    asked = chat(broker, OPENAI, "gemma3:12b", "ollama/gemma3:12b")
    await costs(at, broker, asked, {"kokoro", "ollama/phi4-mini"}, loads=1)
    # 464 are free, and by now it is known that 3,656 are needed.
    asked = chat(broker, OPENAI, "phi4-mini", "ollama/phi4-mini")
    await costs(at, broker, asked, {"comfyui"}, loads=1)
    assert await costs(at, broker, speak(broker, "kokoro"), set()) == b"ID3"
    assert at.card().held_mib == {
        "the desktop": 512,
        "router/embed-300m": 700,
        "ollama/gemma3:12b": 9_900,
        "comfyui": 500,
        "ollama/phi4-mini": 3_400,
        "kokoro": 1_200,
    }


# ----------------------------------------------------------------------------------- two GPUs


async def test_two_gpus(tmp_path: Path, engine: Engine) -> None:
    """24,576 MiB each: the model takes 19,661 of both and keeps 2,048 asleep; a picture 13,000 of
    the first, dictation 2,100 of the second.
    """
    async with situation(tmp_path, "two-gpus") as at:
        vllm = at.starts("vllm", mib=19_661, residue_mib=2_048, gpus=(0, 1))
        container, _ = at.command("whisper-server", mib=2_100, gpus=(1,))
        engine.has("whisper-server", "created", tuple(container))
        pictures = await at.draws()
        async with at.broker() as broker:
            # Dictation is there before anybody asks: it is the preload set.
            await broker.until("preloaded", lambda s: loaded(s) == {"whisper-server"})
            assert await hear(broker, "/v1/stt", "whisper-server") == "Hello."
            said = await costs(at, broker, chat(broker, OPENAI, "llm", "vllm"), set(), loads=1)
            assert said["choices"][0]["message"]["content"] == "Hello."
            assert both_held_mib(at) == (
                {"the desktop": 512, "vllm": 19_661},
                {"the desktop": 0, "vllm": 19_661, "whisper-server": 2_100},
            )
            await a_picture_between_chats(at, broker, pictures, vllm)
            await costs(at, broker, picture(broker, pictures), {"vllm"})
        assert engine.calls == [["docker", "start", "whisper-server"]]


def both_held_mib(at: Situation) -> tuple[dict[str, int], dict[str, int]]:
    return at.card(0).held_mib, at.card(1).held_mib


async def picture(broker: Facade, pictures: ComfyUI) -> None:
    async with drawing(broker, pictures):
        pass


async def a_picture_between_chats(
    at: Situation, broker: Facade, pictures: ComfyUI, vllm: Address
) -> None:
    """The model works on both cards and has to be waited for; then it sleeps on both while one of
    them draws, and is woken on both. Dictation works beside either.
    """

    async def with_dictation_and_chat() -> None:
        async with drawing(broker, pictures):
            assert both_held_mib(at) == (
                {"the desktop": 512, "vllm": 2_048, "comfyui": 13_000},
                {"the desktop": 0, "vllm": 2_048, "whisper-server": 2_100},
            )
            assert await hear(broker, TRANSCRIBE, "whisper-server") == "Hello."
            asked = asyncio.create_task(chat(broker, "/v1/llm", "llm", "vllm"))
            await broker.until("chat waits", waits("vllm", "victim_at_work"))
            assert at.card(1).held_mib["vllm"] == 2_048  # there is room on it, but not on both
        await asked

    await vllm.ask("POST", "/-/hold")
    asked = [asyncio.create_task(chat(broker, OPENAI, "llm", "vllm")) for _ in range(3)]
    await broker.until("at work", lambda s: s["consumers"]["vllm"]["active"] == 3)
    assert await hear(broker, TRANSCRIBE, "whisper-server") == "Hello."
    drawn = asyncio.create_task(with_dictation_and_chat())
    status = await broker.until("picture waits", waits("comfyui", "victim_at_work"))
    assert counts(status) == (0, 2)
    await vllm.ask("POST", "/-/go")
    await asyncio.gather(*asked, drawn)
    status = await at.seen(broker)
    assert (counts(status), loaded(status)) == ((2, 3), {"vllm", "whisper-server"})
    assert at.card(0).held_mib == {"the desktop": 512, "vllm": 19_661, "comfyui": 500}
    assert at.card(1).held_mib["vllm"] == 19_661


# ----------------------------------------------------------------------------------- CPU only


async def test_speech_without_a_gpu(tmp_path: Path) -> None:
    async with situation(tmp_path, "cpu-only-speech") as at:
        # On a card that has nothing they would find too little, if they took anything.
        services = {name: at.starts(name, mib=0) for name in ("piper", "faster-whisper-server")}
        async with at.broker() as broker:
            await costs(at, broker, speech_and_dictation(broker), set(), loads=2)
            heard = await hear(broker, TRANSCRIBE, "faster-whisper-server")
            assert heard == "Hello."
            assert (await broker.status())["gpu"][0]["error"] == "no_gpu"

            # Both at work at once: there is no slot that one could wait for.
            for service in services.values():
                assert (await service.ask("POST", "/-/hold")).status == 200
            working = asyncio.create_task(speech_and_dictation(broker))
            await broker.until("at work", lambda s: s["scheduler"]["in_flight"] == 2)
            for service in services.values():
                await service.ask("POST", "/-/go")
            await working

            await nobody_asks_for_long(at, broker, services)
            await costs(at, broker, speech_and_dictation(broker), set(), loads=2)


async def speech_and_dictation(broker: Facade) -> None:
    said, heard = await asyncio.gather(
        speak(broker, "piper"), hear(broker, "/v1/stt", "faster-whisper-server")
    )
    assert (said[:4], heard) == (b"RIFF", "Hello.")


async def nobody_asks_for_long(
    at: Situation, broker: Facade, services: Mapping[str, Address]
) -> None:
    """Both are stopped; afterwards they may be idle for as long as the file says."""
    long_s = {name: at.consumers[name]["idle_unload_s"] for name in services}
    for name in services:
        await at.reconfigure(broker, name, idle_unload_s=0.1)
    rows = await broker.until(
        "stopped",
        lambda s: all(row["residency"] == "absent" for row in s["consumers"].values()),
    )
    assert counts(rows) == (2, 2)
    for name, service in services.items():
        with pytest.raises(ConnectionRefusedError):
            await service.ask("GET", "/")
        await at.reconfigure(broker, name, idle_unload_s=long_s[name])

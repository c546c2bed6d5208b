"""The situations of config/examples/, lived through from one end to the other.

Each file is taken as it is, with stand-ins for its services that hold what it says they need (see
`Situation`). What has to go, and what has not, follows from its numbers, which each story reckons.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

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


def has_free(mib: int) -> Any:
    """Say of a status whether the first card was seen with that much."""
    return lambda status: status["gpu"][0]["free_mib"] == mib


def loaded(status: Any) -> set[str]:
    return {name for name, row in status["consumers"].items() if row["loaded"]}


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
            # By day: all of them beside each other but the picture.
            assert await speak(broker, "mvoice") == b"RIFF"
            sound = await broker.ask("GET", "/audio/1.wav")
            assert (sound.status, sound.body) == (200, b"sound of 1.wav")
            assert await hear(broker, "/v1/stt", "mvoice") == "Hello."
            assert await hear(broker, TRANSCRIBE, "whisper-server") == "Hello."
            said = await chat(broker, "/v1/llm", "qwen3:8b", "ollama")
            assert said["message"]["content"] == "Hello."
            assert at.card().held_mib == {
                "the desktop": 768,
                "mvoice": 2_345,
                "whisper-server": 2_100,
                "ollama/qwen3:8b": 6_000,
            }
            status = await broker.status()
            assert counts(status) == (0, 1)  # dictation

            # A picture: nobody is unloaded for it while Ollama keeps its model, as that would be
            # too little. Only ComfyUI itself is told to let go of what it might hold, and once more
            # as nothing came of it.
            await broker.until("seen", has_free(5_171))
            drawn = asyncio.create_task(picture_and_speech(broker, pictures))
            status = await broker.until("in vain", waits("comfyui", "memory"))
            assert (counts(status), pictures.times("POST /free")) == ((1, 1), 2)
            await eventually(lambda: pictures.freed == 2)
            assert {"mvoice", "whisper-server"} < loaded(status)

            # Then 11,171 are free and 13,256 needed. The voice waits for longest and is enough.
            # What wants to speak meanwhile does so as soon as the picture is there.
            ollama.keep_alive_ends()
            assert await drawn == b"RIFF"
            assert counts(await broker.status()) == (3, 2)
            assert [call for call in at.calls if call.endswith("load")] == [
                "mvoice POST /unload",
                "mvoice POST /load",
            ]
            assert at.card().held_mib["comfyui"] == 500

            # Another picture, and the voice is idle for longest again. A chat waits for it:
            # nobody goes for Ollama, so its model is put on the processor.
            assert await hear(broker, TRANSCRIBE, "whisper-server") == "Hello."
            await broker.until("seen", has_free(10_671))
            async with drawing(broker, pictures):
                asked = asyncio.create_task(chat(broker, OPENAI, "qwen3:8b", "ollama"))
                await broker.until("chat waits", waits("ollama", "slot"))
            assert (await asked)["choices"][0]["message"]["content"] == "Hello."
            assert ollama.sizes_mib == {"qwen3:8b": 0}
            assert counts(await broker.status()) == (4, 2)

            # In the evening nobody asks for anything: the picture's memory comes free by itself,
            # and then the voice is back.
            ollama.keep_alive_ends()
            await at.reconfigure(broker, "comfyui", idle_unload_s=0.1)
            await broker.until("out", lambda s: loaded(s) == {"ollama", "whisper-server"})
            await broker.until("seen", has_free(13_016))
            await at.reconfigure(broker, restore_after_s=0.1)
            status = await broker.until("back", lambda s: "mvoice" in loaded(s))
            assert counts(status) == (5, 3)
            assert await speak(broker, "mvoice") == b"RIFF"
            await chat(broker, OPENAI, "qwen3:8b", "ollama")
            assert ollama.sizes_mib["qwen3:8b"] > 0
        assert (voice.broken, ollama.broken) == (0, 0)
        assert pictures.freed == 4


async def picture_and_speech(broker: Facade, pictures: ComfyUI) -> bytes:
    """Ask for a picture, and for speech while it is drawn."""
    async with drawing(broker, pictures):
        spoken = asyncio.create_task(speak(broker, "mvoice"))
        status = await broker.until("speech waits", waits("mvoice", "victim_at_work"))
        assert not status["consumers"]["mvoice"]["loaded"]
    return await spoken


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
            assert await models(broker) == {
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

            async def brings_in(evicted: set[str], work: Awaitable[Any]) -> Any:
                """Give what the work gives; just these had to go for it."""
                before = await broker.status()
                answer = await work
                after = await broker.until("over", lambda s: not s["requests"])
                assert loaded(before) - loaded(after) == evicted
                assert counts(after)[0] - counts(before)[0] == len(evicted)
                return answer

            # 15,312 MiB, the desktop's 512 among them: all fit.
            said = await brings_in(set(), chat(broker, OPENAI, "chat", "ollama/qwen3:8b"))
            assert said["choices"][0]["message"]["content"] == "Hello."
            assert said["model"] == "qwen3:8b"
            await brings_in(set(), embed(broker))
            await brings_in(set(), chat(broker, OPENAI, "coder-7b", "router/coder-7b"))
            body = {"input": "Hello.", "voice": "af_heart", "model": "tts-1"}
            speech = await brings_in(set(), ask(broker, "/v1/audio/speech", "kokoro", **body))
            assert speech.body == b"ID3"

            # 9,764 free, 10,156 needed: 392 are missing, and qwen3 was used first.
            await brings_in(
                {"ollama/qwen3:8b"}, chat(broker, "/v1/llm", "gemma3:12b", "ollama/gemma3:12b")
            )
            # 6,664 free, 7,056 needed. Pinned is the embedder, so it is the coder.
            await brings_in(
                {"router/coder-7b"}, chat(broker, OPENAI, "qwen3:8b", "ollama/qwen3:8b")
            )
            # 5,464 free, 10,656 needed: the voice is older than gemma3, but no help to it.
            await brings_in(
                {"ollama/gemma3:12b"}, chat(broker, OPENAI, "writer-14b", "router/writer-14b")
            )
            # One that nobody named, 3,400 in 4,964 free.
            await brings_in(set(), chat(broker, "/v1/llm", "phi4-mini", "ollama/phi4-mini"))
            await broker.until("measured", measures("ollama/phi4-mini", 3_400))
            assert sum(at.card().held_mib.values()) == 23_012

            # 1,564 free, 13,256 needed: qwen3 and the writer. Beside the picture there is voice
            # without a slot, and an answer in the second one.
            await brings_in(
                {"ollama/qwen3:8b", "router/writer-14b"},
                picture_with_others(broker, pictures, ollama),
            )
            # 5,764 free, 10,156 needed: all that is older than the picture and not pinned.
            await brings_in(
                {"kokoro", "ollama/phi4-mini"},
                chat(broker, OPENAI, "gemma3:12b", "ollama/gemma3:12b"),
            )
            # 464 free, and by now it is known that 3,656 are needed.
            await brings_in({"comfyui"}, chat(broker, OPENAI, "phi4-mini", "ollama/phi4-mini"))
            assert await brings_in(set(), speak(broker, "kokoro")) == b"ID3"
            assert at.card().held_mib == {
                "the desktop": 512,
                "router/embed-300m": 700,
                "ollama/gemma3:12b": 9_900,
                "comfyui": 500,
                "ollama/phi4-mini": 3_400,
                "kokoro": 1_200,
            }
        assert (ollama.broken, kokoro.broken) == (0, 0)
        assert unloads(at.router_calls()) == ["coder-7b", "writer-14b"]
        assert [call for call in at.calls if call.endswith("unload")] == ["kokoro POST /dev/unload"]


async def models(broker: Address) -> dict[str, str]:
    """Give all that can be asked for, and whose it is."""
    listed = (await broker.ask("GET", "/v1/models")).json()["data"]
    return {row["id"]: row["owned_by"] for row in listed}


async def embed(broker: Address) -> None:
    answer = await ask(
        broker, "/v1/embeddings", "router/embed-300m", model="embed-300m", input="Hello."
    )
    assert answer.json()["target"] == "/v1/embeddings"


def measures(consumer: str, mib: int) -> Any:
    """Say of a status whether a consumer was seen to hold that much."""
    return lambda status: status["consumers"][consumer]["gpu_resident_mib"] == mib


async def picture_with_others(broker: Facade, pictures: ComfyUI, ollama: Ollama) -> None:
    """Ask for a picture, and while it is drawn for what fits beside it."""
    async with drawing(broker, pictures):
        ollama.go.clear()
        asked = asyncio.create_task(chat(broker, OPENAI, "phi4-mini", "ollama/phi4-mini"))
        await broker.until("both slots taken", lambda s: s["scheduler"]["in_flight"] == 2)
        assert await speak(broker, "kokoro") == b"ID3"
        embedded = asyncio.create_task(embed(broker))
        await broker.until("a third waits", waits("router/embed-300m", "slot"))
        ollama.go.set()
        await asyncio.gather(asked, embedded)


def unloads(calls: list[str]) -> list[str]:
    return [call.rpartition(" ")[2] for call in calls if "/models/unload" in call]


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
        first, second = at.card(0), at.card(1)
        async with at.broker() as broker:
            # Dictation is there before anybody asks: it is the preload set.
            await broker.until("preloaded", lambda s: loaded(s) == {"whisper-server"})
            assert await hear(broker, "/v1/stt", "whisper-server") == "Hello."

            # The model starts beside it, and it works beside the model.
            said = await chat(broker, OPENAI, "llm", "vllm")
            assert said["choices"][0]["message"]["content"] == "Hello."
            assert first.held_mib == {"the desktop": 512, "vllm": 19_661}
            assert second.held_mib == {"the desktop": 0, "whisper-server": 2_100, "vllm": 19_661}
            await vllm.ask("POST", "/-/hold")
            asked = [asyncio.create_task(chat(broker, OPENAI, "llm", "vllm")) for _ in range(3)]
            await broker.until("at work", lambda s: s["consumers"]["vllm"]["active"] == 3)
            assert await hear(broker, TRANSCRIBE, "whisper-server") == "Hello."
            picture = asyncio.create_task(picture_and_chat(broker, pictures, at))
            status = await broker.until("picture waits", waits("comfyui", "victim_at_work"))
            assert counts(status) == (0, 2)
            await vllm.ask("POST", "/-/go")
            await asyncio.gather(*asked)

            # It went to sleep on both cards, and woke up on both.
            await picture
            status = await broker.status()
            assert (counts(status), loaded(status)) == ((2, 3), {"vllm", "whisper-server"})
            assert first.held_mib == {"the desktop": 512, "vllm": 19_661, "comfyui": 500}
            assert second.held_mib["vllm"] == 19_661

            # And back.
            async with drawing(broker, pictures):
                pass
            status = await broker.status()
            assert (counts(status), loaded(status)) == ((3, 3), {"comfyui", "whisper-server"})
        assert engine.calls == [["docker", "start", "whisper-server"]]
        assert pictures.freed == 1


async def picture_and_chat(broker: Facade, pictures: ComfyUI, at: Situation) -> None:
    """Ask for a picture, and for dictation and a chat while it is drawn."""
    async with drawing(broker, pictures):
        assert at.card(0).held_mib == {"the desktop": 512, "vllm": 2_048, "comfyui": 13_000}
        assert await hear(broker, TRANSCRIBE, "whisper-server") == "Hello."
        asked = asyncio.create_task(chat(broker, "/v1/llm", "llm", "vllm"))
        await broker.until("chat waits", waits("vllm", "victim_at_work"))
        # One of its cards has room, but it takes both or none.
        assert at.card(1).held_mib["vllm"] == 2_048
    await asked


# ----------------------------------------------------------------------------------- CPU only


async def test_speech_without_a_gpu(tmp_path: Path) -> None:
    async with situation(tmp_path, "cpu-only-speech") as at:
        # On a card that has nothing they would find too little, if they took anything.
        piper, whisper = (at.starts(name, mib=0) for name in ("piper", "faster-whisper-server"))
        async with at.broker() as broker:

            async def both() -> None:
                said, heard = await asyncio.gather(
                    speak(broker, "piper"), hear(broker, "/v1/stt", "faster-whisper-server")
                )
                assert (said[:4], heard) == (b"RIFF", "Hello.")

            assert loaded(await broker.status()) == set()
            await both()
            assert await hear(broker, TRANSCRIBE, "faster-whisper-server") == "Hello."
            status = await broker.status()
            assert (counts(status), status["gpu"][0]["error"]) == ((0, 2), "no_gpu")

            # Both at work at once: there is no slot that one could wait for.
            for service in (piper, whisper):
                assert (await service.ask("POST", "/-/hold")).status == 200
            working = asyncio.create_task(both())
            await broker.until("at work", lambda s: s["scheduler"]["in_flight"] == 2)
            for service in (piper, whisper):
                await service.ask("POST", "/-/go")
            await working

            # Nobody asks for long: both are stopped, and started again for who comes then.
            for name in ("piper", "faster-whisper-server"):
                await at.reconfigure(broker, name, idle_unload_s=0.1)
            await broker.until(
                "stopped",
                lambda s: all(row["residency"] == "absent" for row in s["consumers"].values()),
            )
            for service in (piper, whisper):
                with pytest.raises(ConnectionRefusedError):
                    await service.ask("GET", "/")
            for name in ("piper", "faster-whisper-server"):
                await at.reconfigure(broker, name, idle_unload_s=1_800)
            await both()
            assert counts(await broker.status()) == (2, 4)

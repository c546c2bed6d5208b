"""What a library's call returns or raises is the same through the broker as without it."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.clients.behind import WAYS, Behind, behind
from tests.clients.calls import CALLS, CHAT, MODEL, outcome
from tests.support.apis import OLLAMA_MODEL, heard, spoken

EACH = [(library, name) for library, calls in CALLS.items() for name in calls]
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning"),  # translations, in OpenAI's
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def here(tmp_path_factory: Any) -> AsyncIterator[Behind]:
    async with behind(tmp_path_factory.mktemp("broker"), max_concurrency=2) as it:
        yield it


@pytest.mark.parametrize("awaited", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("library", "name"), EACH)
async def test_the_same(here: Behind, library: str, name: str, awaited: bool) -> None:
    told, seen = {}, {}
    for way in WAYS[library]:
        here.service.forget()
        client = here.client(library, way, awaited=awaited)
        told[way] = await outcome(CALLS[library][name], client)
        seen[way] = here.service.seen
    raised = isinstance(told["direct"], dict) and "raised" in told["direct"]
    assert raised is name.startswith("of the service")
    for way in WAYS[library]:
        assert told[way] == told["direct"], way
        assert seen[way] == seen["direct"], way


@pytest.mark.parametrize("awaited", [False, True], ids=["sync", "async"])
async def test_the_models_of_all_are_what_the_libraries_list(here: Behind, awaited: bool) -> None:
    names = {MODEL, OLLAMA_MODEL}
    for library in ("openai", "anthropic"):
        client = here.client(library, "model", awaited=awaited)
        listed = await outcome(lambda c: c.models.list(), client)
        assert {row["id"] for row in listed["data"]} == names
        for row in listed["data"]:
            one = await outcome(lambda c, id_=row["id"]: c.models.retrieve(id_), client)
            assert one == row
        told = await outcome(lambda c: c.models.retrieve("gpt-9"), client)
        assert told["raised"].__name__ == "NotFoundError"
        assert "not_found" in str(told["body"])


@pytest.mark.parametrize("awaited", [False, True], ids=["sync", "async"])
async def test_the_models_of_one_are_its_own(here: Behind, awaited: bool) -> None:
    for call in (
        lambda c: c.models.list(),
        lambda c: c.models.retrieve(MODEL),
        lambda c: c.models.retrieve("gpt-9"),
    ):
        told = {
            way: await outcome(call, here.client("openai", way, awaited=awaited))
            for way in ("direct", "upstream", "front")
        }
        assert told["upstream"] == told["front"] == told["direct"]


async def test_a_model_by_another_name_reaches_the_service_by_its_own(tmp_path: Path) -> None:
    aliases = {"aliases": ["gpt-4o", "whisper-1"], "vram_resident_mib": 6_000}
    sound = ("long.wav", bytes(range(256)) * 10_000, "audio/wav")  # kept in a file meanwhile
    async with behind(tmp_path, models={MODEL: aliases}) as it:
        client = it.client("openai", "model")
        text = await client.audio.transcriptions.create(model="whisper-1", file=sound, prompt="p")
        assert text.text == heard(sound[1])
        await client.chat.completions.create(**{**CHAT, "model": "gpt-4o"})
        (_, form), (_, asked) = it.service.seen
        assert form["file"] == sound[1]
        assert (form["model"], form["prompt"]) == (MODEL, "p")
        assert asked == CHAT


async def test_a_sound_goes_into_a_file(here: Behind, tmp_path: Path) -> None:
    speech = here.client("openai", "model").audio.speech.with_streaming_response
    async with speech.create(model=MODEL, voice="alloy", input="a longer text") as answer:
        await answer.stream_to_file(tmp_path / "it.wav")
    assert (tmp_path / "it.wav").read_bytes() == spoken("a longer text")

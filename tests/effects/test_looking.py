"""What real services tell of themselves, in the words that a configuration would ask it with.

The answers are those of the services: recorded, or as their own documentation has them.
"""

import math
from typing import Any

import pytest
from aiohttp import web
from attrs import evolve

from mgpu_effects.calls import CallError, control_session
from mgpu_effects.gpu_processes import Holders, Holding
from mgpu_effects.looking import Told, paths_of, tell
from mgpu_effects.probes import ProbeFacts, probe
from mgpu_effects.settings import BusySettings, ConsumerSettings, Endpoint, ResidencySettings, Unit
from tests.support.dev_http import serving
from tests.support.presets import consumer

GIB = 2**30
# As the presets ask: so each is tested on what its service says.
OLLAMA = consumer("ollama").residency
SIZED = evolve(OLLAMA, mib="sum(models[?name == {model}].size_vram)")
ROUTER = consumer("llama-router").residency
SPEACHES = consumer("speaches").residency
SLEEPER = consumer("vllm").residency
KOBOLD = consumer("koboldcpp").residency
TABBY = consumer("tabbyapi").residency
LM_STUDIO = consumer("lm-studio").residency
QUEUE = consumer("comfyui").busy
PROGRESS = consumer("automatic1111").busy
FORGE = consumer("forge").busy
PERF = consumer("koboldcpp").busy


def ollama(*loaded: tuple[str, int]) -> Any:
    return {
        "models": [
            {"name": name, "model": name, "size": size, "size_vram": size, "context_length": 4096}
            for name, size in loaded
        ]
    }


def router(**status: str) -> Any:
    """As recorded of llama-server, where `args` and much else stands beside the value."""
    data = [
        {"id": name, "object": "model", "status": {"value": value, "args": []}}
        for name, value in status.items()
    ]
    return {"data": data, "object": "list"}


def lm_studio(*instances: str) -> Any:
    loaded = [{"id": name, "config": {"context_length": 4096}} for name in instances]
    other = {"type": "embedding", "key": "other", "loaded_instances": [], "size_bytes": 5}
    return {"models": [other, {"type": "llm", "key": "one", "loaded_instances": loaded}]}


SAID = [
    (OLLAMA, ollama(("one", 6 * GIB), ("two", GIB)), Told(resident=True)),
    (SIZED, ollama(("one", 6 * GIB), ("two", GIB)), Told(resident=True, vram_mib=6144)),
    (OLLAMA, ollama(("two", GIB)), Told(resident=False)),
    (OLLAMA, ollama(), Told(resident=False)),
    (ROUTER, router(one="loaded", two="unloaded"), Told(resident=True)),
    (ROUTER, router(one="unloaded", two="loaded"), Told(resident=False)),
    (ROUTER, router(one="loading"), Told(resident=False)),
    (ROUTER, router(one="sleeping"), Told(resident=False)),
    (SPEACHES, {"models": ["one"]}, Told(resident=True)),
    (SPEACHES, {"models": []}, Told(resident=False)),
    (SLEEPER, {"is_sleeping": False}, Told(resident=True)),
    (SLEEPER, {"is_sleeping": True}, Told(resident=False)),
    (KOBOLD, {"result": "koboldcpp/one"}, Told(resident=True)),
    (KOBOLD, {"result": "inactive"}, Told(resident=False)),
    (LM_STUDIO, lm_studio("one:1"), Told(resident=True)),
    (LM_STUDIO, lm_studio(), Told(resident=False)),
    (TABBY, {"id": "one", "object": "model", "owned_by": "tabbyAPI"}, Told(resident=True)),
    (QUEUE, {"exec_info": {"queue_remaining": 1}}, Told(busy=True)),
    (QUEUE, {"exec_info": {"queue_remaining": 0}}, Told(busy=False)),
    (PROGRESS, {"progress": 0.2, "state": {"job_count": 1, "job_no": 0}}, Told(busy=True)),
    (PROGRESS, {"progress": 0.0, "state": {"job_count": 0}}, Told(busy=False)),
    (FORGE, {"progress": 0.2, "state": {"job_count": 1}}, Told(busy=True)),
    (FORGE, {"progress": 0.0, "state": {"job_count": 0}}, Told(busy=False)),
    (PERF, {"last_process": 0, "queue": 0, "idle": 1}, Told(busy=False)),
    (PERF, {"last_process": 0, "queue": 0, "idle": 0}, Told(busy=True)),
]


def asking(question: ResidencySettings | BusySettings, **more: Any) -> ConsumerSettings:
    key = "busy" if isinstance(question, BusySettings) else "residency"
    return ConsumerSettings(name="a", **{"url": "http://127.0.0.1:9", key: question, **more})


def model(name: str) -> Unit:
    return Unit(server="a", model="m", upstream=name, concurrency=1)


@pytest.mark.parametrize(("question", "answer", "told"), SAID)
async def test_what_services_say_is_understood(question, answer, told):
    async def say(request: web.Request) -> web.Response:
        if request.path == "/health":
            return web.Response(text="ok")
        assert (request.method, request.path) == ("GET", question.path)
        return web.json_response(answer)

    async with control_session() as session, serving(say) as url:
        facts = await probe(session, [asking(question, url=url, unit=model("one"))], 5)
    assert facts["a"] == ProbeFacts(
        healthy=True, resident=told.resident, vram_mib=told.vram_mib, busy=told.busy
    )


# ------------------------------------------------------------------------------ what is not told

SLOW = ResidencySettings(path="/p", resident="loaded", mib="size")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({}, Told(problems=("residency: no_value",))),
        ({"loaded": None}, Told(problems=("residency: no_value",))),
        ([], Told(problems=("residency: no_value",))),
        (CallError("http_404"), Told(problems=("residency: http_404",))),
        ({"loaded": False}, Told(resident=False)),
        ({"loaded": ""}, Told(resident=False)),
        ({"loaded": True}, Told(resident=True, problems=("residency.mib: no_value",))),
        ({"loaded": 0, "size": 0}, Told(resident=True, vram_mib=0)),
        ({"loaded": True, "size": 2**20 + 1}, Told(resident=True, vram_mib=2)),
        *(
            ({"loaded": True, "size": size}, Told(resident=True, problems=(problem,)))
            for problem in ("residency.mib: no_number",)
            for size in ("5", True, -1, math.inf, math.nan, [5])
        ),
    ],
)
def test_what_cannot_be_told_is_a_problem_and_no_guess(answer, told):
    assert tell(asking(SLOW), {"/p": answer}) == told


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (503, Told(resident=False)),
        (400, Told(resident=False)),
        (401, Told(problems=("residency: http_401",))),
    ],
)
def test_a_status_that_says_that_it_is_not_loaded_is_an_answer(status, told):
    """TabbyAPI without a model answers an error, 400 or 503 by its version."""
    assert tell(asking(TABBY), {"/v1/model": CallError(f"http_{status}")}) == told


def test_a_function_that_does_not_take_the_answer_tells_nothing():
    told = tell(asking(evolve(SLOW, resident="length(@) > `0`")), {"/p": 5})
    assert told == Told(problems=("residency: no_value",))


def test_mebibytes_are_taken_as_they_are():
    told = tell(asking(evolve(SLOW, unit="mib")), {"/p": {"loaded": 1, "size": 2345.2}})
    assert told.vram_mib == 2346


def test_one_question_fails_without_the_other():
    consumer = asking(SLOW, busy=BusySettings(path="/b", when="works"))
    told = tell(consumer, {"/p": CallError("timeout"), "/b": {"works": True}})
    assert told == Told(busy=True, problems=("residency: timeout",))
    told = tell(consumer, {"/p": {"loaded": False}, "/b": {}})
    assert told == Told(resident=False, problems=("busy: no_value",))


def test_a_model_in_a_path_is_quoted_and_stays_a_value_in_an_expression():
    question = ResidencySettings(path="/ps/{model}", resident="name == {model}")
    unit = asking(question, unit=model("a/b`c:1"))
    assert paths_of(unit) == ("/ps/a%2Fb%60c%3A1",)
    told = tell(unit, {"/ps/a%2Fb%60c%3A1": {"name": "a/b`c:1"}})
    assert told == Told(resident=True)


def test_each_path_is_asked_once():
    consumer = asking(SLOW, busy=BusySettings(path="/p", when="works"))
    assert paths_of(consumer) == ("/p",)
    assert paths_of(evolve(consumer, busy=BusySettings(path="/q", when="x"))) == ("/p", "/q")
    assert paths_of(asking(SLOW, busy=None, residency="nvml")) == ()


# ------------------------------------------------------------------------- by who holds the memory


def holders(*holdings: tuple[int, str | None, int | None, str], **more: Any) -> Holders:
    """`(card, name, MiB, owner)`; who is in `more["certain"]` can't be missed."""
    rows = tuple(
        Holding(index=card, pid=at, name=name, mib=mib, owners=frozenset(filter(None, [owner])))
        for at, (card, name, mib, owner) in enumerate(holdings)
    )
    used_mib: dict[int, int] = {0: 0, 1: 0}
    for card, _name, mib, _owner in holdings:
        used_mib[card] += mib or 0
    return Holders(taken=1, holdings=rows, **{"used_mib": used_mib, **more})


BY_CARD = ConsumerSettings(
    name="a",
    url="http://127.0.0.1:9",
    residency="nvml",
    vram_resident_mib=4000,
    vram_residue_mib=500,
    health=Endpoint(path="/h"),
)
GAME = (0, "game", 6000, "")
SURE = frozenset({"a"})


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (holders((0, "py", 4100, "a")), Told(resident=True, vram_mib=4100)),
        (holders((0, "py", 4000, "a"), (0, "py", 200, "a")), Told(resident=True, vram_mib=4200)),
        (holders((0, "py", 500, "a")), Told(resident=False)),
        (holders((0, "py", 400, "a"), (1, "py", 9000, "a")), Told(resident=False)),
        (holders(), Told(resident=False)),
        (holders((0, "other", 9000, "b")), Told(resident=False)),
        (holders((0, "py", None, "a")), Told(problems=("residency: memory_not_told",))),
        (holders(error="no_gpu"), Told(problems=("residency: no_gpu",))),
        # A stranger might be what works behind the port; but not one that is too small.
        (holders(GAME), Told(problems=("residency: not_its_processes",))),
        (holders((0, "desktop", 900, "")), Told(resident=False)),
        # Of a unit no process can be missed, unless it is not to be seen from here.
        (holders(GAME, certain=SURE), Told(resident=False)),
        (
            holders((0, None, 6000, ""), certain=SURE),
            Told(problems=("residency: not_its_processes",)),
        ),
        (
            holders(used_mib={0: 6000}, certain=SURE),
            Told(problems=("residency: not_its_processes",)),
        ),
        (holders(used_mib={0: 600}, certain=SURE), Told(resident=False)),
    ],
)
def test_what_its_processes_hold_says_whether_it_is_loaded(read, told):
    assert tell(BY_CARD, {}, read) == told


def test_of_a_footprint_that_is_not_known_a_little_memory_may_be_all():
    consumer = evolve(BY_CARD, vram_resident_mib="auto", vram_residue_mib=0)
    assert tell(consumer, {}, holders((0, "desktop", 200, ""))) == Told(resident=False)
    told = tell(consumer, {}, holders((0, "python", 300, "")))
    assert told == Told(problems=("residency: not_its_processes",))
    assert tell(consumer, {}, holders((0, "python", 1, "a"))).resident is True


def test_what_it_holds_on_several_cards_counts_together():
    consumer = evolve(BY_CARD, gpu={0: 3000, 1: 3000}, vram_resident_mib=0)
    read = holders((0, "py", 3000, "a"), (1, "py", 3100, "a"))
    assert tell(consumer, {}, read) == Told(resident=True, vram_mib=6100)
    read = holders((0, "py", 500, "a"), (1, "py", 500, "a"))
    assert tell(consumer, {}, read) == Told(resident=False)

"""Presets: what is shipped is right, and gives way to what stands beside it.

What the presets ask the services is tested where such questions are: test_looking.py and
test_expressions.py put it to the services' own answers.
"""

import json
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote

import pytest
from aiohttp import web
from attrs import asdict, evolve, fields_dict

from mgpu_effects import presets
from mgpu_effects.calls import control_session
from mgpu_effects.config_file import ConfigErrors, load_settings
from mgpu_effects.expressions import value_of
from mgpu_effects.preset_docs import markdown
from mgpu_effects.probes import probe
from mgpu_effects.settings import ConsumerSettings, ModelSettings, ResidencySettings, Step
from mgpu_effects.shapes import keys_of
from mgpu_effects.steps import run_steps
from mgpu_effects.units import units_of
from mgpu_http.cli import main
from tests.support.dev_http import serving
from tests.support.presets import configuration, consumer

ROOT = Path(__file__).parents[2]

every = pytest.mark.parametrize("name", presets.names())
MODELS = [name for name in presets.names() if "models" in presets.preset(name).requires]


@pytest.fixture
def load(tmp_path):
    def load(text):
        file = tmp_path / "consumers.yaml"
        file.write_text(text)
        return load_settings(file, {})

    return load


@pytest.fixture
def errors_of(load):
    def errors_of(text):
        with pytest.raises(ConfigErrors) as raised:
            load(text)
        return raised.value.errors

    return errors_of


# --------------------------------------------------------------------------------- what is shipped


def test_there_is_one_for_each_service_that_is_known():
    assert {"comfyui", "llama-router", "mvoice", "ollama", "ollama-own-lru"} < set(presets.names())
    assert len(MODELS) == 4


@every
def test_each_is_in_order_by_itself(name, load):
    consumer = load(configuration(name)).consumers["a"]
    keys = set(presets.preset(name).consumer)
    assert keys < set(keys_of(ConsumerSettings))
    assert keys >= {"health", "paths"}
    assert not keys & set(presets.preset(name).requires)
    # Each of its keys has come through: what is not written is as it is by default.
    bare = asdict(ConsumerSettings(name="a", url=consumer.url), recurse=False)
    read = asdict(consumer, recurse=False)
    beside = {"preset", *presets.preset(name).requires}
    assert {key for key in read if read[key] != bare[key]} <= keys | beside
    assert consumer.paths.keys() == presets.preset(name).consumer["paths"].keys()


@every
def test_each_says_what_to_know_of_it(name):
    known = presets.preset(name)
    assert all(type(text) is str for text in (known.title, *known.needs, *known.traps))
    assert known.needs
    assert known.traps
    assert known.verified in ("real", "recorded", "documented")


@pytest.mark.parametrize("name", MODELS)
def test_models_are_loaded_and_unloaded_by_name(name, load):
    consumer = load(configuration(name, {"models": "{x/y: {upstream: 'u/v:1'}, z: {}}"}))
    one, two = units_of(consumer.consumers["a"])
    assert one.unload
    assert one.unload != two.unload
    assert "{model}" not in str([*one.load, *one.unload])
    assert isinstance(one.residency, ResidencySettings)


# ------------------------------------------------------------------------------ what is beside them


def test_a_key_beside_it_wins_as_a_whole(load):
    beside = {"unload": "{path: /other}", "busy": "null", "priority": "4"}
    consumer = load(configuration("comfyui", beside)).consumers["a"]
    assert consumer.unload == (Step(path="/other"),)
    assert consumer.busy is None
    assert consumer.priority == 4
    assert consumer.health.path == "/system_stats"
    timeouts = load(configuration("faster-whisper-server", {"timeout_s": "{idle: 5}"}))
    assert timeouts.consumers["a"].timeout_s.first_byte == 600


def test_so_does_one_that_is_merged_in(load):
    text = "consumers:\n  a: &base {url: 'http://h', health: {path: /mine}}\n"
    consumer = load(f"{text}  b: {{<<: *base, preset: piper}}\n").consumers["b"]
    assert consumer.health.path == "/mine"
    assert consumer.on_client_gone == "drain"
    text = "consumers:\n  a: &base {url: 'http://h', preset: piper}\n"
    consumer = load(f"{text}  b: {{<<: *base, on_client_gone: close}}\n").consumers["b"]
    assert (consumer.health.path, consumer.on_client_gone) == ("/info", "close")


def test_two_consumers_may_have_the_same(load):
    text = "consumers: {a: {url: 'http://h:1', preset: vllm}, b: {url: 'http://h:2', preset: vllm}}"
    one, two = load(text).consumers.values()
    assert one.load == two.load != ()


def test_its_name_may_come_from_the_environment(tmp_path):
    file = tmp_path / "consumers.yaml"
    file.write_text("consumers: {a: {url: 'http://h', preset: '${env:SERVICE}'}}")
    assert load_settings(file, {"SERVICE": "piper"}).consumers["a"].health.path == "/info"


# -------------------------------------------------------------------------------- what can be wrong


def test_a_name_that_is_missing_in_the_environment_is_the_one_error(errors_of):
    (error,) = errors_of("consumers: {a: {url: 'http://h', preset: '${env:SERVICE}'}}")
    assert error.message == "the environment has no variable 'SERVICE'"


def test_one_that_is_not_known_is_an_error_with_what_there_is(errors_of):
    (error,) = errors_of("consumers:\n  a:\n    url: http://h\n    preset: llama-ruoter\n")
    assert (error.line, error.column, error.key) == (4, 13, "consumers.a.preset")
    assert "did you mean llama-router?" in error.message
    assert all(name in error.message for name in presets.names())


@pytest.mark.parametrize("models", ["", "    models: [one, two]\n", "    models: {}\n"])
@pytest.mark.parametrize("name", MODELS)
def test_several_models_need_names(errors_of, name, models):
    (error,) = errors_of(f"consumers:\n  a:\n    url: http://h\n    preset: {name}\n{models}")
    assert (error.line, error.key) == (4, "consumers.a.preset")
    assert f"{name} needs models beside it, as `models: {{" in error.message


def test_a_service_that_cannot_be_loaded_without_more_needs_that(errors_of):
    (error,) = errors_of("consumers:\n  a:\n    url: http://h\n    preset: tabbyapi\n")
    assert "tabbyapi needs load beside it, as `load: {" in error.message
    assert "/v1/model/load" in error.message


def test_what_contradicts_a_key_of_it_is_shown_where_it_is_named(errors_of):
    text = (
        "scheduler: {load_timeout_s: 60}\nconsumers:\n  a:\n    url: http://h\n    preset: vllm\n"
    )
    (error,) = errors_of(text)
    assert (error.line, error.column, error.key) == (5, 13, "consumers.a.load.timeout_s")
    assert "120 s, but scheduler.load_timeout_s ends it after 60 s" in error.message


def test_every_error_beside_it_is_found(errors_of):
    text = "consumers:\n  a:\n    url: http://h\n    preset: vllm\n    speed: 5\n    unload: {}\n"
    errors = errors_of(text)
    assert [(error.line, error.key) for error in errors] == [
        (5, "consumers.a.speed"),
        (6, "consumers.a.unload"),
    ]


def test_it_is_a_key_of_the_file_and_no_more(load):
    assert "preset" in fields_dict(ConsumerSettings)
    assert load("consumers: {a: {url: 'http://h', preset: null}}").consumers["a"].preset is None


# ------------------------------------------------------------------------------------- what is told


def test_the_page_in_the_repository_is_that_of_the_files():
    """Made anew by: python -m mgpu_effects.preset_docs > docs/presets.md."""
    assert (ROOT / "docs" / "presets.md").read_text() == markdown()


def test_the_list_has_each_with_its_ways(capsys):
    assert main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["presets"]}
    assert tuple(rows) == presets.names()
    ways = {
        name: (row["loaded_by"], row["unloaded_by"], row["seen_by"]) for name, row in rows.items()
    }
    assert ways["vllm"] == ("POST /wake_up", "POST /sleep?level=1", "GET /is_sleeping")
    assert ways["comfyui"] == ("the next request", "POST /free", "what the broker did")
    assert ways["piper"] == ("its driver", "its driver", "whether it runs")
    assert ways["ollama-own-lru"] == ("itself", "itself", "nobody")
    assert ways["tabbyapi"][0] == "your own load"
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *presets.names()]


@every
def test_what_is_shown_can_be_copied(name, load, capsys):
    assert main(["presets", "show", name]) == 0
    shown = capsys.readouterr().out
    known = presets.preset(name)
    assert known.traps[0].split()[0] in shown
    beside = known.requires
    expected = load(configuration(name, beside)).consumers["a"]
    assert load(shown).consumers[name] == evolve(expected, name=name, preset=None)


def test_one_is_shown_as_a_document(capsys):
    assert main(["presets", "show", "ollama", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["consumer"]["unload"]["body"] == {
        "model": "{model}",
        "keep_alive": 0,
        "stream": False,
    }
    assert shown["requires"].keys() == {"models"}
    assert shown["verified"] == "documented"


def test_one_that_is_not_known_is_not_shown(capsys):
    assert main(["presets", "show", "olama"]) == 2
    assert "no preset olama, did you mean ollama?; there are:" in capsys.readouterr().err


# -------------------------------------------------------- what real servers answered to these keys

OK = (200, {"status": "ok"})
NOT_RUNNING = {"error": {"code": 400, "message": "model is not running"}}
QUEUED = {"prompt_id": "c35b85f2-4280-40fe-beba-101410b217f9", "number": 0, "node_errors": {}}
NOT_FOUND = (404, "not found")

# Shortened. What is not here they answered with 404, or were never asked.
RECORDED = {
    "piper": {
        ("GET", "/info"): (200, {"last": None, "voice": {"name": "en_US-joe-medium"}}),
        ("POST", "/synthesize"): (200, "RIFF"),
    },
    "faster-whisper-server": {
        ("GET", "/health"): OK,
        ("POST", "/v1/audio/transcriptions"): (200, {"text": " Hello world."}),
    },
    "whisper-server": {
        ("GET", "/health"): OK,
        ("POST", "/inference"): (200, {"text": " Hello world.\n"}),
    },
    "llama-server": {
        ("GET", "/health"): OK,
        ("POST", "/v1/chat/completions"): (200, {"choices": []}),
    },
    "llama-router": {
        ("GET", "/health"): OK,
        ("GET", "/models"): (200, {"data": [{"id": "NAME", "status": {"value": "loaded"}}]}),
        ("POST", "/v1/chat/completions"): (200, {"choices": []}),
        ("POST", "/models/unload"): (200, {"success": True}),
    },
    "comfyui": {
        ("GET", "/system_stats"): (200, {"system": {}, "devices": []}),
        ("GET", "/prompt"): (200, {"exec_info": {"queue_remaining": 1}}),
        ("POST", "/prompt"): (200, QUEUED),
        ("GET", "/queue"): (200, {"queue_running": [], "queue_pending": []}),
        ("GET", "/history/{id}"): (200, {}),
        ("POST", "/queue"): (200, ""),
        ("POST", "/interrupt"): (200, ""),
        ("POST", "/free"): (200, ""),
    },
}
# What is not yet, or no longer, as it should be.
NOT_WELL = [
    ("llama-server", (503, {"error": {"message": "Loading model", "code": 503}})),
    ("whisper-server", (404, "File Not Found (/health)")),
]


@asynccontextmanager
async def answering(name, **instead):
    """Give the one unit of the preset, in front of a server that answers as recorded."""
    answers = {**RECORDED[name], **instead.get("answers", {})}
    asked = []

    async def answer(request):
        asked.append((request.method, request.path, await request.text()))
        status, body = answers.get((request.method, request.path), NOT_FOUND)
        text = body if isinstance(body, str) else json.dumps(body)
        return web.Response(status=status, text=text, content_type="application/json")

    async with control_session() as session, serving(answer) as url:
        (unit,) = units_of(evolve(consumer(name), url=url))
        yield session, unit, asked


def test_what_is_called_recorded_or_real_is_tested_here():
    told = {name for name in presets.names() if presets.preset(name).verified != "documented"}
    assert told == set(RECORDED)


def test_what_is_called_real_is_run_by_make_real():
    files = (ROOT / "tests" / "real").glob("*.yaml")
    text = "".join(file.read_text() for file in files)
    real = {name for name in presets.names() if presets.preset(name).verified == "real"}
    assert real == {name for name in presets.names() if f"preset: {name}\n" in text}


@pytest.mark.parametrize("name", RECORDED)
async def test_every_route_of_a_preset_is_one_that_the_server_has(name):
    async with answering(name) as (session, unit, asked):
        facts = await probe(session, [unit], 5)
        assert facts[unit.name].healthy
        assert facts[unit.name].error is None
        assert await run_steps(session, unit, unit.unload) is None
    called = {(method, path) for method, path, _ in asked}
    called |= {(endpoint.method, endpoint.path) for endpoint in unit.paths.values()}
    if unit.job:
        steps = [*unit.job.over, unit.job.failed, *unit.job.cancel]
        called |= {(step.method, step.path) for step in steps}
    assert called == set(RECORDED[name])


@pytest.mark.parametrize(("name", "answer"), NOT_WELL)
async def test_a_server_that_loads_is_not_well(name, answer):
    async with answering(name, answers={("GET", "/health"): answer}) as (session, unit, _):
        assert not (await probe(session, [unit], 5))[unit.name].healthy


async def test_a_model_of_the_router_that_was_not_loaded_counts_as_unloaded():
    unloading = ("POST", "/models/unload")
    async with answering("llama-router", answers={unloading: (400, NOT_RUNNING)}) as at:
        session, unit, asked = at
        assert await run_steps(session, unit, unit.unload) is None
        assert json.loads(asked[0][2]) == {"model": "NAME"}
    async with answering("llama-router", answers={unloading: (500, "")}) as (session, unit, _):
        assert await run_steps(session, unit, unit.unload) == "http_500"


async def test_comfyui_gives_all_back_in_one_call():
    async with answering("comfyui") as (session, unit, asked):
        assert await run_steps(session, unit, unit.unload) is None
    (call,) = asked
    assert json.loads(call[2]) == {"unload_models": True, "free_memory": True}
    assert call[:2] == ("POST", "/free")
    assert value_of(unit.job.id, QUEUED) == QUEUED["prompt_id"]


# ------------------------------------------------------------- what is asked of those not seen here

OF_OLLAMA = {"model": "u/v:1", "stream": False}
# How to load and how to unload it, as its documentation or source has it.
DOCUMENTED = [
    ("ollama", "load", "POST /api/generate", OF_OLLAMA | {"keep_alive": -1}),
    ("ollama", "unload", "POST /api/generate", OF_OLLAMA | {"keep_alive": 0}),
    ("vllm", "load", "POST /wake_up", None),
    ("vllm", "unload", "POST /sleep?level=1", None),
    ("speaches", "load", "POST /api/ps/u/v:1", None),
    ("speaches", "unload", "DELETE /api/ps/u/v:1", None),
    ("kokoro", "unload", "POST /dev/unload", None),
    ("automatic1111", "load", "POST /sdapi/v1/reload-checkpoint", None),
    ("automatic1111", "unload", "POST /sdapi/v1/unload-checkpoint", None),
    ("forge", "unload", "POST /sdapi/v1/unload-checkpoint", None),
    ("koboldcpp", "load", "POST /api/admin/reload_config", {"filename": "initial_model"}),
    ("koboldcpp", "unload", "POST /api/admin/reload_config", {"filename": "unload_model"}),
    ("tabbyapi", "unload", "POST /v1/model/unload", None),
    ("lm-studio", "load", "POST /api/v1/models/load", {"model": "u/v:1"}),
    ("lm-studio", "unload", "POST /api/v1/models/unload", {"instance_id": "u/v:1"}),
    ("mvoice", "load", "POST /load", None),
    ("mvoice", "unload", "POST /unload", None),
]
# What says that there was nothing to do.
DONE_ALREADY = [
    ("speaches", "load", 409, None),
    ("speaches", "unload", 404, None),
    ("speaches", "unload", 409, "http_409"),
    ("kokoro", "unload", 403, "http_403"),
    ("ollama", "unload", 404, "http_404"),
]


async def _told(name, what, status=200):
    """Load or unload, and give how that went and what the service was asked."""
    asked = []

    async def answer(request):
        body = await request.text()
        asked.append((f"{request.method} {request.path_qs}", json.loads(body) if body else None))
        return web.json_response({}, status=status)

    async with control_session() as session, serving(answer) as url:
        several = "models" in presets.preset(name).requires
        models = {"one": ModelSettings(upstream="u/v:1")} if several else ()
        (unit,) = units_of(evolve(consumer(name), url=url, models=models))
        code = await run_steps(session, unit, getattr(unit, what))
    return code, [(unquote(call), body) for call, body in asked]


@pytest.mark.parametrize(("name", "what", "call", "body"), DOCUMENTED)
async def test_services_are_asked_as_they_say(name, what, call, body):
    assert await _told(name, what) == (None, [(call, body)])


@pytest.mark.parametrize(("name", "what", "status", "code"), DONE_ALREADY)
async def test_what_was_done_already_is_no_failure(name, what, status, code):
    assert (await _told(name, what, status))[0] == code


def test_each_way_that_is_documented_is_tested_here():
    ways = {
        (name, what)
        for name in presets.names()
        if presets.preset(name).verified == "documented"
        for what in ("load", "unload")
        if what in presets.preset(name).consumer
    }
    assert ways == {(name, what) for name, what, _, _ in DOCUMENTED}

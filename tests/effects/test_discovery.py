"""What `mgpu init` recognises: each service by what it says, and none by what another says."""

import contextlib
import json
import os
from pathlib import Path
from unittest import mock

import pynvml
import pytest
from aiohttp import web

from mgpu_effects import presets
from mgpu_effects.discovery import Answer, Service, Stranger, known_ports, look, recognise
from mgpu_effects.expressions import JmesPath
from tests.support.dev_http import free_port, serving, serving_raw
from tests.support.discovered import ANSWERS, OTHERS, Known

RECORDINGS = Path(__file__).parents[3] / "shared" / "recordings"
DISCOVERED = {n: d for n in presets.names() if (d := presets.preset(n).discovery)}
PATHS = {discovery.path for discovery in DISCOVERED.values()}
# What the others would be if they were asked; mVoice's own answers are not known.
TOLD = [name for name, discovery in DISCOVERED.items() if not discovery.guess]


def answers(known: Known) -> dict[str, Answer | None]:
    return {path: known.answer(path) for path in PATHS}


@pytest.fixture(autouse=True)
def no_tools(monkeypatch, tmp_path):
    """Nothing but what the test itself starts is on this host."""
    monkeypatch.setenv("PATH", str(tmp_path))


async def found(handler, *expected):
    async with serving(handler) as url:
        return await look({int(url.rpartition(":")[2]): expected})


def answering(known: Known):
    async def handler(request):
        answer = known.answer(request.path)
        body = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
        return web.Response(status=answer.status, text=body, headers=dict(answer.headers))

    return handler


# ----------------------------------------------------------------------------- the data themselves


def test_each_service_can_be_told_from_others_by_one_preset():
    unknown = set(presets.names()) - DISCOVERED.keys()
    assert unknown == {"ollama-own-lru"}  # the same service as `ollama`, kept otherwise
    assert set(TOLD) == {known.preset for known in ANSWERS.values()}
    assert DISCOVERED.keys() - set(TOLD) == {"mvoice"}


@pytest.mark.parametrize("name", DISCOVERED)
def test_what_it_asks_can_be_asked(name):
    discovery = DISCOVERED[name]
    asks = [ask for ask in (discovery.version, discovery.models) if ask]
    for expression in (discovery.when, *(ask.value for ask in asks)):
        assert JmesPath().problem(expression) == ""
    # A `model` in the query of a GET loads that model.
    assert all("?" not in path for path in (discovery.path, *(ask.path for ask in asks)))


def test_the_usual_ports_are_those_of_the_presets_and_of_the_design():
    ports = known_ports()
    assert ports[8178] == ("whisper-server",)
    assert ports[8766] == ("mvoice",)
    assert {"piper", "tabbyapi"} == set(ports[5000])
    assert 8770 not in ports


# ---------------------------------------------------------------------------------- who it is


@pytest.mark.parametrize("told", ANSWERS)
def test_each_is_recognised_and_by_its_own_preset_alone(told):
    known = ANSWERS[told]
    said = answers(known)
    fitting = {name for name in TOLD if said[DISCOVERED[name].path].says(DISCOVERED[name].when)}
    assert fitting == {known.preset}
    assert recognise(said, ()).name == known.preset


@pytest.mark.parametrize("told", OTHERS)
def test_what_only_looks_like_one_is_not_recognised(told):
    assert recognise(answers(OTHERS[told]), ()) is None


def test_mvoice_is_guessed_where_it_is_expected_and_nobody_else_is_known():
    silent = answers(OTHERS["another speech server"])
    assert recognise(silent, ["mvoice"]).name == "mvoice"
    assert recognise(silent, ["vllm"]) is None
    assert recognise(answers(ANSWERS["whisper-server"]), ["mvoice"]).name == "whisper-server"
    assert recognise(dict.fromkeys(PATHS), ["mvoice"]) is None


# What real servers were recorded to answer, by file; a long answer was cut, and is no JSON then.
RECORDED = [
    ("comfyui/01_idle.jsonl", {"comfyui"}),
    ("comfyui/v0.27.0/01_idle.jsonl", {"comfyui"}),
    ("llama-server/single.jsonl", {"llama-server"}),
    ("llama-server/router.jsonl", {"llama-router"}),
    ("whisper-server/whisper.jsonl", {"whisper-server"}),
    ("faster-whisper-server/fws.jsonl", set()),
    ("piper-http/piper.jsonl", {"piper"}),
]


def recorded_answers(file: Path) -> list[tuple[str, Answer]]:
    found = []
    for line in file.read_text().splitlines():
        told = json.loads(line)
        if told.get("method") == "GET" and told["path"] in PATHS and told.get("response_headers"):
            headers = {name.lower(): value for name, value in told["response_headers"].items()}
            body = told.get("response_body") or ""
            with contextlib.suppress(ValueError):
                body = json.loads(body)
            found.append((told["path"], Answer(status=told["status"], headers=headers, body=body)))
    return found


@pytest.mark.skipif(not RECORDINGS.is_dir(), reason="the recordings are not here")
@pytest.mark.parametrize(("file", "recognised"), RECORDED)
def test_a_recorded_server_is_taken_for_itself_whatever_it_answers(file, recognised):
    said = recorded_answers(RECORDINGS / file)
    assert said
    assert recognised == {
        name
        for name in TOLD
        for path, answer in said
        if path == DISCOVERED[name].path and answer.says(DISCOVERED[name].when)
    }


# ------------------------------------------------------------------------------- asking a host


@pytest.mark.parametrize("told", ANSWERS)
async def test_a_service_tells_its_version_and_its_models(told):
    known = ANSWERS[told]
    host = await found(answering(known))
    (service,) = host.services
    assert (service.name, service.version) == (known.preset, known.version)
    assert tuple(model.name for model in service.models) == known.models
    assert host.strangers == ()


async def test_nothing_is_asked_but_by_get_and_nothing_twice():
    asked = []

    async def handler(request):
        asked.append((request.method, request.path_qs))
        return await answering(ANSWERS["llama-router"])(request)

    await found(handler)
    assert {method for method, _ in asked} == {"GET"}
    assert len(asked) == len(set(asked))
    assert not [path for _, path in asked if "?" in path or path.startswith("/slots")]


async def test_the_size_of_a_model_is_in_mib():
    host = await found(answering(ANSWERS["ollama"]))
    assert [model.mib for model in host.services[0].models] == [4983]


async def test_a_service_that_lacks_what_its_preset_asks_says_so():
    host = await found(answering(ANSWERS["vllm"]))
    assert host.services[0].problems == ("GET /is_sleeping was answered with 404",)
    assert not host.services[0].has_routes
    host = await found(answering(ANSWERS["llama-server with a key"]))
    (problem,) = host.services[0].problems
    assert problem.startswith("GET /models wants a key: `headers: {Authorization: ")
    host = await found(answering(ANSWERS["llama-server"]))
    assert host.services[0].problems == ()


async def test_what_a_service_says_can_be_no_more_than_a_word_in_a_line():
    bad = "1.2\n\nconsumers: {x: 1} # é" + "x" * 100
    stats = {"system": {"comfyui_version": bad}}
    host = await found(answering(Known("comfyui", {}, {"/system_stats": stats})))
    assert host.services[0].version == "1.2 consumers: {x: 1} # xxxxxxxxxxxxxxxx"
    tags = {"models": [{"name": n} for n in ("a b", "x\n", "${env:HOME}", "*", 7, None, "fine")]}
    known = Known("ollama", {}, {"/": "Ollama is running", "/api/tags": tags})
    host = await found(answering(known))
    assert [model.name for model in host.services[0].models] == ["fine"]


async def test_what_is_not_known_or_does_not_answer_is_named():
    host = await found(answering(OTHERS["another speech server"]), "vllm", "comfyui")
    (stranger,) = host.strangers
    assert (stranger.what, stranger.expected) == ("nothing that is known", ("vllm", "comfyui"))

    async def silent(_reader, writer):
        writer.write(b"SSH-2.0-OpenSSH\r\n")

    async with serving_raw(silent) as url:
        host = await look({int(url.rpartition(":")[2]): ()})
    assert [each.what for each in host.strangers] == ["something that does not answer in time"]


async def test_a_broker_that_stands_for_a_service_is_not_that_service():
    known = ANSWERS["comfyui"]
    front = Known("comfyui", {**known.headers, "X-Mgpu-Request": "1-1"}, known.answers)
    host = await found(answering(front))
    assert host.services == ()
    assert host.strangers[0].what == "a broker that runs"


async def test_where_nothing_listens_nothing_is_found():
    host = await look({free_port(): ("comfyui",)})
    assert (host.services, host.strangers) == ((), ())


async def test_two_of_a_kind_get_names_of_their_own_and_who_does_most_comes_first():
    llama, speaches = answering(ANSWERS["llama-server"]), answering(ANSWERS["speaches"])
    async with serving(llama) as one, serving(llama) as two, serving(speaches) as three:
        ports = sorted(int(url.rpartition(":")[2]) for url in (one, two))
        host = await look(dict.fromkeys((*ports, int(three.rpartition(":")[2])), ()))
    names = [service.name for service in host.services]
    assert names == ["speaches", "llama-server", f"llama-server-{ports[1]}"]
    assert all(isinstance(each, Service) for each in host.services)
    assert not any(isinstance(each, Stranger) for each in host.services)


# ------------------------------------------------------------------------------------------ cards

NVIDIA_SMI = """\
#!/bin/sh
case "$1" in
--query-gpu*) echo '0, GPU-8f0e, 24576, 5000, 19576'; echo '1, GPU-11aa, 8192, 0, 8192';;
*) echo 'GPU-8f0e, {pid}, 4500'; echo 'GPU-11aa, 1, 300';;
esac
"""


async def test_the_cards_and_who_holds_them_are_read(tmp_path):
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI.format(pid=os.getpid()))
    (tmp_path / "nvidia-smi").chmod(0o755)
    with mock.patch.object(pynvml, "nvmlInit", side_effect=pynvml.NVMLError_LibraryNotFound):
        host = await found(answering(ANSWERS["comfyui"]))
    assert [(card.index, card.total_mib) for card in host.cards] == [(0, 24576), (1, 8192)]
    assert host.gpu_error is None
    assert host.services[0].held_mib == {}  # whoever looks is not a service


async def test_without_a_card_it_says_why():
    with mock.patch.object(pynvml, "nvmlInit", side_effect=pynvml.NVMLError_LibraryNotFound):
        host = await found(answering(ANSWERS["comfyui"]))
    assert (host.cards, host.gpu_error) == ((), "no_gpu")

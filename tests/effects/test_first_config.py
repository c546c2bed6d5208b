"""The configuration that `mgpu init` writes: in order whatever was found, and it says what was."""

import os

import pytest
from ruamel.yaml import YAML

from mgpu_effects import presets
from mgpu_effects.config_file import load_settings
from mgpu_effects.discovery import Card, Host, Model, Service, Stranger
from mgpu_effects.first_config import WIDTH, first_config, flow
from mgpu_effects.run_by import RunBy

LISTEN = "127.0.0.1:8770"
CARD = Card(index=0, total_mib=24576, used_mib=900)
SECOND = Card(index=1, total_mib=24576, used_mib=0)
FOUND = [name for name in presets.names() if presets.preset(name).discovery]
SEVERAL = [name for name in FOUND if "models" in presets.preset(name).requires]
UNIT, OWN_UNIT = RunBy(unit="it.service"), RunBy(unit="it.service", user=True)
OTHER_UNIT = RunBy(unit="other.service")
CONTAINER = RunBy(container="it", engine="podman")
every = pytest.mark.parametrize("name", FOUND)


def service(name, port=7000, **more):
    return Service(name=more.pop("called", name), preset=presets.preset(name), port=port, **more)


@pytest.fixture
def written(tmp_path):
    """Write it for a host: gives the settings, and the text."""

    def written(*services, cards=(CARD,), **more):
        host = Host(services=services, cards=cards, **more)
        file = tmp_path / "consumers.yaml"
        file.write_text(first_config(host, LISTEN))
        return load_settings(file), file.read_text()

    return written


# ----------------------------------------------------------------------------- in order, always


@every
@pytest.mark.parametrize("cards", [(), (CARD,), (CARD, SECOND)])
def test_it_is_in_order_for_each_service(written, name, cards):
    held = {card.index: 9000 for card in cards}
    some = (Model(name="a/b:1", mib=5), Model(name="c:latest"))
    for run_by, models in ((RunBy(), ()), (UNIT, some), (OWN_UNIT, ()), (CONTAINER, some)):
        found = service(name, models=models, run_by=run_by, held_mib=held, problems=("x",))
        settings, text = written(found, cards=cards)
        (consumer,) = settings.consumers.values()
        assert (consumer.preset, consumer.url) == (name, "http://127.0.0.1:7000")
        assert set(settings.routing.values()) == {name}
        assert len(settings.gpus) == max(1, len(cards))
        assert all(len(line) <= WIDTH for line in text.splitlines() if "{" not in line)


def test_all_of_them_at_once_make_one(written):
    found = [service(name, 7000 + at, models=(Model(name="m"),)) for at, name in enumerate(FOUND)]
    settings, text = written(*found)
    assert len(settings.consumers) == len(FOUND)
    assert settings.audio_proxy == "mvoice"
    assert text.count("Not named, as others have these names already: m.") > 1


def test_nothing_found_is_in_order_too(written):
    settings, text = written(cards=(), gpu_error="nvml_failed")
    assert settings.consumers == {}
    assert "Nobody was found for tts, stt, llm, image." in text
    assert "(nvml_failed)" in text


@pytest.mark.parametrize(
    "value", ["plain", "true", "1.5", "a: b", "x # y", 'say "no"', "{a}", "", "é", "- a", "null"]
)
def test_a_text_stays_that_text(value):
    parsed = YAML(typ="safe", pure=True).load(f"{{key: {flow([value, {value: value}])}}}")
    assert parsed == {"key": [value, {value: value}]}


# -------------------------------------------------------------------------------------- memory


def test_what_it_holds_now_is_its_footprint(written):
    settings, text = written(service("kokoro", held_mib={0: 2345}))
    assert settings.consumers["kokoro"].vram_resident_mib == 2345
    assert "holds 2,345 MiB of GPU 0 now" in text
    assert settings.gpus[0].total_mib == 24576


@pytest.mark.parametrize("held", [{}, {0: 600}, {0: 24500}])
def test_nothing_a_context_alone_and_what_can_never_fit_are_no_footprint(written, held):
    settings, _ = written(service("comfyui", held_mib=held))
    assert settings.consumers["comfyui"].vram_resident_mib == "auto"


def test_who_works_on_several_cards_takes_from_each(written):
    found = service("vllm", held_mib={0: 21000, 1: 20500})
    settings, _ = written(found, cards=(CARD, SECOND))
    assert settings.consumers["vllm"].gpu == {0: 21000, 1: 20500}
    full = service("vllm", held_mib={0: 24500, 1: 24400})
    settings, _ = written(full, cards=(CARD, SECOND))
    assert settings.consumers["vllm"].gpu == {0: 24320, 1: 24320}
    settings, _ = written(service("comfyui", held_mib={1: 9000}), cards=(CARD, SECOND))
    comfyui = settings.consumers["comfyui"]
    assert (comfyui.gpu, comfyui.vram_resident_mib) == (1, 9000)
    assert [gpu.index for gpu in settings.gpus] == [0, 1]


def test_without_a_card_nobody_needs_memory(written):
    found = [service(name, 7000 + at) for at, name in enumerate(FOUND)]
    settings, _ = written(*found, cards=(), gpu_error="no_gpu")
    assert {consumer.gpu for consumer in settings.consumers.values()} == {"none"}
    assert settings.gpus[0].sampler == "none"
    assert settings.consumers["ollama"].residency.path == "/api/ps"


def test_piper_is_on_a_card_only_where_it_was_seen_there(written):
    assert written(service("piper"))[0].consumers["piper"].gpu == "none"
    piper = written(service("piper", held_mib={0: 700}))[0].consumers["piper"]
    assert (piper.gpu, piper.vram_resident_mib) == (0, 700)


# ----------------------------------------------------------------------------- who starts and stops


def test_a_unit_of_the_user_and_a_container_are_its_driver(written):
    driver = written(service("comfyui", run_by=OWN_UNIT))[0].consumers["comfyui"].driver
    assert (driver.systemd.unit, driver.systemd.user) == ("it.service", True)
    driver = written(service("vllm", run_by=CONTAINER))[0].consumers["vllm"].driver
    assert (driver.container.name, driver.container.engine) == ("it", "podman")


@pytest.mark.parametrize("root", [True, False])
def test_a_unit_of_the_system_is_not_needed_by_who_unloads_by_itself(written, monkeypatch, root):
    """Started without the permission, its load would fail."""
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    settings, text = written(
        service("comfyui", run_by=UNIT), service("whisper-server", 7001, run_by=OTHER_UNIT)
    )
    assert settings.consumers["whisper-server"].driver.systemd.unit == "other.service"
    assert (settings.consumers["comfyui"].driver is not None) == root
    assert ("# systemd_unit: it.service" in text) != root


def test_two_that_one_unit_runs_have_one_driver_between_them(written):
    """`mgpu check` refuses a unit that two would stop."""
    settings, text = written(
        service("llama-server", run_by=UNIT), service("whisper-server", 7001, run_by=UNIT)
    )
    drivers = [consumer.driver for consumer in settings.consumers.values()]
    assert (drivers[0].systemd.unit, drivers[1]) == ("it.service", None)
    assert "Who stops what runs llama-server stops this too" in text


def test_who_has_no_way_out_is_told_what_is_missing(written):
    assert "it is never sent out" in written(service("llama-server"))[1]
    assert "it is never sent out" not in written(service("kokoro"))[1]
    assert "it is never sent out" not in written(service("llama-server"), cards=())[1]
    assert "it is never sent out" not in written(service("piper"))[1]  # on the processor


@pytest.mark.parametrize("cards", [(), (CARD,)])
def test_who_lacks_the_routes_of_its_preset_is_started_and_stopped_by_its_driver(written, cards):
    """A load by a route that is not there would fail, and with it each request."""
    found = service("vllm", has_routes=False, run_by=UNIT, held_mib={0: 21000})
    vllm = written(found, cards=cards)[0].consumers["vllm"]
    assert (vllm.load, vllm.unload, vllm.residency, vllm.vram_residue_mib) == ((), (), "assumed", 0)
    assert vllm.driver.systemd.unit == "it.service"
    _, text = written(service("vllm", has_routes=False), cards=cards)
    assert ("it is never sent out" in text) == bool(cards)


# ---------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", SEVERAL)
def test_each_model_is_a_unit_and_those_to_come_are_met(written, name):
    models = (Model(name="qwen3:8b", mib=4983), Model(name="tiny:latest"))
    settings, text = written(service(name, models=models))
    told = settings.consumers[name].models
    assert list(told) == ["qwen3:8b", "tiny:latest", "*"]
    assert {model.vram_resident_mib for model in told.values()} == {"auto"}
    assert told["tiny:latest"].aliases == ("tiny",)
    assert "# 4,983 MiB of weights" in text


def test_a_model_that_two_have_is_the_first_ones(written):
    ollama = service("ollama", models=(Model(name="m"), Model(name="tiny:latest")))
    llama = service("llama-server", 7001, models=(Model(name="tiny"),))
    settings, text = written(ollama, llama)
    assert settings.consumers["llama-server"].models == ()
    assert "Not named, as others have these names already: tiny." in text


def test_speech_has_the_names_by_which_openais_clients_ask_where_they_are_understood(written):
    settings, _ = written(
        service("kokoro"), service("whisper-server", 7001), service("faster-whisper-server", 7002)
    )
    models = {name: consumer.models for name, consumer in settings.consumers.items()}
    assert models == {
        "kokoro": ("tts-1",),
        "whisper-server": ("whisper-1",),
        "faster-whisper-server": (),
    }
    assert written(service("piper"))[0].consumers["piper"].models == ()


def test_the_model_that_is_loaded_is_the_one_to_load(written):
    settings, _ = written(service("tabbyapi", models=(Model(name="gemma"),)))
    assert settings.consumers["tabbyapi"].load[0].body == {"model_name": "gemma"}
    assert "NAME is yours to fill in" in written(service("tabbyapi"))[1]


# -------------------------------------------------------------------------------- ports, and others


def test_a_front_port_is_one_that_is_free(written):
    assert written(service("comfyui", 8188))[0].consumers["comfyui"].front == 18188
    for port, listening in ((8188, frozenset({18188})), (60000, frozenset())):
        settings, text = written(service("comfyui", port), listening=listening)
        assert settings.consumers["comfyui"].front is None
        assert "# front: PORT" in text
    assert written(service("vllm"))[0].consumers["vllm"].front is None


def test_what_is_not_known_is_named(written):
    stranger = Stranger(port=5000, what="nothing that is known", expected=("piper", "tabbyapi"))
    _, text = written(strangers=(stranger,))
    assert "# Port 5000: nothing that is known. Usually piper or tabbyapi is there;" in text


def test_alternatives_are_named(written):
    settings, text = written(service("ollama"), service("vllm", 7001))
    assert settings.routing == {"llm": "ollama"}
    assert "  llm: ollama # or vllm\n" in text
    assert "Nobody was found for tts, stt, image." in text

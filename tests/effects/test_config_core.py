"""The core's configuration holds what it decides by, and nothing else."""

import json

from mgpu_core.codec import encode_config
from mgpu_core.config import Config, Consumer, Gpu
from mgpu_effects.config_file import load_settings
from mgpu_effects.core_config import core_config
from mgpu_effects.settings import ConsumerSettings, GpuSettings, Settings, Step


def _core(tmp_path, text: str) -> Config:
    file = tmp_path / "consumers.yaml"
    file.write_text(text)
    return core_config(load_settings(file, {"SECRET": "s3cret"}))


def _consumer(tmp_path, keys: str) -> Consumer:
    text = f"{{gpus: [{{index: 0}}, {{index: 1}}], consumers: {{a: {{url: 'http://a', {keys}}}}}}}"
    return _core(tmp_path, text).consumers["a"]


def test_defaults_of_the_file_are_those_of_the_core():
    settings = Settings(consumers={"a": ConsumerSettings(name="a", url="http://a")})
    assert core_config(settings) == Config(consumers={"a": Consumer(name="a")})


def test_seconds_become_whole_microseconds(tmp_path):
    config = _core(
        tmp_path,
        """
probe: {interval_s: 0.25, failures: 3}
gpu: {poll_interval_s: 1.5}
scheduler:
  queue_timeout_s: 0.1
  load_timeout_s: 7
  unload_timeout_s: 8
  settle_timeout_s: 0
  restore_after_s: 600
consumers: {a: {url: http://a, systemd_unit: a, idle_unload_s: 0.001}}
""",
    )
    assert (config.probe_interval_us, config.probe_failures) == (250_000, 3)
    assert config.poll_interval_us == 1_500_000
    assert (config.queue_timeout_us, config.settle_timeout_us) == (100_000, 0)
    assert (config.load_timeout_us, config.unload_timeout_us) == (7_000_000, 8_000_000)
    assert config.restore_after_us == 600_000_000
    assert config.consumers["a"].idle_unload_us == 1000


def test_the_choices_of_the_scheduler_are_handed_on(tmp_path):
    config = _core(
        tmp_path,
        "scheduler: {eviction: gdsf, overtake_bound: null, max_evictions: 2, when_unfit: reject,"
        " overlap_loads: false}",
    )
    assert (config.eviction, config.overtake_bound, config.max_evictions) == ("gdsf", None, 2)
    assert (config.when_unfit, config.overlap_loads) == ("reject", False)


def test_cards_are_known_by_number_and_the_most_impatient_sets_the_pace(tmp_path):
    config = _core(
        tmp_path,
        "gpus: [{uuid: GPU-a, total_mib: 9, cushion_mib: 1, poll_interval_s: 5},"
        " {index: 4, reserved_mib: 3, max_parallel: null, poll_interval_s: 1}]",
    )
    assert config.gpus == {
        0: Gpu(index=0, total_mib=9, cushion_mib=1),
        4: Gpu(index=4, reserved_mib=3, max_parallel=None),
    }
    assert config.poll_interval_us == 1_000_000


def test_memory_is_told_by_card(tmp_path):
    assert _consumer(tmp_path, "gpu: 1, vram_resident_mib: 700").vram_mib == {1: 700}
    assert _consumer(tmp_path, "gpu: {1: 8000, 0: 9000}").vram_mib == {0: 9000, 1: 8000}
    assert _consumer(tmp_path, "gpu: none").vram_mib == {}
    measured = _consumer(tmp_path, "vram_resident_mib: auto")
    assert (measured.vram_mib, measured.vram_auto) == ({0: 0}, True)


def test_who_can_load_and_unload_is_told_without_saying_how(tmp_path):
    routes = _consumer(tmp_path, "load: {path: /l}, unload: [{path: /u}, {path: /v}]")
    assert (routes.load_route, routes.unload_route, routes.driver) == (True, True, "none")
    assert _consumer(tmp_path, "systemd_unit: a.service").driver == "systemd"
    assert _consumer(tmp_path, "driver: {container: {name: a}}").driver == "container"
    assert _consumer(tmp_path, "driver: {process: {command: x}}").driver == "process"


def test_every_other_key_of_a_consumer_is_handed_on(tmp_path):
    consumer = _consumer(
        tmp_path,
        "vram_load_mib: 2, vram_residue_mib: 3, vram_managed: true, gpu_slot: false, priority: 4,"
        "max_concurrency: 5, max_pending: 6, pinned: true, preload: true, load: {path: /l}",
    )
    assert consumer == Consumer(
        name="a",
        vram_load_mib=2,
        vram_residue_mib=3,
        vram_managed=True,
        gpu_slot=False,
        priority=4,
        max_concurrency=5,
        max_pending=6,
        pinned=True,
        preload=True,
        load_route=True,
    )


def test_the_order_in_the_file_makes_no_difference():
    def consumer(name, *others):
        return ConsumerSettings(name=name, url="http://a", can_coexist_with=others)

    cards = (GpuSettings(index=0), GpuSettings(index=1))
    one = Settings(consumers={"a": consumer("a", "b", "c"), "b": consumer("b")}, gpus=cards)
    other = Settings(consumers={"b": consumer("b"), "a": consumer("a", "c", "b")}, gpus=cards[::-1])
    assert json.dumps(encode_config(core_config(one))) == json.dumps(
        encode_config(core_config(other))
    )


def test_no_url_path_header_body_command_or_secret_gets_into_the_core(tmp_path):
    config = _core(
        tmp_path,
        """
auth: {keys: [{name: s3cret, hash: HASH}]}
consumers:
  a:
    url: http://s3cret.example/s3cret
    health: {path: /s3cret}
    paths: {tts: {path: /s3cret}}
    headers: {Authorization: "${env:SECRET}"}
    unload: {path: /s3cret, body: {k: s3cret}, headers: {X: s3cret}}
    load: {path: /s3cret, body: s3cret}
    driver: {process: {command: [s3cret], env: {A: s3cret}, cwd: /s3cret}}
""".replace("HASH", "ab" * 32),
    )
    logged = json.dumps(encode_config(config))
    assert "s3cret" not in logged
    assert "http" not in logged
    assert "abab" not in logged


def test_a_step_more_or_less_in_the_file_is_no_change_to_the_core():
    one = ConsumerSettings(name="a", url="http://a", unload=(Step(path="/u"),))
    other = ConsumerSettings(name="a", url="http://b", unload=(Step(path="/v"), Step(path="/w")))
    assert core_config(Settings(consumers={"a": one})) == core_config(
        Settings(consumers={"a": other})
    )

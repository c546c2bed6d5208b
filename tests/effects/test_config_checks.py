"""Names in the file must exist, and its values must not contradict each other."""

import pytest

from mgpu_effects.config_file import ConfigErrors, load_settings

# Three consumers and two cards that have nothing wrong, to which each case adds.
VOICE = "url: http://127.0.0.1:9001, paths: {tts: {path: /say}}"
PICTURES = "url: http://127.0.0.1:9002"
HASH = "ab" * 32


def _errors(tmp_path, text):
    file = tmp_path / "consumers.yaml"
    file.write_text(text)
    try:
        load_settings(file, {})
    except ConfigErrors as wrong:
        return [(error.key, error.message) for error in wrong.errors]
    return []


def _text(top="", voice="", pictures=""):
    return (
        f"{top}\nconsumers:\n  voice: {{{VOICE}, {voice}}}\n  pictures: {{{PICTURES}, {pictures}}}"
    )


TOP = [
    ("routing: {tts: voic}", "routing.tts", "there is no consumer voic, did you mean voice?"),
    ("routing: {tts: zzz}", "routing.tts", "there are: voice, pictures"),
    ("routing: {stt: voice}", "routing.stt", "voice has no paths.stt"),
    ("audio_proxy: zzz", "audio_proxy", "there is no consumer zzz"),
    ("listen: 0.0.0.0:8770", "listen", "0.0.0.0 is not loopback"),
    ("listen: '[::]:8770'", "listen", "auth.keys, or auth: open"),
    ("listen: [127.0.0.1:80, example.org:80]", "listen[1]", "example.org is not loopback"),
    ("listen: 0.0.0.0:8770\nauth: {keys: []}", "listen", "is not loopback"),
    ("listen: 127.0.0.256:8770", "listen", "127.0.0.256 is no IP address"),
    ("listen: '[::1::]:8770'", "listen", "is no IP address"),
    ("listen: [localhost:80, localhost:80]", "listen[1]", "localhost:80 is given twice"),
    ("listen: 127.0.0.1:9001", "consumers.voice.url", "the broker's own address"),
    ("listen: localhost:9001", "consumers.voice.url", "the broker's own address"),
    ("auth: open\nlisten: 0.0.0.0:9001", "consumers.voice.url", "the broker's own address"),
    (
        f"auth: {{keys: [{{name: a, hash: {HASH}}}, {{name: a, hash: {HASH}}}]}}",
        "auth.keys[1].name",
        "a is given twice",
    ),
    ("gpus: [{}, {index: 1}]", "gpus[0]", "needs an index or a uuid"),
    ("gpus: [{index: 1}, {index: 0}, {index: 1}]", "gpus[2].index", "a GPU 1 already"),
    ("gpus: [{index: 1}, {uuid: GPU-a}]", "gpus[1]", "a GPU 1 already"),
    ("gpus: [{uuid: a}, {uuid: a}]", "gpus[1].uuid", "a is given twice"),
    (
        "gpus: [{index: 0}, {index: 1, sampler: none}]",
        "gpus[1].sampler",
        "one sampler reads all GPUs",
    ),
    ("gpu: {total_mib: 1000, reserved_mib: 800}", "gpu.total_mib", "nothing is left"),
]


@pytest.mark.parametrize(("top", "key", "words"), TOP)
def test_a_contradiction_of_the_whole_is_the_one_error(tmp_path, top, key, words):
    on_no_card = "gpu: none"
    found = _errors(tmp_path, _text(top, on_no_card, on_no_card))
    assert [key for key, _ in found] == [key]
    assert words in found[0][1]


CARDS = "gpus: [{index: 0, total_mib: 16000, reserved_mib: 1000}, {index: 2, total_mib: 24000}]"

CONSUMERS = [
    ("can_coexist_with: [pictures, zzz]", "can_coexist_with[1]", "there is no consumer zzz"),
    ("can_coexist_with: [pictures, pictures]", "can_coexist_with[1]", "given twice"),
    ("can_coexist_with: [voice]", "can_coexist_with[0]", "names the consumer itself"),
    ("gpu: 1", "gpu", "there is no GPU 1; there are: 0, 2"),
    ("gpu: {0: 1000, 3: 1000}", "gpu", "there is no GPU 3"),
    ("gpu: {0: 1000}, vram_resident_mib: 1000", "vram_resident_mib", "gpu says already"),
    ("gpu: {0: 1000}, vram_resident_mib: auto", "vram_resident_mib", "gpu says already"),
    ("gpu: none, vram_resident_mib: 1000", "vram_resident_mib", "takes no GPU memory"),
    ("gpu: none, vram_load_mib: 1000", "vram_load_mib", "takes no GPU memory"),
    ("gpu: none, vram_managed: true", "vram_managed", "takes no GPU memory"),
    ("vram_resident_mib: 500, vram_residue_mib: 501", "vram_residue_mib", "more would stay"),
    ("vram_resident_mib: 14745", "vram_resident_mib", "14745 MiB can never fit: GPU 0 has 16000"),
    ("vram_resident_mib: 1, vram_load_mib: 14745", "vram_load_mib", "can never fit"),
    ("gpu: {0: 14000, 2: 23745}", "gpu", "23745 MiB can never fit: GPU 2"),
    ("systemd_unit: a, driver: {process: {command: x}}", "systemd_unit", "another way"),
    ("systemd_unit: a, driver: {systemd: {unit: b}}", "systemd_unit", "another way"),
    ("load: {path: /l, timeout_s: 301}", "load.timeout_s", "scheduler.load_timeout_s ends it"),
    ("load: [{path: /l}, {path: /m, timeout_s: 301}]", "load[1].timeout_s", "after 300 s"),
    ("unload: {path: /u, timeout_s: 61}", "unload.timeout_s", "scheduler.unload_timeout_s ends it"),
    (
        "driver: {process: {command: x, ready_s: 301}}",
        "driver.process.ready_s",
        "301 s, but scheduler.load_timeout_s ends it after 300 s",
    ),
    (
        "driver: {process: {command: x, grace_s: 56}}",
        "driver.process.grace_s",
        "56 s and 5 s for SIGKILL are more than scheduler.unload_timeout_s, 60 s",
    ),
    (
        "driver: {container: {name: x, ready_s: 301}}",
        "driver.container.ready_s",
        "301 s, but scheduler.load_timeout_s ends it after 300 s",
    ),
    (
        "driver: {container: {name: x, grace_s: 56}}",
        "driver.container.grace_s",
        "56 s and 5 s for SIGKILL are more than scheduler.unload_timeout_s, 60 s",
    ),
    ("systemd_unit: a, driver: {container: {name: a}}", "systemd_unit", "another way"),
    ("preload: true", "preload", "nothing can load it"),
    ("preload: true, unload: {path: /u}", "preload", "nothing can load it"),
    ("idle_unload_s: 9", "idle_unload_s", "nothing can unload it"),
    ("idle_unload_s: 9, load: {path: /l}", "idle_unload_s", "nothing can unload it"),
    (
        "idle_unload_s: 9, unload: {path: /u}, pinned: true",
        "idle_unload_s",
        "with pinned it is never unloaded",
    ),
    (
        "idle_unload_s: 9, unload: {path: /u}, vram_managed: true",
        "idle_unload_s",
        "with vram_managed it is never unloaded",
    ),
    ("unload_again_s: 9", "unload_again_s", "nothing is told to unload"),
    (
        "unload_again_s: 61, unload: {path: /u}",
        "unload_again_s",
        "61 s, but scheduler.unload_timeout_s ends it after 60 s",
    ),
    ("job: {id: a, over: {path: /q, when: b}}", "job", "it has no paths"),
    (
        "vram_managed: true, residency: {path: /p, resident: a}",
        "residency",
        "with vram_managed it is never tracked",
    ),
    ("residency: {path: /p, resident: a, unit: mib}", "residency.unit", "there is no mib"),
    (
        "gpu: none, residency: {path: /p, resident: a, mib: b}",
        "residency.mib",
        "takes no GPU memory",
    ),
    ("gpu: none, residency: nvml", "residency", "takes no GPU memory"),
    (
        "residency: {path: '/p/{model}', resident: a}",
        "residency.path",
        "{model} stands for one of `models`",
    ),
    ("busy: {path: /p, when: 'a == {model}'}", "busy.when", "{model} stands for one of"),
    ("url: http://gpu-box:9001, residency: nvml", "residency", "its processes cannot be found"),
    ("url: http://10.0.0.7:9001, residency: nvml", "residency", "its processes cannot be found"),
    ("url: http://300.0.0.1/", "url", "300.0.0.1 is no IP address"),
    ("url: 'http://[::g]/'", "url", "an http or https URL"),
]


@pytest.mark.parametrize(("keys", "key", "words"), CONSUMERS)
def test_a_contradiction_in_a_consumer_is_the_one_error(tmp_path, keys, key, words):
    own = "" if keys.startswith("url") else "url: http://127.0.0.1:9001, "
    text = f"{CARDS}\nconsumers:\n  voice: {{{own}{keys}}}\n  pictures: {{{PICTURES}}}"
    found = _errors(tmp_path, text)
    assert [key for key, _ in found] == [f"consumers.voice.{key}"]
    assert words in found[0][1]


@pytest.mark.parametrize("way", ["systemd_unit: a", "driver: {systemd: {unit: a}}"])
def test_the_processes_of_a_unit_are_found_wherever_its_url_leads(tmp_path, way):
    text = f"consumers: {{voice: {{url: 'http://gpu-box:9001', residency: nvml, {way}}}}}"
    assert _errors(tmp_path, text) == []


def test_who_holds_the_memory_cannot_be_seen_where_nobody_reads_the_cards(tmp_path):
    found = _errors(tmp_path, _text("gpu: {sampler: none}", "residency: nvml"))
    assert found == [("consumers.voice.residency", "nobody reads the GPUs: sampler is none")]


def test_a_grace_by_default_may_be_too_long_for_an_unload(tmp_path):
    top = "scheduler: {unload_timeout_s: 14}"
    found = _errors(tmp_path, _text(top, "driver: {process: {command: x}}"))
    assert [key for key, _ in found] == ["consumers.voice.driver.process"]
    assert "10 s and 5 s for SIGKILL" in found[0][1]


def test_nothing_is_concluded_from_a_limit_that_could_not_be_read(tmp_path):
    top = "scheduler: {unload_timeout_s: 14}"
    found = _errors(tmp_path, _text(top, "unload: {path: /u, timeout_s: long}"))
    assert [key for key, _ in found] == ["consumers.voice.unload.timeout_s"]
    assert "ends it" not in found[0][1]


def test_a_unit_belongs_to_one_consumer(tmp_path):
    found = _errors(tmp_path, _text("", "systemd_unit: a", "driver: {systemd: {unit: a}}"))
    assert found == [
        ("consumers.pictures.driver", "a is the unit of voice too: stopping one would stop both")
    ]


def test_a_container_belongs_to_one_consumer(tmp_path):
    same = "driver: {container: {name: a}}"
    found = _errors(tmp_path, _text("", same, same))
    text = "a is the container of voice too: stopping one would stop both"
    assert found == [("consumers.pictures.driver", text)]
    other = "driver: {container: {name: a, engine: podman}}"
    assert _errors(tmp_path, _text("", same, other)) == []


@pytest.mark.parametrize(
    ("top", "keys"),
    [
        ("", "systemd_unit: a"),
        ("listen: 0.0.0.0:8770\nauth: open", ""),
        (f"listen: 0.0.0.0:8770\nauth: {{keys: [{{name: a, hash: {HASH}}}]}}", ""),
        ("listen: ['127.0.0.2:80', '[::1]:80', 'localhost:81']", ""),
        ("listen: 127.0.0.1:0", ""),
        ("gpu: {total_mib: 16000, reserved_mib: 1000}", "vram_resident_mib: 14744"),
        ("gpu: {total_mib: 16000}", "vram_managed: true, vram_resident_mib: 99999"),
        ("", "vram_resident_mib: 99999"),
        ("", "vram_resident_mib: auto, vram_residue_mib: 500"),
        ("gpu: {max_parallel: null}", "gpu: 0, gpu_slot: false"),
        ("", "preload: true, idle_unload_s: 9, systemd_unit: a"),
        ("", "preload: true, idle_unload_s: 9, load: {path: /l}, unload: {path: /u}"),
        ("", "driver: {process: {command: x, ready_s: 300, grace_s: 55}}"),
        ("", "driver: {container: {name: x, ready_s: 300, grace_s: 55}}"),
        ("scheduler: {unload_timeout_s: 4}", "driver: {container: {name: x}}"),
        ("scheduler: {load_timeout_s: 9, unload_timeout_s: 9}", "load: {path: /l}"),
        ("scheduler: {load_timeout_s: 9}", "driver: {process: {command: x}}"),
        ("routing: {tts: voice}\naudio_proxy: pictures", "can_coexist_with: [pictures]"),
        ("", "residency: nvml"),
        ("", "residency: {path: /p, resident: a, mib: b, unit: mib}, busy: {path: /p, when: c}"),
        ("", "gpu: none, residency: {path: /p, resident: a}"),
    ],
)
def test_what_only_looks_wrong_is_taken(tmp_path, top, keys):
    assert _errors(tmp_path, _text(top, keys)) == []


def test_a_consumer_that_could_not_be_read_is_still_known_by_name(tmp_path):
    text = "routing: {tts: bad}\naudio_proxy: worse\nconsumers:\n  bad: {url: 5}\n  worse: 5"
    keys = [key for key, _ in _errors(tmp_path, text)]
    assert keys == ["routing.tts", "consumers.bad.url", "consumers.worse"]

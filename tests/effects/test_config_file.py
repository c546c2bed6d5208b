"""The user's file becomes settings, or says everything that is wrong with it, and where."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgpu_effects.config_file import ConfigError, ConfigErrors, load_settings
from mgpu_effects.settings import (
    AuthSettings,
    ConsumerSettings,
    DriverSettings,
    Endpoint,
    GpuSettings,
    ProcessSettings,
    Settings,
    Step,
    SystemdSettings,
    WorkEndpoint,
)

URL = "http://127.0.0.1:9000"
HASH = "ab" * 32


@pytest.fixture
def load(tmp_path):
    """Give a function that writes a text to a file and loads that."""

    def load(text: str, **environ: str) -> Settings:
        file = tmp_path / "consumers.yaml"
        file.write_text(text)
        return load_settings(file, environ)

    return load


@pytest.fixture
def errors_of(load):
    """Give a function that loads a text and gives the errors."""

    def errors_of(text: str, **environ: str) -> tuple[ConfigError, ...]:
        with pytest.raises(ConfigErrors) as raised:
            load(text, **environ)
        return raised.value.errors

    return errors_of


@pytest.fixture
def consumer(load):
    """Give a function that loads a file with one consumer that has these keys."""

    def consumer(keys: str, **environ: str) -> ConsumerSettings:
        text = f"consumers: {{a: {{url: '{URL}', {keys}}}}}"
        return load(text, **environ).consumers["a"]

    return consumer


# ------------------------------------------------------------------------------------ good files


def test_a_key_left_out_has_its_default(load):
    assert load("{}") == Settings()


def test_a_consumer_takes_its_name_from_its_key(consumer):
    assert consumer("") == ConsumerSettings(name="a", url=URL)


def test_listen_may_be_one_address_or_a_list(load):
    assert load("listen: '[::1]:80'").listen == ("[::1]:80",)
    assert load("listen: [127.0.0.1:80, localhost:81]").listen == ("127.0.0.1:80", "localhost:81")


def test_auth_may_be_the_word_open_or_a_mapping(load):
    assert load("auth: open").auth == AuthSettings(open=True)
    keys = load(f"auth: {{keys: [{{name: me, hash: {HASH}, admin: true}}]}}").auth.keys
    assert [(key.name, key.hash, key.admin) for key in keys] == [("me", HASH, True)]


def test_one_gpu_may_be_written_without_a_list(load):
    one = (GpuSettings(total_mib=16384, cushion_mib=0),)
    assert load("gpu: {total_mib: 16384, cushion_mib: 0}").gpus == one
    assert load("gpus: [{total_mib: 16384, cushion_mib: 0}]").gpus == one


def test_a_gpu_counts_by_its_index_or_by_its_place(load):
    gpus = load("gpus: [{uuid: GPU-a}, {index: 7}, {uuid: GPU-c}]").gpu_by_index
    assert {index: gpu.uuid for index, gpu in gpus.items()} == {0: "GPU-a", 7: None, 2: "GPU-c"}


def test_unload_and_load_may_be_one_step_or_several(consumer):
    steps = consumer(
        "unload: {path: /free, body: {all: true, n: [1, 2.5, null]}},"
        "load: [{path: /a, method: GET}, {path: /b, body: 'x', ok: [200, 409], timeout_s: 0.5}]"
    )
    assert steps.unload == (Step(path="/free", body={"all": True, "n": (1, 2.5, None)}),)
    assert steps.load == (
        Step(path="/a", method="GET"),
        Step(path="/b", body="x", ok=(200, 409), timeout_s=0.5),
    )


def test_work_is_posted_and_health_is_asked_for_unless_the_file_says_otherwise(consumer):
    both = consumer("health: {path: /up}, paths: {tts: {path: /say}, llm: {path: /l, method: PUT}}")
    assert both.health == Endpoint(path="/up", method="GET")
    assert both.paths["tts"] == WorkEndpoint(path="/say", method="POST")
    assert both.paths["llm"].method == "PUT"


@pytest.mark.parametrize(
    ("written", "read"),
    [("0", 0), ("{0: 8000, 1: 9000}", {0: 8000, 1: 9000}), ("none", "none"), ("'none'", "none")],
)
def test_gpu_may_be_a_number_a_mapping_or_none(load, written, read):
    text = (
        f"{{gpus: [{{index: 0}}, {{index: 1}}], consumers: {{a: {{url: {URL}, gpu: {written}}}}}}}"
    )
    assert load(text).consumers["a"].gpu == read


def test_a_footprint_may_be_left_to_measuring(consumer):
    assert consumer("vram_resident_mib: auto").vram_resident_mib == "auto"
    assert consumer("vram_resident_mib: 2e3").vram_resident_mib == 2000


def test_a_command_may_be_one_line_or_a_list(consumer):
    line = consumer("driver: {process: {command: 'serve --name \"my voice\"'}}").driver
    words = consumer("driver: {process: {command: [serve, --name, my voice]}}").driver
    process = ProcessSettings(command=("serve", "--name", "my voice"))
    assert line == words == DriverSettings(process=process)


def test_systemd_unit_is_short_for_the_systemd_driver(consumer):
    short = consumer("systemd_unit: a.service")
    assert short.driver == DriverSettings(systemd=SystemdSettings(unit="a.service"))


def test_systemd_unit_may_repeat_what_the_driver_says(consumer):
    both = consumer("systemd_unit: a.service, driver: {systemd: {unit: a.service, user: true}}")
    assert both.driver == DriverSettings(systemd=SystemdSettings(unit="a.service", user=True))


def test_text_takes_variables_of_the_environment(consumer):
    secret = consumer(
        "headers: {Authorization: 'Bearer ${env:TOKEN}'},"
        "unload: {path: /u, body: {key: '${env:KEY}'}},"
        "driver: {process: {command: 'run --key ${env:KEY}', env: {A: '$HOME ${env}'}}}",
        TOKEN="t",
        KEY="two words",
    )
    assert secret.headers == {"Authorization": "Bearer t"}
    assert secret.unload[0].body == {"key": "two words"}
    assert secret.driver.process.env == {"A": "$HOME ${env}"}


def test_what_comes_from_the_environment_cannot_become_a_further_word_of_a_command(consumer):
    command = "driver: {process: {command: 'run ${env:KEY}'}}"
    assert consumer(command, KEY="a b").driver.process.command == ("run", "a b")


def test_mappings_may_be_merged_and_own_keys_win(load):
    merged = load(
        f"""
consumers:
  a: &voice
    url: {URL}
    priority: 3
    max_pending: 5
  b:
    <<: *voice
    url: http://127.0.0.1:9001
    priority: 4
"""
    ).consumers["b"]
    assert (merged.name, merged.url) == ("b", "http://127.0.0.1:9001")
    assert (merged.priority, merged.max_pending) == (4, 5)


# ------------------------------------------------------------------------------- single mistakes

# What is written as keys of the consumer `a`; the dotted key that is blamed; words of the message.
WRONG_KEYS = [
    ("heath: {path: /}", "consumers.a.heath", "unknown key, did you mean health?"),
    ("heath: {path: /}", "consumers.a.heath", "allowed: url, preset, health"),
    ("health: {path: /, methd: GET}", "consumers.a.health.methd", "did you mean method?"),
    ("health: {method: GET}", "consumers.a.health", "path is missing"),
    ("health: {path: up}", "consumers.a.health.path", "begins with /"),
    ("health: /up", "consumers.a.health", "must be a mapping, not '/up'"),
    ("health: {path: /, method: get}", "consumers.a.health.method", "GET, HEAD, POST"),
    ("paths: {speech: {path: /}}", "consumers.a.paths.speech", "tts, stt, llm, image, /v1/"),
    ("priority: 5", "consumers.a.priority", "a whole number from 0 to 4, not the number 5"),
    ("priority: -1", "consumers.a.priority", "from 0 to 4"),
    ("priority: high", "consumers.a.priority", "not 'high'"),
    ("priority: '2'", "consumers.a.priority", "not '2'"),
    ("priority: 2.5", "consumers.a.priority", "a whole number"),
    ("priority: true", "consumers.a.priority", "not true without quotes"),
    ("priority: null", "consumers.a.priority", "not null without quotes"),
    ("max_concurrency: 0", "consumers.a.max_concurrency", "from 1"),
    ("vram_resident_mib: -1", "consumers.a.vram_resident_mib", "from 0"),
    ("vram_resident_mib: much", "consumers.a.vram_resident_mib", "or auto"),
    ("idle_unload_s: 0", "consumers.a.idle_unload_s", "from 0.001"),
    ("timeout_s: {idle: .inf}", "consumers.a.timeout_s.idle", "a number"),
    ("timeout_s: {idle: .nan}", "consumers.a.timeout_s.idle", "a number"),
    ("pinned: yes", "consumers.a.pinned", "true or false"),
    ("gpu: {}", "consumers.a.gpu", "not empty"),
    ("gpu: -1", "consumers.a.gpu", "from 0"),
    ("gpu: all", "consumers.a.gpu", "or none, not 'all'"),
    ("gpu: {zero: 1}", "consumers.a.gpu.zero", "the key must be a whole number"),
    ("headers: {'a b': c}", "consumers.a.headers.a b", "the name of a header"),
    ('headers: {A: "b\\nc"}', "consumers.a.headers.A", "one line"),
    ("headers: {A: 5}", "consumers.a.headers.A", "not the number 5"),
    ("can_coexist_with: b", "consumers.a.can_coexist_with", "a list"),
    ("unload: {path: /u, body: [1]}", "consumers.a.unload.body", "not a list"),
    ("unload: {path: /u, body: {a: .inf}}", "consumers.a.unload.body.a", "anything"),
    ("unload: {path: /u, body: {a: 2024-01-01}}", "consumers.a.unload.body.a", "the date"),
    ("unload: [{path: /u}, {path: /v, ok: [999]}]", "consumers.a.unload[1].ok[0]", "100 to 599"),
    ("unload: &u {path: /u, body: {a: *u}}", "consumers.a.unload.body.a", "contains itself"),
    ("driver: {}", "consumers.a.driver", "exactly one"),
    (
        "driver: {process: {command: x}, systemd: {unit: x}}",
        "consumers.a.driver",
        "exactly one of its keys",
    ),
    ("driver: {proces: {command: x}}", "consumers.a.driver.proces", "did you mean process?"),
    ("driver: {process: {command: []}}", "consumers.a.driver.process.command", "not empty"),
    ("driver: {process: {command: [a, 5]}}", "consumers.a.driver.process.command[1]", "text"),
    ("driver: {process: {command: 'a \"b'}}", "consumers.a.driver.process.command", "quotation"),
    (
        "driver: {process: {command: x, stop_signal: SIGTERM}}",
        "consumers.a.driver.process.stop_signal",
        "TERM, INT, QUIT",
    ),
    ("driver: {container: {name: --all}}", "consumers.a.driver.container.name", "a name of"),
    ("driver: {container: {name: 'a b'}}", "consumers.a.driver.container.name", "a name of"),
    (
        "driver: {container: {name: x, engine: lxc}}",
        "consumers.a.driver.container.engine",
        "docker or podman",
    ),
    ("preset: olama", "consumers.a.preset", "did you mean ollama?"),
    ("preset: zzz", "consumers.a.preset", "must be automatic1111, comfyui"),
    ("preset: [piper]", "consumers.a.preset", "must be"),
    ("models: ['a b']", "consumers.a.models[0]", "the name of a model"),
    ("models: {x: {gpus: 0}}", "consumers.a.models.x.gpus", "did you mean gpu?"),
    ("passive: [ws]", "consumers.a.passive[0]", "a path such as /ws, GET /view/*"),
    ("passive: ['FETCH /x']", "consumers.a.passive[0]", "a path such as /ws, GET /view/*"),
    ("front: 70000", "consumers.a.front", "from 1 to 65535"),
    ("front: 8770", "consumers.a.front", "is taken already, by listen"),
    ("front: 9000", "consumers.a.url", "is the broker's own address"),
    ("residency: cuda", "consumers.a.residency", "must be a mapping or nvml or assumed"),
    ("residency: {path: /ps}", "consumers.a.residency", "resident is missing"),
    ("residency: {path: /ps, mib: size}", "consumers.a.residency", "resident is missing"),
    ("residency: {path: /ps, resident: 'a['}", "consumers.a.residency.resident", "breaks off at"),
    (
        "residency: {path: /ps, resident: a, mib: 'summ(@)'}",
        "consumers.a.residency.mib",
        "there is no function summ",
    ),
    (
        "residency: {path: /ps, resident: a, unit: gb}",
        "consumers.a.residency.unit",
        "must be bytes or mib",
    ),
    ("busy: {when: a}", "consumers.a.busy", "path is missing"),
    ("busy: {path: /p, when: '{id}'}", "consumers.a.busy.when", "JMESPath"),
    ("wait_comments_s: 0", "consumers.a.wait_comments_s", "from 0.001"),
    ("on_client_gone: wait", "consumers.a.on_client_gone", "close, drain or job"),
    ("job: {id: a}", "consumers.a.job", "over is missing"),
    ("job: {id: 'a b', over: {path: /q, when: x}}", "consumers.a.job.id", "at character 3"),
    ("job: {id: '{id}', over: {path: /q, when: x}}", "consumers.a.job.id", "JMESPath"),
    (
        "job: {id: a, over: [{path: /q, when: 'lenght(@)'}]}",
        "consumers.a.job.over[0].when",
        "must be a JMESPath expression, not 'lenght(@)': there is no function lenght",
    ),
    ("cwd: 1", "consumers.a.cwd", "unknown key"),
    ("priority: 1, priority: 2", "consumers.a.priority", "given twice, first in line 1"),
    ("headers: {A: '${env:NOPE}'}", "consumers.a.headers.A", "no variable 'NOPE'"),
    ("headers: {A: !secret x}", "consumers.a.headers.A", "no YAML"),
    ("? [x] : y", "consumers.a", "a key must be one word"),
    ("<<: 5", "consumers.a", "<< must name other mappings"),
]


def test_what_is_wrong_with_an_expression_never_shows_what_came_from_the_environment(errors_of):
    job = "{id: a, over: {path: /q, when: '${env:SECRET}'}}"
    (error,) = errors_of(f"consumers: {{a: {{url: '{URL}', job: {job}}}}}", SECRET="hidden(x)")
    assert (error.line, error.column) == (1, 83)
    assert "hidden" not in error.message
    assert "${env:SECRET}" in error.message


@pytest.mark.parametrize(("keys", "key", "words"), WRONG_KEYS)
def test_a_wrong_key_of_a_consumer_is_the_one_error(errors_of, keys, key, words):
    (error,) = errors_of(f"consumers: {{a: {{url: '{URL}', {keys}}}}}")
    assert error.key == key
    assert words in error.message
    assert error.line == 1


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/",
        "127.0.0.1:80",
        "http://",
        "http://a b",
        "http://host:99999",
        "http://me:secret@host",
        "http://host/?q=1",
        "http://host/#x",
        '"http://host\\n"',
        "''",
        "5",
        "null",
    ],
)
def test_a_url_must_be_an_http_url(errors_of, url):
    (error,) = errors_of(f"consumers: {{a: {{url: {url}}}}}")
    assert error.key == "consumers.a.url"
    assert "an http or https URL" in error.message


WRONG_TEXTS = [
    ("", 1, 1, "", "the file is empty"),
    ("# nothing\n", 1, 1, "", "the file is empty"),
    ("[1, 2]", 1, 1, "", "must be a mapping, not a list"),
    ("a: [1", 1, 6, "", "no YAML: expected ',' or ']'"),
    ("probe: {}\n\tx: 1", 2, 1, "", "no YAML"),
    ("probe: *nobody", 1, 8, "", "undefined alias"),
    ("a: 1\n---\nb: 2", 2, 1, "", "another document"),
    ("listen: 127.0.0.1", 1, 9, "listen", "an address such as 127.0.0.1:8770"),
    ("listen: ':8770'", 1, 9, "listen", "an address"),
    ("listen: 127.0.0.1:65536", 1, 9, "listen", "an address"),
    ("listen: 8770", 1, 9, "listen", "not the number 8770"),
    ("listen: []", 1, 1, "listen", "not empty"),
    ("auth: {keys: [{name: a, hash: mgpu_x}]}", 1, 31, "auth.keys[0].hash", "never the key"),
    ("auth: closed", 1, 7, "auth", "open, or a mapping, not 'closed'"),
    ("probe:\n  interval_s: 5\n  intervall: 5", 3, 3, "probe.intervall", "interval_s?"),
    ("probe:\nscheduler: {}", 1, 1, "probe", "must be a mapping, not nothing"),
    ("consumers:\n  'a b':\n    url: http://x", 2, 3, "consumers.a b", "the key must be a name"),
    ("consumers:\n  a:\n    priority: 1", 2, 3, "consumers.a", "url is missing"),
    ("gpus: []", 1, 1, "gpus", "not empty"),
    ("gpu: {}\ngpus: [{}]", 2, 1, "gpus", "gpus and gpu cannot both be given"),
    ("gpu: {sampler: nvidia}", 1, 16, "gpu.sampler", "nvml, nvidia-smi, none or simulated"),
    ("event_log: {fsync: often}", 1, 20, "event_log.fsync", "each or never"),
    ("scheduler: {eviction: fifo}", 1, 23, "scheduler.eviction", "lru or gdsf"),
    ("allowed_origins: [localhost]", 1, 19, "allowed_origins[0]", "http://localhost:3000"),
    ("probe: &p\n  <<: *p", 1, 8, "probe", "<< must name other mappings"),
]


@pytest.mark.parametrize("case", WRONG_TEXTS, ids=lambda case: case[0])
def test_an_error_says_where_and_what(errors_of, case):
    text, *where, words = case
    (error,) = errors_of(text)
    assert [error.line, error.column, error.key] == where
    assert words in error.message


def test_all_errors_come_at_once_in_the_order_of_the_file(errors_of, tmp_path):
    errors = errors_of(
        """\
listen: 0.0.0.0:8770
routing:
  tts: voce
  sst: voice
probe: {failures: 0}
consumers:
  voice:
    url: ftp://127.0.0.1
    prioritty: 1
    headers: {A: '${env:ONE}${env:TWO}'}
    can_coexist_with: [nobody]
  other: {url: 'http://127.0.0.1:9000', gpu: 3}
extra: 1
"""
    )
    assert [(error.line, error.column, error.key) for error in errors] == [
        (1, 9, "listen"),
        (3, 8, "routing.tts"),
        (4, 3, "routing.sst"),
        (5, 19, "probe.failures"),
        (8, 10, "consumers.voice.url"),
        (9, 5, "consumers.voice.prioritty"),
        (10, 18, "consumers.voice.headers.A"),
        (10, 18, "consumers.voice.headers.A"),
        (11, 24, "consumers.voice.can_coexist_with[0]"),
        (12, 46, "consumers.other.gpu"),
        (13, 1, "extra"),
    ]
    assert {error.file for error in errors} == {str(tmp_path / "consumers.yaml")}
    assert str(errors[0]).startswith(f"{tmp_path / 'consumers.yaml'}:1:9: listen: 0.0.0.0 is not")


def test_an_error_never_shows_what_came_from_the_environment(errors_of):
    (error,) = errors_of("consumers: {a: {url: '${env:URL}'}}", URL="http://me:secret@host")
    assert "secret" not in str(error)
    assert "'${env:URL}'" in error.message


def test_nothing_is_concluded_from_what_could_not_be_read(errors_of):
    keys = [error.key for error in errors_of("listen: 0.0.0.0:80\nauth: {kees: []}")]
    assert keys == ["auth.kees"]
    text = "routing: {tts: a}\nconsumers: {a: {url: http://x, paths: {tts: {path: x}}}}"
    assert [error.key for error in errors_of(text)] == ["consumers.a.paths.tts.path"]


@pytest.mark.parametrize("content", [None, b"a: \xff", b"a: \x00"])
def test_a_file_that_cannot_be_read_is_an_error_of_the_same_kind(tmp_path, content):
    file = tmp_path / "consumers.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigErrors) as raised:
        load_settings(file, {})
    assert [(error.file, error.line) for error in raised.value.errors] == [(str(file), 1)]


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text(alphabet="abcgpu :{}[]&*<>!|-?'\"#,01.\n\t", max_size=60))
def test_any_text_is_read_or_refused_with_errors(tmp_path: Path, text: str):
    file = tmp_path / "any.yaml"
    file.write_text(text)
    try:
        load_settings(file, {})
    except ConfigErrors as refused:
        errors = refused.errors
    else:
        return
    assert errors

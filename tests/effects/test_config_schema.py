"""Schema, documentation and reader say the same, and what is shipped is right."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from mgpu_effects.config_docs import markdown
from mgpu_effects.config_file import load_settings
from mgpu_effects.reading import Reader
from mgpu_effects.schema import json_schema
from mgpu_effects.settings import Settings

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([ROOT / "config" / "consumers.yaml", *(ROOT / "config" / "examples").glob("*")])
ENVIRONMENT = {"AUTH": "open", "METHOD": "PUT", "SECRET": "x", "URL": "http://x"}
HASH = "ab" * 32
VALIDATOR = Draft202012Validator(json_schema())


def _data(text: str) -> object:
    """Give the text as an editor gives it to the schema: JSON, where every key is text."""
    return json.loads(json.dumps(YAML(typ="safe", pure=True).load(io.StringIO(text))))


def _readable(text: str) -> bool:
    """Say whether each key by itself is right: what a schema can know."""
    reader = Reader("file", ENVIRONMENT)
    reader.read(text, Settings)
    return not reader.errors


# --------------------------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_each_shipped_file_is_right_for_the_reader_and_for_editors(file):
    assert load_settings(file, {}).consumers
    assert VALIDATOR.is_valid(_data(file.read_text()))


def test_the_shipped_host_is_the_one_of_the_design():
    host = load_settings(ROOT / "config" / "consumers.yaml", {})
    assert host.listen == ("127.0.0.1:8770",)
    assert {name: one.url.rpartition(":")[2] for name, one in host.consumers.items()} == {
        "mvoice": "8766",
        "whisper-server": "8178",
        "ollama": "11434",
        "comfyui": "8188",
    }
    assert host.routing == {"tts": "mvoice", "stt": "mvoice", "llm": "ollama", "image": "comfyui"}
    assert set(host.consumers["mvoice"].paths) == {"tts", "stt"}


def test_the_schema_in_the_repository_is_that_of_the_classes():
    """Made anew by: python -m mgpu_effects.schema > config/consumers.schema.json."""
    Draft202012Validator.check_schema(json_schema())
    written = json.loads((ROOT / "config" / "consumers.schema.json").read_text())
    assert written == json_schema()


def test_the_documentation_in_the_repository_is_that_of_the_classes():
    """Made anew by: python -m mgpu_effects.config_docs > docs/configuration.md."""
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown()


def test_every_key_is_explained():
    definitions = [json_schema(), *json_schema()["$defs"].values()]
    keys = {name: key for each in definitions for name, key in each.get("properties", {}).items()}
    assert "vram_resident_mib" in keys
    assert [name for name, key in keys.items() if not key["description"]] == []


# ------------------------------------------------------------------------- schema and reader agree


def _consumer(keys: str) -> str:
    return f"consumers: {{a: {{url: 'http://h', {keys}}}}}"


GOOD = [
    "{}",
    "listen: 127.0.0.1:8770",
    "listen: ['[::1]:80']",
    "auth: open",
    f"auth: {{open: true, keys: [{{name: a, hash: {HASH}, priority: 4}}]}}",
    "gpu: {max_parallel: null}",
    "gpus: [{index: 0}, {uuid: x}]",
    "scheduler: {overtake_bound: null}",
    "event_log: {fsync: each}",
    "event_log: {fsync: 0.5}",
    "routing: {tts: a, stt: a, llm: a, image: a}",
    _consumer("gpu: {0: 1, 1: 2}"),
    _consumer("gpu: {'0': 1}"),
    _consumer("gpu: none"),
    _consumer("vram_resident_mib: auto"),
    _consumer("vram_resident_mib: 5.0"),
    _consumer("unload: {path: /a, body: {x: {y: [1, null, z]}}}"),
    _consumer("unload: [{path: /a, body: text}]"),
    _consumer("unload: []"),
    _consumer("driver: {process: {command: a b}}"),
    _consumer("driver: {process: {command: [a], env: {B: c}, stop_signal: INT}}"),
    _consumer("driver: {container: {name: x}}"),
    _consumer("driver: {container: {name: x_1.y-z, engine: podman, grace_s: 0, ready_s: 5}}"),
    _consumer("driver: null"),
    _consumer("job: {id: a, over: {path: /a, when: b}}"),
    _consumer("job: {id: a, over: [{path: /a, when: b}, {path: /c, when: d}], cancel: {path: /e}}"),
    _consumer("job: {id: a, over: {path: '/{id}', when: '{id}', ok: [404]}, failed: null}"),
    _consumer("residency: nvml"),
    _consumer("residency: assumed"),
    _consumer("residency: {path: /a, resident: b}"),
    _consumer("residency: {path: /a, resident: b, mib: c, unit: mib}"),
    _consumer("residency: {path: '/{model}', resident: '[?id == {model}]'}"),
    _consumer("busy: {path: /a, when: b}"),
    _consumer("busy: null"),
    _consumer("timeout_s: {total: null}"),
    _consumer("preset: piper"),
    _consumer("preset: comfyui, job: null, unload: []"),
    _consumer("preset: null"),
    _consumer("health: {path: '/${env:SECRET}', method: '${env:METHOD}'}"),
    "consumers: {a: {url: '${env:URL}'}}",
    "auth: ${env:AUTH}",
]

BAD = [
    "[]",
    "unknown: 1",
    "listen: 5",
    "listen: []",
    "listen: 127.0.0.1",
    "listen: 127.0.0.1:65536",
    "auth: shut",
    "auth: {keys: [{name: a}]}",
    "auth: {keys: [{name: a, hash: b}]}",
    f"auth: {{keys: {{name: a, hash: {HASH}}}}}",
    "gpu: []",
    "gpus: []",
    "gpus: {}",
    "{gpu: {}, gpus: [{}]}",
    "gpu: {total_mib: 0}",
    "gpu: {sampler: nvidia}",
    "scheduler: {queue_timeout_s: 0}",
    "scheduler: {when_unfit: cry}",
    "event_log: {fsync: sometimes}",
    "max_body_mib: -1",
    "routing: {speech: a}",
    "routing: {tts: a b}",
    "allowed_origins: ['*']",
    "consumers: {a: {}}",
    "consumers: {a: null}",
    "consumers: {'a b': {url: 'http://h'}}",
    "consumers: {a: {url: h}}",
    _consumer("name: a"),
    _consumer("preset: x"),
    _consumer("models: ['a b']"),
    _consumer("on_client_gone: wait"),
    _consumer("priority: 5"),
    _consumer("priority: '2'"),
    _consumer("priority: 1.5"),
    _consumer("pinned: 1"),
    _consumer("gpu: {}"),
    _consumer("gpu: {a: 1}"),
    _consumer("gpu: {0: -1}"),
    _consumer("gpu: all"),
    _consumer("vram_resident_mib: some"),
    _consumer("paths: {tts: /say}"),
    _consumer("paths: {tts: {path: say}}"),
    _consumer("paths: {tts: {path: /say, method: post}}"),
    _consumer("headers: {A: 1}"),
    _consumer("headers: {'a b': x}"),
    _consumer("unload: {path: /a, body: [x]}"),
    _consumer("unload: {path: /a, ok: [1000]}"),
    _consumer("unload: {method: GET}"),
    _consumer("driver: {}"),
    _consumer("driver: {container: {name: -x}}"),
    _consumer("driver: {container: {engine: podman}}"),
    _consumer("driver: {container: {name: x, engine: lxc}}"),
    _consumer("driver: {process: {command: x}, systemd: {unit: y}}"),
    _consumer("driver: {process: {command: []}}"),
    _consumer("driver: {process: {command: ''}}"),
    _consumer("driver: {process: {command: x, stop_signal: SIGTERM}}"),
    _consumer("can_coexist_with: b"),
    _consumer("timeout_s: {connect: null}"),
    _consumer("residency: null"),
    _consumer("residency: cuda"),
    _consumer("residency: {path: /a}"),
    _consumer("residency: {path: /a, mib: b}"),
    _consumer("residency: {path: /a, resident: b, unit: kib}"),
    _consumer("busy: {path: /a}"),
    _consumer("busy: nvml"),
    _consumer("job: {id: a}"),
    _consumer("job: {id: a, over: []}"),
    _consumer("job: {id: a, over: {path: /a}}"),
    _consumer("job: {over: {path: /a, when: b}}"),
]


@pytest.mark.parametrize("text", GOOD)
def test_both_take_what_is_right(text):
    assert _readable(text)
    assert VALIDATOR.is_valid(_data(text))


@pytest.mark.parametrize("text", BAD)
def test_both_refuse_what_is_wrong(text):
    assert not _readable(text)
    assert not VALIDATOR.is_valid(_data(text))


def _known_keys() -> list[str]:
    schema = json_schema()
    each = [schema, *schema["$defs"].values()]
    known = {key for one in each for key in one.get("properties", {})} | {"tts", "0", "x"}
    return sorted(known - {"id", "when", "resident", "mib"})  # no schema knows JMESPath


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70000),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["open", "none", "auto", "/a", "http://h", "TERM", "a", "127.0.0.1:1", "GET"]),
)
TREES = st.recursive(
    SCALARS,
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(_known_keys()), children, max_size=4)
    ),
    max_leaves=12,
)


def _objects(definition: str) -> st.SearchStrategy:
    """Give mappings with keys of one class, and anything as values."""
    schema = json_schema()
    keys = schema["$defs"][definition] if definition else schema
    return st.dictionaries(st.sampled_from(sorted(keys["properties"])), TREES, max_size=3)


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(
        _objects(""),
        _objects("ConsumerSettings").map(
            lambda keys: {"consumers": {"a": {"url": "http://h"} | keys}}
        ),
        _objects("SchedulerSettings").map(lambda keys: {"scheduler": keys}),
        _objects("GpuSettings").map(lambda keys: {"gpu": keys}),
    )
)
def test_both_agree_about_anything_made_of_known_keys(tree):
    text = json.dumps(tree)
    assert _readable(text) == VALIDATOR.is_valid(_data(text))

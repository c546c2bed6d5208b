"""What needs no GPU: the patterns, and what the presets say of the services' own paths."""

import pytest

from mgpu_effects import presets
from mgpu_effects.passive import is_passive
from mgpu_effects.settings import ConsumerSettings, WorkEndpoint
from tests.support.presets import consumer


def with_patterns(*patterns: str) -> ConsumerSettings:
    tts = WorkEndpoint(path="/tts?voice=a", method="GET")
    return ConsumerSettings(name="a", url="http://h", paths={"tts": tts}, passive=patterns)


@pytest.mark.parametrize(
    ("patterns", "asked", "passive"),
    [
        (("GET *",), "GET /x", True),
        (("GET *",), "HEAD /x", True),
        (("GET *",), "OPTIONS /x", True),
        (("GET *",), "POST /x", False),
        (("GET *",), "GET /tts", False),  # it is in `paths`
        (("*",), "GET /tts", False),
        (("*", "!POST /prompt"), "POST /prompt", False),
        (("*", "!POST /prompt"), "POST /prompts", True),
        (("*", "!/work/*", "GET /work/list"), "GET /work/list", True),
        (("*", "!/work/*", "GET /work/list"), "POST /work/list", False),
        (("/a.b",), "GET /axb", False),
        ((), "GET /x", False),
    ],
)
def test_the_last_pattern_that_fits_decides(
    patterns: tuple[str, ...], asked: str, passive: bool
) -> None:
    method, path = asked.split()
    assert is_passive(with_patterns(*patterns), method, path) is passive


# By preset: what is work, and what is not, by the services' documentation and recordings.
WORK = {
    "automatic1111": ("POST /sdapi/v1/txt2img", "POST /sdapi/v1/img2img", "GET /queue/join"),
    "comfyui": ("POST /prompt", "POST /api/prompt"),
    "faster-whisper-server": ("POST /v1/audio/transcriptions", "POST /v1/audio/translations"),
    "forge": ("POST /sdapi/v1/txt2img", "POST /sdapi/v1/img2img", "GET /queue/join"),
    "koboldcpp": ("POST /api/v1/generate", "POST /v1/chat/completions", "POST /api/extra/tts"),
    "kokoro": ("POST /v1/audio/speech", "POST /dev/captioned_speech"),
    "llama-router": ("POST /v1/embeddings", "POST /infill", "GET /props", "GET /slots"),
    "llama-server": ("POST /completion", "POST /v1/messages"),
    "lm-studio": ("POST /v1/chat/completions", "POST /api/v1/chat"),
    "mvoice": ("POST /tts", "POST /stt"),
    "ollama": ("POST /api/chat", "POST /api/generate", "POST /api/embed", "POST /v1/embeddings"),
    "ollama-own-lru": ("POST /api/chat", "POST /api/embeddings", "POST /v1/messages"),
    "piper": ("POST /synthesize",),
    "speaches": ("POST /v1/audio/speech", "GET /v1/realtime"),
    "tabbyapi": ("POST /v1/completions",),
    "vllm": ("POST /v1/responses", "POST /pooling", "GET /v1/realtime"),
    "whisper-server": ("POST /inference",),
}
PASSIVE = {
    "automatic1111": ("GET /", "GET /sdapi/v1/progress", "POST /sdapi/v1/interrupt"),
    "comfyui": (
        *("GET /", "GET /ws", "GET /api/ws", "GET /api/queue", "GET /view", "GET /prompt"),
        *("POST /upload/image", "POST /api/settings/x", "DELETE /api/userdata/x"),
        *("POST /interrupt", "POST /api/queue", "POST /free", "POST /api/history"),
    ),
    "koboldcpp": ("GET /api/extra/perf", "POST /api/extra/abort"),
    "kokoro": ("GET /v1/audio/voices", "GET /web/"),
    "llama-router": ("GET /models", "GET /v1/models", "GET /health", "GET /"),
    "llama-server": ("GET /slots", "GET /v1/models"),
    "ollama": ("GET /api/tags", "HEAD /", "POST /api/show", "POST /api/pull", "DELETE /api/delete"),
    "speaches": ("GET /v1/models", "GET /api/ps"),
    "vllm": ("GET /v1/models", "GET /metrics"),
    "whisper-server": ("GET /",),
}


@pytest.mark.parametrize("name", WORK)
def test_a_preset_knows_which_paths_are_work(name: str) -> None:
    known = consumer(name)
    told = {asked: is_passive(known, *asked.split()) for asked in WORK[name]}
    assert told == dict.fromkeys(WORK[name], False)
    told = {asked: is_passive(known, *asked.split()) for asked in PASSIVE.get(name, ())}
    assert told == dict.fromkeys(PASSIVE.get(name, ()), True)


def test_every_preset_was_asked() -> None:
    assert tuple(WORK) == presets.names()

"""The six scenarios that must hold, on the core alone: facts of the system this one continues."""

import pytest

from mgpu_core.config import Consumer, Gpu
from tests.core.driver import Core, lazy, service

CARD_16 = (Gpu(total_mib=16_000),)


@pytest.mark.parametrize(
    ("consumer", "expected"),
    [
        (Consumer(name="a", vram_mib={0: 9_000}, vram_managed=True), "resident"),
        (service("a", 2_800), "resident"),
        (lazy("a", 13_000), "absent"),
        (Consumer(name="a", vram_mib={0: 9_000}, driver="systemd"), "resident"),
        (Consumer(name="a", vram_mib={0: 9_000}), "resident"),
    ],
    ids=["vram_managed", "load and unload", "unload only", "systemd unit only", "none"],
)
def test_1_residency_at_the_start_is_assumed_from_what_is_configured(
    consumer: Consumer, expected: str
) -> None:
    core = Core(consumer)
    assert core.residency("a") == expected
    assert core.state.consumers["a"].source.value == "assumed"


def test_2_a_resident_target_evicts_nobody_however_little_is_free() -> None:
    core = Core(service("mvoice", 2_800), service("comfyui", 13_000))
    core.sample(free=0)
    assert core.request("r1", "mvoice") == ["serve r1"]


def test_3_one_unload_and_one_load_bring_the_voice_in_for_the_idle_image_service() -> None:
    core = Core(lazy("comfyui", 13_000), service("mvoice", 2_800), gpus=CARD_16, absent=["mvoice"])
    core.probe("comfyui", resident=True)
    core.sample(free=1_500)
    assert core.request("r1", "mvoice") == ["unload comfyui"]
    assert core.unloaded("comfyui") == []
    assert core.sample(free=14_500) == ["load mvoice"]
    assert core.loaded("mvoice") == ["serve r1"]
    assert core.state.counters.evictions == 1
    assert core.state.counters.loads == 1


def test_4_who_may_stay_beside_the_target_is_no_victim_even_if_used_longest_ago() -> None:
    core = Core(
        lazy("comfyui", 13_000),
        service("ollama", 6_000),
        service("mvoice", 2_800, can_coexist_with=("ollama",)),
        absent=["mvoice"],
    )
    core.probe("comfyui", resident=True)
    core.use("old", "ollama")
    core.use("new", "comfyui")
    core.sample(free=1_500)
    assert core.request("r1", "mvoice") == ["unload comfyui"]
    core.unloaded("comfyui")
    core.sample(free=14_500)
    assert core.loaded("mvoice") == ["serve r1"]
    assert core.history("unload") == ["unload comfyui"]


def test_5_the_first_image_request_evicts_the_voice_before_it_is_forwarded() -> None:
    core = Core(service("mvoice", 2_345), lazy("comfyui", 13_000), gpus=CARD_16)
    core.sample(free=12_600)
    assert core.request("image", "comfyui") == ["unload mvoice"]
    assert core.unloaded("mvoice") == []
    assert core.sample(free=14_950) == ["serve image"]
    # An empty workflow is answered with 400: that is an answer, and nothing was loaded.
    core.finish("image", outcome="ok")
    core.sample(free=14_950)
    assert core.request("speech", "mvoice") == ["load mvoice"]
    assert core.loaded("mvoice") == ["serve speech"]
    assert core.history("reject") == []


def test_6_without_a_gpu_the_static_budget_decides_and_everything_else_works() -> None:
    core = Core(service("a", 10_000), service("b", 10_000), gpus=CARD_16, absent=["b"])
    core.sample_fails()
    assert core.request("r1", "b") == ["unload a"]
    assert core.unloaded("a") == ["load b"]
    assert core.loaded("b") == ["serve r1"]
    core.finish("r1")
    core.sample_fails()
    assert core.request("r2", "a") == ["unload b"]
    core.cancel("r2")
    assert core.unloaded("b") == []
    assert core.state.swaps == {}
    assert core.state.promises == {}


def test_6_with_neither_total_nor_sample_everything_fits_with_a_note() -> None:
    core = Core(service("a", 10_000), service("b", 90_000), gpus=(Gpu(),), absent=["b"])
    assert core.request("r1", "b") == ["load b"]
    assert any(note.consumer == "b" or note.request == "r1" for note in core.last_notes)

"""The three worked examples of docs/design.md, played through the scheduler. Times in seconds."""

from pathlib import Path
from typing import Any

from mgpu_core import Consumer, Gpu, Scheduler
from mgpu_core.config import SECOND_US, Config, config_of
from mgpu_core.effects import Effect, SampleGpu, Serve, StartLoad, StartUnload
from mgpu_core.events import (
    Event,
    GpuReading,
    GpuSample,
    ProbeResult,
    Request,
    ServeDone,
    Started,
    SwapDone,
    Tick,
    UnloadDone,
)
from mgpu_core.state import State
from mgpu_effects.config_file import load_settings
from mgpu_effects.core_config import core_config

EXAMPLES = Path(__file__).parents[1] / "config" / "examples"
TOTAL_MIB, DESKTOP_MIB, VOICE_MIB, WHISPER_MIB = 16384, 768, 2345, 2100


class Player:
    """Plays events, and remembers what came of the last one."""

    def __init__(self, config: Config) -> None:
        self._scheduler = Scheduler(config)
        self.state: State = self._scheduler.initial()

    def play(self, event_type: type[Any], at_s: float, **fields: Any) -> list[Effect]:
        """Give what is to be done, less the wake-ups."""
        event: Event = event_type(at=_us(at_s), **fields)
        transition = self._scheduler.step(self.state, event)
        self.state = transition.state
        wanted = (Serve, StartLoad, StartUnload, SampleGpu)
        return [effect for effect in transition.effects if isinstance(effect, wanted)]

    def ask(self, at_s: float, request: str, consumer: str) -> list[Effect]:
        return self.play(Request, at_s, request=request, consumer=consumer, kind="any")

    def end(self, at_s: float, request: str) -> list[Effect]:
        return self.play(ServeDone, at_s, request=request, outcome="ok")

    def sample(self, at_s: float, used_mib: int, taken_s: float | None = None) -> list[Effect]:
        card = GpuReading(
            index=0, total_mib=TOTAL_MIB, used_mib=used_mib, free_mib=TOTAL_MIB - used_mib
        )
        taken = _us(at_s if taken_s is None else taken_s)
        return self.play(GpuSample, at_s, taken=taken, gpus=(card,))

    def why(self, request: str) -> tuple[str, ...]:
        reason = self.state.reasons[request]
        return (reason.why.value, *reason.who)


def _us(seconds: float) -> int:
    return round(seconds * SECOND_US)


def the_host(**resident: bool) -> Player:
    """The host of four services, after its start and one probe of those that load by themselves."""
    settings = load_settings(EXAMPLES / "four-services-one-card.yaml")
    player = Player(core_config(settings))
    player.play(Started, 0, run="run")
    for name in ("mvoice", "whisper-server"):
        seen = resident.get(name.replace("-", "_"), True)
        player.play(ProbeResult, 0.05, consumer=name, taken=_us(0.05), healthy=True, resident=seen)
    return player


def test_overtaking_is_bounded() -> None:
    voice = Consumer(
        name="mvoice",
        vram_mib={0: VOICE_MIB},
        load_route=True,
        unload_route=True,
        max_concurrency=2,
    )
    pictures = Consumer(name="comfyui", vram_mib={0: 13000}, unload_route=True)
    card = Gpu(total_mib=TOTAL_MIB, reserved_mib=1024)
    player = Player(config_of(voice, pictures, gpus=(card,), overtake_bound=2))

    assert player.ask(0, "r1", "mvoice") == [Serve(request="r1", consumer="mvoice")]
    assert player.ask(1, "r2", "comfyui") == []
    assert player.why("r2") == ("victim_at_work", "mvoice")
    assert player.ask(2, "r3", "mvoice") == [Serve(request="r3", consumer="mvoice")]
    assert player.state.overtaken["r2"] == 1
    player.end(3, "r1")
    assert player.ask(4, "r4", "mvoice") == [Serve(request="r4", consumer="mvoice")]
    assert player.state.overtaken["r2"] == 2
    assert player.ask(5, "r5", "mvoice") == []
    assert player.why("r5") == ("consumer_full", "mvoice")
    assert player.end(6, "r3") == []
    assert player.why("r5") == ("promoted_ahead", "r2")
    assert player.end(7, "r4") == [StartUnload(consumer="mvoice", epoch=1, how="routes")]
    served = player.play(UnloadDone, 8, consumer="mvoice", epoch=1, error=None)
    assert served == [Serve(request="r2", consumer="comfyui")]
    assert player.end(20, "r2") == [StartUnload(consumer="comfyui", epoch=2, how="routes")]
    loaded = player.play(UnloadDone, 21, consumer="comfyui", epoch=2, error=None)
    assert loaded == [StartLoad(consumer="mvoice", epoch=2)]
    served = player.play(SwapDone, 25, consumer="mvoice", epoch=2, error=None)
    assert served == [Serve(request="r5", consumer="mvoice")]


def test_a_swap_waits_until_memory_is_seen_free() -> None:
    player = the_host()
    full_mib = DESKTOP_MIB + VOICE_MIB + WHISPER_MIB
    player.sample(0.1, full_mib)

    assert player.ask(1, "r1", "comfyui") == [StartUnload(consumer="mvoice", epoch=1, how="routes")]
    assert player.state.promises["comfyui"].mib == {0: 13000}
    assert player.ask(1.1, "r2", "mvoice") == []
    answered = player.play(UnloadDone, 1.2, consumer="mvoice", epoch=1, error=None)
    assert answered == [SampleGpu()]
    assert player.sample(1.35, full_mib, taken_s=1.15) == []
    assert player.sample(1.5, full_mib, taken_s=1.45) == [SampleGpu()]
    assert player.play(Tick, 1.75) == [SampleGpu()]
    free = player.sample(1.9, full_mib - VOICE_MIB, taken_s=1.8)
    assert free == [Serve(request="r1", consumer="comfyui")]
    player.sample(3.9, 7000)
    player.sample(5.9, 12000)
    assert "comfyui" in player.state.promises
    player.sample(7.9, DESKTOP_MIB + WHISPER_MIB + 13000)
    assert "comfyui" not in player.state.promises

    for at_s in range(9, 21):
        player.sample(at_s, DESKTOP_MIB + WHISPER_MIB + 13000)
    assert player.end(21, "r1") == [StartUnload(consumer="comfyui", epoch=2, how="routes")]
    answered = player.play(UnloadDone, 21.2, consumer="comfyui", epoch=2, error=None)
    assert answered == [SampleGpu()]
    player.sample(21.4, DESKTOP_MIB + WHISPER_MIB + 13000, taken_s=21.3)
    free = player.sample(21.7, DESKTOP_MIB + WHISPER_MIB + 500)
    assert free == [StartLoad(consumer="mvoice", epoch=2)]
    served = player.play(SwapDone, 26, consumer="mvoice", epoch=2, error=None)
    assert served == [Serve(request="r2", consumer="mvoice")]


def test_memory_that_is_promised_is_not_sold_again() -> None:
    player = the_host(whisper_server=False)
    player.sample(0.1, DESKTOP_MIB + VOICE_MIB)

    assert player.ask(1, "r1", "comfyui") == [Serve(request="r1", consumer="comfyui")]
    player.sample(2.1, DESKTOP_MIB + VOICE_MIB + 4000)
    # 9,271 MiB are free by the card, and 2,356 would do.
    assert player.ask(3, "r2", "whisper-server") == []
    assert player.why("r2") == ("victim_at_work", "comfyui")
    player.sample(6.1, DESKTOP_MIB + VOICE_MIB + 12950)
    assert "comfyui" in player.state.promises
    player.sample(8.1, DESKTOP_MIB + VOICE_MIB + 13000)
    assert "comfyui" not in player.state.promises

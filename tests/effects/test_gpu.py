import asyncio
import json
import os
import stat
import threading
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from mgpu_core.events import GpuReading
from mgpu_effects import gpu
from mgpu_effects.gpu import (
    GpuProcess,
    NvidiaSmiSampler,
    NvmlSampler,
    SampleError,
    make_sampler,
)
from mgpu_effects.settings import GpuSettings

MIB = 2**20
FIRST, SECOND = "GPU-8f0e", "GPU-11aa"


def reading(index: int, total: int, used: int, free: int) -> GpuReading:
    return GpuReading(index=index, total_mib=total, used_mib=used, free_mib=free)


async def code_of(sampler) -> str:
    with pytest.raises(SampleError) as raised:
        await sampler.read()
    return raised.value.code


class FakeNvml:
    """The library behind pynvml: two cards, and faults on demand. Names are pynvml's own."""

    nvmlMemory_v2 = pynvml.nvmlMemory_v2  # noqa: N815

    def __init__(self) -> None:
        self.cards = {FIRST: (24576, 300, 4096), SECOND: (8192, 0, 1024)}  # total, reserved, used
        self.fault: type[pynvml.NVMLError] | None = None
        self.old = False
        self.initialised = 0
        self.inits = 0
        self.hold: threading.Event | None = None
        # (uuid, pid, MiB or None) of what computes and of what draws.
        self.running: dict[str, list[tuple[str, int, int | None]]] = {"Compute": [], "Graphics": []}

    def __getattr__(self, name: str) -> object:
        assert name.startswith("NVMLError")
        return getattr(pynvml, name)

    def nvmlInit(self) -> None:  # noqa: N802
        self._may_fail()
        self.initialised += 1
        self.inits += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.initialised -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        self._may_fail()
        if index >= len(self.cards):
            raise pynvml.NVMLError_InvalidArgument
        return list(self.cards)[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.cards:
            raise pynvml.NVMLError_NotFound
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> object:  # noqa: N802
        if self.hold:
            assert self.hold.wait(20)
        if self.old and version:
            raise pynvml.NVMLError_FunctionNotFound
        total, reserved, used = (n * MIB for n in self.cards[handle])
        free = total - reserved - used
        return SimpleNamespace(total=total, used=used if version else used + reserved, free=free)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[object]:  # noqa: N802
        return self._running("Compute", handle, "" if not self.old else "_v3")

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: str) -> list[object]:  # noqa: N802
        return self._running("Graphics", handle, "" if not self.old else "_v3")

    def nvmlDeviceGetComputeRunningProcesses_v2(self, handle: str) -> list[object]:  # noqa: N802
        return self._running("Compute", handle, "_v2")

    def nvmlDeviceGetGraphicsRunningProcesses_v2(self, handle: str) -> list[object]:  # noqa: N802
        return self._running("Graphics", handle, "_v2")

    def _running(self, kind: str, handle: str, version: str) -> list[object]:
        self._may_fail()
        if version == "_v3":
            raise pynvml.NVMLError_FunctionNotFound
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=None if mib is None else mib * MIB)
            for card, pid, mib in self.running[kind]
            if card == handle
        ]

    def _may_fail(self) -> None:
        if self.fault:
            raise self.fault


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setattr(gpu, "pynvml", fake)
    return fake


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program of that name first on the PATH; it is given as lines of shell."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def put(lines: str) -> Path:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\n{lines}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return script

    return put


@pytest.fixture
def no_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))


async def test_nvml_reads_the_configured_cards_by_index_and_by_uuid(nvml):
    cards = (GpuSettings(index=0, sampler="nvml"), GpuSettings(index=5, uuid=SECOND))
    sampler = make_sampler(cards)
    assert await sampler.read() == (reading(0, 24576, 4096, 20180), reading(5, 8192, 1024, 7168))
    await sampler.close()
    assert nvml.initialised == 0


async def test_a_card_without_an_index_has_its_place_in_the_list(nvml):
    cards = (GpuSettings(uuid=SECOND, sampler="nvml"), GpuSettings(uuid=FIRST))
    readings = await make_sampler(cards).read()
    assert [(r.index, r.total_mib) for r in readings] == [(0, 8192), (1, 24576)]


async def test_an_old_driver_that_counts_its_reserve_as_used_will_do(nvml):
    nvml.old = True
    sampler = make_sampler((GpuSettings(sampler="nvml"),))
    assert await sampler.read() == (reading(0, 24576, 4396, 20180),)


async def test_nvml_that_vanishes_and_returns_is_initialised_anew(nvml):
    sampler = make_sampler((GpuSettings(sampler="nvml"),))
    assert len(await sampler.read()) == 1
    assert len(await sampler.read()) == 1
    assert nvml.inits == 1
    nvml.fault = pynvml.NVMLError_GpuIsLost
    assert await code_of(sampler) == "nvml_failed"
    nvml.fault = pynvml.NVMLError_DriverNotLoaded
    assert await code_of(sampler) == "nvml_missing"
    nvml.fault = None
    assert len(await sampler.read()) == 1
    assert (nvml.inits, nvml.initialised) == (2, 1)


@pytest.mark.parametrize("card", [GpuSettings(index=7), GpuSettings(uuid="GPU-none")])
async def test_a_card_that_nvml_does_not_know(nvml, card):
    sampler = make_sampler((GpuSettings(sampler="nvml"), card))
    assert await code_of(sampler) == "no_such_gpu"


async def test_a_hanging_nvml_is_a_timeout_and_its_late_answer_nobodys(nvml):
    sampler = NvmlSampler((gpu.CardId(0),), timeout_s=0.2)
    nvml.hold = threading.Event()
    assert await code_of(sampler) == "timeout"
    assert await code_of(sampler) == "timeout"
    nvml.cards[FIRST] = (24576, 300, 9999)
    nvml.hold.set()
    async with asyncio.timeout(20):
        while True:
            try:
                assert await sampler.read() == (reading(0, 24576, 9999, 14277),)
                break
            except SampleError:
                await asyncio.sleep(0.01)


async def test_readings_at_the_same_time_do_not_disturb_each_other(nvml):
    sampler = make_sampler((GpuSettings(sampler="nvml"),))
    first, second = await asyncio.gather(sampler.read(), sampler.read())
    assert first == second
    assert nvml.inits == 1


async def test_nvidia_smi_is_asked_for_the_configured_cards(nvidia_smi, tmp_path):
    nvidia_smi(
        f'echo "$@" >{tmp_path}/arguments\n'
        f"echo '0, {FIRST}, 24576, 4096, 20180'\n"
        f"echo '1, {SECOND}, 8192, 1024, 7168'"
    )
    cards = (GpuSettings(uuid=SECOND, sampler="nvidia-smi"), GpuSettings(index=0, uuid=FIRST))
    assert await make_sampler(cards[:1]).read() == (reading(0, 8192, 1024, 7168),)
    by_index = (GpuSettings(index=1, sampler="nvidia-smi"), GpuSettings(index=0))
    assert [r.total_mib for r in await make_sampler(by_index).read()] == [8192, 24576]
    assert (tmp_path / "arguments").read_text().split() == [
        "--query-gpu=index,uuid,memory.total,memory.used,memory.free",
        "--format=csv,noheader,nounits",
    ]


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (
            "echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9",
            "nvidia_smi_failed",
        ),
        ("echo '0, GPU-8f0e, [N/A], [N/A], [N/A]'", "nvidia_smi_failed"),
        ("echo 'No devices were found'", "nvidia_smi_failed"),
        ("true", "no_such_gpu"),
        ("echo '3, GPU-11aa, 1, 1, 1'", "no_such_gpu"),
    ],
)
async def test_an_nvidia_smi_that_fails_has_a_code(nvidia_smi, lines, code):
    nvidia_smi(lines)
    assert await code_of(make_sampler((GpuSettings(sampler="nvidia-smi"),))) == code


async def test_a_hanging_nvidia_smi_is_killed_with_its_children(nvidia_smi, tmp_path):
    nvidia_smi(f"sleep 300 & echo $! >{tmp_path}/child\nwait")
    assert await code_of(NvidiaSmiSampler((gpu.CardId(0),), timeout_s=1)) == "timeout"
    child = (tmp_path / "child").read_text().strip()
    async with asyncio.timeout(20):
        while alive(child):  # noqa: ASYNC110 - it is another process that changes
            await asyncio.sleep(0.02)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def test_auto_prefers_nvml(nvml, nvidia_smi):
    nvidia_smi("exit 1")
    assert await make_sampler((GpuSettings(),)).read() == (reading(0, 24576, 4096, 20180),)


async def test_auto_takes_nvidia_smi_while_nvml_fails(nvml, nvidia_smi):
    nvidia_smi(f"echo '0, {FIRST}, 24576, 1, 2'")
    sampler = make_sampler((GpuSettings(),))
    nvml.fault = pynvml.NVMLError_LibRmVersionMismatch
    assert await sampler.read() == (reading(0, 24576, 1, 2),)
    nvml.fault = None
    assert await sampler.read() == (reading(0, 24576, 4096, 20180),)


async def test_auto_on_a_host_without_a_gpu(nvml, no_nvidia_smi):
    nvml.fault = pynvml.NVMLError_LibraryNotFound
    assert await code_of(make_sampler((GpuSettings(),))) == "no_gpu"


async def test_auto_tells_what_ails_nvml_where_there_is_nothing_else(nvml, no_nvidia_smi):
    nvml.fault = pynvml.NVMLError_Unknown
    assert await code_of(make_sampler((GpuSettings(),))) == "nvml_failed"


async def test_none_never_has_a_reading():
    assert await code_of(make_sampler((GpuSettings(sampler="none"),))) == "no_gpu"


async def test_simulated_reads_its_file_each_time(tmp_path, monkeypatch):
    told = tmp_path / "gpu.json"
    monkeypatch.setenv("MGPU_SIMULATED_GPU", str(told))
    sampler = make_sampler((GpuSettings(sampler="simulated"), GpuSettings(uuid=SECOND)))
    card = {"total_mib": 24576, "used_mib": 4096, "free_mib": 20480}
    told.write_text(json.dumps({"gpus": [{"index": 0, **card}, {"index": 1, **card}]}))
    assert await sampler.read() == (reading(0, 24576, 4096, 20480), reading(1, 24576, 4096, 20480))
    told.write_text(json.dumps({"error": "nvml_failed"}))
    assert await code_of(sampler) == "nvml_failed"
    told.write_text(json.dumps({"gpus": [{"index": 0, **card}]}))
    assert await code_of(sampler) == "no_such_gpu"
    told.write_text("{")
    assert await code_of(sampler) == "simulated_failed"
    told.unlink()
    assert await code_of(sampler) == "simulated_failed"


# ---------------------------------------------------------------------------- who holds the memory


@pytest.mark.parametrize("old", [False, True])
async def test_nvml_lists_who_computes_and_who_draws_once_for_each_card(nvml, old):
    nvml.old = old
    nvml.running["Compute"] = [(FIRST, 10, 5000), (FIRST, 11, 700), (SECOND, 10, 300)]
    nvml.running["Graphics"] = [(FIRST, 11, 700), (FIRST, 12, 90)]
    cards = (GpuSettings(index=0, sampler="nvml"), GpuSettings(index=5, uuid=SECOND))
    assert await make_sampler(cards).processes() == (
        GpuProcess(0, 10, 5000),
        GpuProcess(0, 11, 700),
        GpuProcess(0, 12, 90),
        GpuProcess(5, 10, 300),
    )


async def test_memory_that_the_driver_does_not_tell_is_unknown(nvml):
    nvml.running["Compute"] = [(FIRST, 10, None), (FIRST, 11, 100), (FIRST, 11, None)]
    nvml.running["Graphics"] = [(FIRST, 10, 20)]
    processes = await make_sampler((GpuSettings(sampler="nvml"),)).processes()
    assert processes == (GpuProcess(0, 10, None), GpuProcess(0, 11, None))


async def test_the_parts_of_a_divided_card_add_up(nvml):
    nvml.running["Compute"] = [(FIRST, 10, 300), (FIRST, 10, 200)]
    assert await make_sampler((GpuSettings(),)).processes() == (GpuProcess(0, 10, 500),)


async def test_a_driver_that_tells_nothing_about_processes(nvml, no_nvidia_smi):
    nvml.fault = pynvml.NVMLError_NotSupported
    with pytest.raises(SampleError, match="not_supported"):
        await make_sampler((GpuSettings(),)).processes()


async def test_nvidia_smi_lists_who_computes(nvidia_smi):
    nvidia_smi(
        'case "$1" in\n'
        f"*gpu=*) echo '0, {FIRST}, 24576, 4096, 20180'; echo '1, {SECOND}, 8192, 1, 8191';;\n"
        f"*apps=*) echo '{SECOND}, 10, 300'; echo '{FIRST}, 11, [N/A]'; echo 'GPU-x, 12, 5';;\n"
        "esac"
    )
    cards = (GpuSettings(index=0, sampler="nvidia-smi"), GpuSettings(index=7, uuid=SECOND))
    processes = await make_sampler(cards).processes()
    assert processes == (GpuProcess(7, 10, 300), GpuProcess(0, 11, None))


async def test_nvidia_smi_may_say_that_nobody_is_there(nvidia_smi):
    nvidia_smi(
        'case "$1" in\n'
        f"*gpu=*) echo '0, {FIRST}, 24576, 4096, 20180';;\n"
        "*apps=*) echo 'No running processes found';;\n"
        "esac"
    )
    assert await make_sampler((GpuSettings(sampler="nvidia-smi"),)).processes() == ()


async def test_a_simulated_card_may_have_processes(tmp_path, monkeypatch):
    told = tmp_path / "gpu.json"
    monkeypatch.setenv("MGPU_SIMULATED_GPU", str(told))
    sampler = make_sampler((GpuSettings(sampler="simulated"),))
    told.write_text(json.dumps({"gpus": []}))
    assert await sampler.processes() == ()
    process = {"index": 0, "pid": 10, "mib": 300}
    told.write_text(json.dumps({"gpus": [], "processes": [process]}))
    assert await sampler.processes() == (GpuProcess(0, 10, 300),)


async def test_the_real_library_answers_with_a_reading_or_a_code():
    sampler = make_sampler((GpuSettings(sampler="nvml"),))
    try:
        answer = (await sampler.read())[0].total_mib
    except SampleError as error:
        answer = error.code
    await sampler.close()
    assert answer in {"nvml_missing", "nvml_failed", "no_such_gpu"} or answer > 0

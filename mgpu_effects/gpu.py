"""How much memory each card has free, measured: NVML, else nvidia-smi, else nobody can tell.

Codes of a failed sample: `no_gpu` (nothing here that could be asked), `no_such_gpu` (a configured
card is not there), `nvml_missing`, `nvml_failed`, `nvidia_smi_missing`, `nvidia_smi_failed`,
`timeout`, `simulated_failed`, and whatever a simulation asks for.
"""

import asyncio
import concurrent.futures
import contextlib
import csv
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pynvml
from attrs import frozen

from mgpu_core.events import GpuReading
from mgpu_effects.commands import run_command
from mgpu_effects.settings import GpuSettings, SamplerName, gpu_numbers

SIMULATED_GPU = "MGPU_SIMULATED_GPU"
_NVML_TIMEOUT_S = 2.0
_NVIDIA_SMI_TIMEOUT_S = 5.0  # without nvidia-persistenced it wakes the card first
_NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=index,uuid,memory.total,memory.used,memory.free",
    "--format=csv,noheader,nounits",
)


class SampleError(Exception):
    """There is no reading; `code` says why."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Sampler(Protocol):
    async def read(self) -> tuple[GpuReading, ...]:
        """Read every configured card, in the order of the configuration. Raises SampleError."""

    async def close(self) -> None:
        """Let go of the library or process behind it."""


@frozen
class CardId:
    """A configured card: found by uuid where one is given, and `index` is its name in the core."""

    index: int
    uuid: str | None = None


def make_sampler(gpus: Sequence[GpuSettings]) -> Sampler:
    """Make the sampler that the first card names; one sampler reads all cards."""
    uuids = (gpu.uuid for gpu in gpus)
    cards = tuple(map(CardId, gpu_numbers(gpus), uuids))
    return _SAMPLERS[gpus[0].sampler](cards)


class NvmlSampler:
    """The driver's own library. It blocks, so each reading has a thread and a time limit."""

    def __init__(self, cards: Sequence[CardId], timeout_s: float = _NVML_TIMEOUT_S) -> None:
        self._cards = cards
        self._timeout_s = timeout_s
        self._initialised = False
        self._lock = asyncio.Lock()
        self._reading: asyncio.Future[tuple[GpuReading, ...]] | None = None

    async def read(self) -> tuple[GpuReading, ...]:
        async with self._lock:
            # No second thread beside one that hangs, and its late answer is nobody's: it is old.
            if self._hangs():
                raise SampleError("timeout")
            self._reading = _in_thread(self._read)
            done, _ = await asyncio.wait((self._reading,), timeout=self._timeout_s)
            if not done:
                raise SampleError("timeout")
            return self._reading.result()

    async def close(self) -> None:
        if not self._hangs():
            self._shut_down()

    def _hangs(self) -> bool:
        return self._reading is not None and not self._reading.done()

    def _read(self) -> tuple[GpuReading, ...]:
        try:
            if not self._initialised:
                pynvml.nvmlInit()
                self._initialised = True
            return tuple(self._read_card(card) for card in self._cards)
        except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded) as error:
            self._shut_down()
            raise SampleError("nvml_missing") from error
        except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument) as error:
            raise SampleError("no_such_gpu") from error
        except pynvml.NVMLError as error:
            # The driver may have been unloaded or reset: the next reading starts from scratch.
            self._shut_down()
            raise SampleError("nvml_failed") from error

    def _read_card(self, card: CardId) -> GpuReading:
        if card.uuid is None:
            handle = pynvml.nvmlDeviceGetHandleByIndex(card.index)
        else:
            handle = pynvml.nvmlDeviceGetHandleByUUID(card.uuid)
        memory = _nvml_memory(handle)
        total, used, free = (n // 2**20 for n in (memory.total, memory.used, memory.free))
        return GpuReading(index=card.index, total_mib=total, used_mib=used, free_mib=free)

    def _shut_down(self) -> None:
        if self._initialised:
            self._initialised = False
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()


def _nvml_memory(handle: object) -> Any:
    """Prefer the second version: the first one counts what the driver reserves as used."""
    try:
        return pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except pynvml.NVMLError_FunctionNotFound:
        return pynvml.nvmlDeviceGetMemoryInfo(handle)


def _in_thread(
    function: Callable[[], tuple[GpuReading, ...]],
) -> "asyncio.Future[tuple[GpuReading, ...]]":
    """Run in a daemon thread: one stuck in the driver must not hold up the end of the broker."""
    future: concurrent.futures.Future[tuple[GpuReading, ...]] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is awaited
            future.set_exception(error)

    threading.Thread(target=run, name="nvml", daemon=True).start()
    reading = asyncio.wrap_future(future)
    reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if late
    return reading


class NvidiaSmiSampler:
    """The driver's command, for hosts where its library can't be loaded."""

    def __init__(self, cards: Sequence[CardId], timeout_s: float = _NVIDIA_SMI_TIMEOUT_S) -> None:
        self._cards = cards
        self._timeout_s = timeout_s

    async def read(self) -> tuple[GpuReading, ...]:
        if shutil.which(_NVIDIA_SMI[0]) is None:
            raise SampleError("nvidia_smi_missing")
        try:
            output = await run_command(*_NVIDIA_SMI, timeout_s=self._timeout_s)
        except TimeoutError as error:
            raise SampleError("timeout") from error
        except OSError as error:
            raise SampleError("nvidia_smi_failed") from error
        if output.returncode != 0:
            raise SampleError("nvidia_smi_failed")
        try:
            rows = [_row(fields) for fields in csv.reader(output.stdout.splitlines())]
        except ValueError as error:
            raise SampleError("nvidia_smi_failed") from error
        return _picked(self._cards, rows)

    async def close(self) -> None:
        """Nothing to let go of."""


def _row(fields: Sequence[str]) -> tuple[str, GpuReading]:
    """Raises ValueError for `[N/A]` and whatever else is no number."""
    index, uuid, total, used, free = (text.strip() for text in fields)
    reading = GpuReading(
        index=int(index), total_mib=int(total), used_mib=int(used), free_mib=int(free)
    )
    return uuid, reading


def _picked(
    cards: Sequence[CardId], rows: Iterable[tuple[str, GpuReading]]
) -> tuple[GpuReading, ...]:
    by_key: dict[int | str, GpuReading] = {}
    for uuid, reading in rows:
        by_key[uuid] = by_key[reading.index] = reading
    try:
        found = [(card, by_key[card.index if card.uuid is None else card.uuid]) for card in cards]
    except KeyError as error:
        raise SampleError("no_such_gpu") from error
    return tuple(
        GpuReading(
            index=card.index,
            total_mib=reading.total_mib,
            used_mib=reading.used_mib,
            free_mib=reading.free_mib,
        )
        for card, reading in found
    )


class AutoSampler:
    """NVML; while that fails, nvidia-smi: a library that is older than a driver put in under it
    keeps failing until the broker is restarted, and the command does not.
    """

    def __init__(self, cards: Sequence[CardId]) -> None:
        self._nvml = NvmlSampler(cards)
        self._nvidia_smi = NvidiaSmiSampler(cards)

    async def read(self) -> tuple[GpuReading, ...]:
        try:
            return await self._nvml.read()
        except SampleError as nvml_error:
            try:
                return await self._nvidia_smi.read()
            except SampleError as error:
                if error.code != "nvidia_smi_missing":
                    raise
                missing = nvml_error.code == "nvml_missing"
                raise SampleError("no_gpu" if missing else nvml_error.code) from nvml_error

    async def close(self) -> None:
        await self._nvml.close()


class NoSampler:
    def __init__(self, _cards: Sequence[CardId]) -> None:
        pass

    async def read(self) -> tuple[GpuReading, ...]:
        raise SampleError("no_gpu")

    async def close(self) -> None:
        """Nothing to let go of."""


class SimulatedSampler:
    """Reads the file that $MGPU_SIMULATED_GPU names, each time anew.

    `{"gpus": [{"index", "total_mib", "used_mib", "free_mib"}]}`, or `{"error": CODE}`.
    """

    def __init__(self, cards: Sequence[CardId]) -> None:
        self._cards = cards

    async def read(self) -> tuple[GpuReading, ...]:
        try:
            said = json.loads(Path(os.environ[SIMULATED_GPU]).read_bytes())  # noqa: ASYNC240
            if "error" in said:
                raise SampleError(said["error"])
            rows = [("", GpuReading(**gpu)) for gpu in said["gpus"]]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise SampleError("simulated_failed") from error
        return _picked([CardId(card.index) for card in self._cards], rows)

    async def close(self) -> None:
        """Nothing to let go of."""


_SAMPLERS: Mapping[SamplerName, Callable[[Sequence[CardId]], Sampler]] = {
    "auto": AutoSampler,
    "nvml": NvmlSampler,
    "nvidia-smi": NvidiaSmiSampler,
    "none": NoSampler,
    "simulated": SimulatedSampler,
}

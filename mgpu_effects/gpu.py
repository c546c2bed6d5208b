"""How much memory each card has free, and which processes hold how much of it, measured: NVML,
else nvidia-smi, else nobody can tell.

Codes of a failed sample: `no_gpu` (nothing here that could be asked), `no_such_gpu` (a configured
card is not there), `nvml_missing`, `nvml_failed`, `nvidia_smi_missing`, `nvidia_smi_failed`,
`timeout`, `not_supported` (this driver does not tell about processes), `simulated_failed`, and
whatever a simulation asks for.
"""

import contextlib
import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pynvml
from attrs import frozen

from mgpu_core.events import GpuReading
from mgpu_effects.blocking import Blocking
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
_NVIDIA_SMI_PROCESSES = (
    "nvidia-smi",
    "--query-compute-apps=gpu_uuid,pid,used_gpu_memory",
    "--format=csv,noheader,nounits",
)
_NO_PROCESSES = "No running processes found"
T = TypeVar("T")


class SampleError(Exception):
    """There is no reading; `code` says why."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@frozen
class GpuProcess:
    """A process that holds memory on a card, by the card's `index` in the core.

    `mib` is None where the driver does not tell: in some containers, and under Windows.
    """

    index: int
    pid: int
    mib: int | None


class Sampler(Protocol):
    async def read(self) -> tuple[GpuReading, ...]:
        """Read every configured card, in the order of the configuration. Raises SampleError."""

    async def processes(self) -> tuple[GpuProcess, ...]:
        """List who holds memory on them, each process once for each card. Raises SampleError."""

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
        self._initialised = False
        self._library = Blocking("nvml", timeout_s)

    async def read(self) -> tuple[GpuReading, ...]:
        return await self._ask(lambda: tuple(self._read_card(card) for card in self._cards))

    async def processes(self) -> tuple[GpuProcess, ...]:
        return await self._ask(
            lambda: tuple(each for card in self._cards for each in _nvml_processes(card))
        )

    async def close(self) -> None:
        if not self._library.hangs:
            self._shut_down()

    async def _ask(self, question: Callable[[], T]) -> T:
        try:
            return await self._library.run(lambda: self._answer(question))
        except TimeoutError as error:
            raise SampleError("timeout") from error

    def _answer(self, question: Callable[[], T]) -> T:
        try:
            if not self._initialised:
                pynvml.nvmlInit()
                self._initialised = True
            return question()
        except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded) as error:
            self._shut_down()
            raise SampleError("nvml_missing") from error
        except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument) as error:
            raise SampleError("no_such_gpu") from error
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission) as error:
            raise SampleError("not_supported") from error
        except pynvml.NVMLError as error:
            # The driver may have been unloaded or reset: the next reading starts from scratch.
            self._shut_down()
            raise SampleError("nvml_failed") from error

    def _read_card(self, card: CardId) -> GpuReading:
        memory = _nvml_memory(_nvml_handle(card))
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


def _nvml_handle(card: CardId) -> Any:
    if card.uuid is None:
        return pynvml.nvmlDeviceGetHandleByIndex(card.index)
    return pynvml.nvmlDeviceGetHandleByUUID(card.uuid)


def _nvml_processes(card: CardId) -> Iterable[GpuProcess]:
    """List what computes and what draws; who does both is in both lists with all that it holds."""
    handle, held = _nvml_handle(card), dict[int, int | None]()
    for kind in ("Compute", "Graphics"):
        for pid, mib in _by_pid(_nvml_running(handle, kind)).items():
            known = held.get(pid, mib)
            held[pid] = None if known is None or mib is None else max(known, mib)
    return (GpuProcess(card.index, pid, mib) for pid, mib in held.items())


def _nvml_running(handle: object, kind: str) -> Iterable[tuple[int, int | None]]:
    name = f"nvmlDeviceGet{kind}RunningProcesses"
    try:
        running = getattr(pynvml, name)(handle)
    except pynvml.NVMLError_FunctionNotFound:  # a driver before 510
        running = getattr(pynvml, f"{name}_v2")(handle)
    for one in running:
        yield one.pid, None if one.usedGpuMemory is None else one.usedGpuMemory // 2**20


def _by_pid(rows: Iterable[tuple[int, int | None]]) -> Mapping[int, int | None]:
    """Add up what a process holds in the parts of a divided card; one unknown: all unknown."""
    held, unknown = Counter[int](), set()
    for pid, mib in rows:
        held[pid] += mib or 0
        unknown |= {pid} if mib is None else set()
    return {pid: None if pid in unknown else mib for pid, mib in held.items()}


class NvidiaSmiSampler:
    """The driver's command, for hosts where its library can't be loaded."""

    def __init__(self, cards: Sequence[CardId], timeout_s: float = _NVIDIA_SMI_TIMEOUT_S) -> None:
        self._cards = cards
        self._timeout_s = timeout_s

    async def read(self) -> tuple[GpuReading, ...]:
        return _picked(self._cards, await self._cards_there())

    async def processes(self) -> tuple[GpuProcess, ...]:
        rows = await self._cards_there()
        index_by_uuid = {
            uuid: card.index
            for card in self._cards
            for uuid, there in rows
            if card.uuid == uuid or (card.uuid is None and card.index == there.index)
        }
        held: dict[int, list[tuple[int, int | None]]] = {}
        for uuid, pid, mib in await self._ask(_NVIDIA_SMI_PROCESSES, _process_row):
            if uuid in index_by_uuid:
                held.setdefault(index_by_uuid[uuid], []).append((pid, mib))
        return tuple(
            GpuProcess(index, pid, mib)
            for index, of_card in held.items()
            for pid, mib in _by_pid(of_card).items()
        )

    async def close(self) -> None:
        """Nothing to let go of."""

    async def _cards_there(self) -> list[tuple[str, GpuReading]]:
        return await self._ask(_NVIDIA_SMI, _row)

    async def _ask(self, command: Sequence[str], row: Callable[[Sequence[str]], T]) -> list[T]:
        if shutil.which(command[0]) is None:
            raise SampleError("nvidia_smi_missing")
        try:
            output = await run_command(*command, timeout_s=self._timeout_s)
        except TimeoutError as error:
            raise SampleError("timeout") from error
        except OSError as error:
            raise SampleError("nvidia_smi_failed") from error
        if output.returncode != 0:
            raise SampleError("nvidia_smi_failed")
        lines = [line for line in output.stdout.splitlines() if line != _NO_PROCESSES]
        try:
            return [row([text.strip() for text in fields]) for fields in csv.reader(lines)]
        except ValueError as error:
            raise SampleError("nvidia_smi_failed") from error


def _row(fields: Sequence[str]) -> tuple[str, GpuReading]:
    """Raises ValueError for `[N/A]` and whatever else is no number."""
    index, uuid, total, used, free = fields
    reading = GpuReading(
        index=int(index), total_mib=int(total), used_mib=int(used), free_mib=int(free)
    )
    return uuid, reading


def _process_row(fields: Sequence[str]) -> tuple[str, int, int | None]:
    """Raises ValueError where it is no such row; `[N/A]` for the memory is one."""
    uuid, pid, mib = fields
    return uuid, int(pid), None if mib.startswith("[") else int(mib)


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
        return await self._first(lambda sampler: sampler.read())

    async def processes(self) -> tuple[GpuProcess, ...]:
        return await self._first(lambda sampler: sampler.processes())

    async def _first(self, ask: Callable[[Sampler], Awaitable[T]]) -> T:
        try:
            return await ask(self._nvml)
        except SampleError as nvml_error:
            try:
                return await ask(self._nvidia_smi)
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

    async def processes(self) -> tuple[GpuProcess, ...]:
        raise SampleError("no_gpu")

    async def close(self) -> None:
        """Nothing to let go of."""


class SimulatedSampler:
    """Reads the file that $MGPU_SIMULATED_GPU names, each time anew.

    `{"gpus": [{"index", "total_mib", "used_mib", "free_mib"}]}`, or `{"error": CODE}`; beside the
    cards `"processes": [{"index", "pid", "mib"}]`.
    """

    def __init__(self, cards: Sequence[CardId]) -> None:
        self._cards = cards

    async def read(self) -> tuple[GpuReading, ...]:
        rows = self._told(lambda said: [("", GpuReading(**gpu)) for gpu in said["gpus"]])
        return _picked([CardId(card.index) for card in self._cards], rows)

    async def processes(self) -> tuple[GpuProcess, ...]:
        return self._told(
            lambda said: tuple(GpuProcess(**each) for each in said.get("processes", ()))
        )

    async def close(self) -> None:
        """Nothing to let go of."""

    def _told(self, what: Callable[[Any], T]) -> T:
        try:
            said = json.loads(Path(os.environ[SIMULATED_GPU]).read_bytes())
            if "error" in said:
                raise SampleError(said["error"])
            return what(said)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise SampleError("simulated_failed") from error


_SAMPLERS: Mapping[SamplerName, Callable[[Sequence[CardId]], Sampler]] = {
    "auto": AutoSampler,
    "nvml": NvmlSampler,
    "nvidia-smi": NvidiaSmiSampler,
    "none": NoSampler,
    "simulated": SimulatedSampler,
}

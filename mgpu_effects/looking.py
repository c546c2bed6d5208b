"""What a service tells of itself, by the words of its configuration: is it loaded, does it work?

Of what cannot be told there is None and a problem, never a guess.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from attrs import frozen

from mgpu_effects.calls import CallError
from mgpu_effects.expressions import ExpressionError, value_of
from mgpu_effects.gpu_processes import Holders
from mgpu_effects.settings import BusySettings, ConsumerSettings, ResidencySettings, Step
from mgpu_effects.steps import with_value

Asked: TypeAlias = ResidencySettings | BusySettings
# What `{name}` stands for in paths and expressions.
Values: TypeAlias = Mapping[str, str]
# The JSON that each path answered, or the CallError instead of it.
Answers: TypeAlias = Mapping[str, object]

MIB = 2**20


class UntoldError(Exception):
    """It cannot be told; `code` says why."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@frozen(kw_only=True)
class Told:
    """What was told. `problems` are codes, each after what it is about: `residency: http_404`."""

    resident: bool | None = None
    vram_mib: int | None = None
    busy: bool | None = None
    problems: tuple[str, ...] = ()


def paths_of(consumer: ConsumerSettings) -> tuple[str, ...]:
    """Give the paths to ask, each once."""
    asked, values = (consumer.residency, consumer.busy), values_of(consumer)
    paths = (_path(each, values) for each in asked if isinstance(each, Asked))
    return tuple(dict.fromkeys(paths))


def values_of(consumer: ConsumerSettings) -> Values:
    return {"model": consumer.unit.upstream} if consumer.unit else {}


def tell(consumer: ConsumerSettings, answers: Answers, holders: Holders | None = None) -> Told:
    """Read it from the answers, and with `residency: nvml` from who holds the memory."""
    values = values_of(consumer)
    resident, vram_mib, busy = None, None, None
    problems, about = [], "residency"
    try:
        if isinstance(consumer.residency, ResidencySettings):
            resident = _resident(consumer.residency, answers, values)
            about = "residency.mib"
            if resident and consumer.residency.mib is not None:
                vram_mib = _mib(consumer.residency, consumer.residency.mib, answers, values)
        elif consumer.residency == "nvml" and holders is not None:
            resident, vram_mib = _by_processes(consumer, holders)
    except UntoldError as untold:
        problems.append(f"{about}: {untold.code}")
    try:
        if consumer.busy is not None:
            busy = _condition(consumer.busy, consumer.busy.when, answers, values)
    except UntoldError as untold:
        problems.append(f"busy: {untold.code}")
    return Told(resident=resident, vram_mib=vram_mib, busy=busy, problems=tuple(problems))


def _path(asked: Asked, values: Values) -> str:
    step = Step(path=asked.path)
    for name, value in values.items():
        step = with_value(step, name, value)
    return step.path


def _resident(asked: ResidencySettings, answers: Answers, values: Values) -> bool:
    answer = answers[_path(asked, values)]
    if isinstance(answer, CallError) and answer.code in {f"http_{each}" for each in asked.absent}:
        return False
    return _condition(asked, asked.resident, answers, values)


def _condition(asked: Asked, expression: str, answers: Answers, values: Values) -> bool:
    value = _value(asked, expression, answers, values)
    return value is not False and value not in ("", [], {})


def _mib(asked: ResidencySettings, expression: str, answers: Answers, values: Values) -> int:
    value = _value(asked, expression, answers, values)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise UntoldError("no_number")
    mib: float = value / MIB if asked.unit == "bytes" else value
    return math.ceil(mib)


def _value(asked: Asked, expression: str, answers: Answers, values: Values) -> Any:
    """Give what the expression finds; null is nothing found, and so is what does not fit."""
    answer = answers[_path(asked, values)]
    if isinstance(answer, CallError):
        raise UntoldError(answer.code)
    try:
        value = value_of(expression, answer, values)
    except ExpressionError as error:
        raise UntoldError("no_value") from error
    if value is None:
        raise UntoldError("no_value")
    return value


def _by_processes(consumer: ConsumerSettings, holders: Holders) -> tuple[bool, int | None]:
    """Say whether its processes hold more than an unload leaves, and how much.

    That they hold nothing is believed only where nothing else of its cards might be theirs.
    """
    if holders.error is not None:
        raise UntoldError(holders.error)
    by_gpu = consumer.resident_mib_by_gpu
    held_mib = holders.held_mib(consumer.name, by_gpu)
    if held_mib is None:
        raise UntoldError("memory_not_told")
    residue_mib = consumer.vram_residue_mib * len(by_gpu)
    if held_mib > residue_mib:
        return True, held_mib
    least_mib = sum(by_gpu.values()) - residue_mib
    if holders.may_hide(consumer.name, by_gpu, least_mib):
        raise UntoldError("not_its_processes")
    return False, None

"""What happened: the inputs of the scheduler.

Names and fields are public and stay: logs of every age hold them. `at` is microseconds since the
Unix epoch and never goes back (an earlier one counts as the last one). No field can hold a body,
a prompt, a header or a key; `error` is one of our own codes.
"""

from typing import Literal, TypeAlias

from attrs import frozen

from mgpu_core.config import Config

Outcome = Literal["ok", "upstream_error", "disconnected", "timeout"]
ProbeFailure = Literal["refused", "timeout", "status", "answer"]


@frozen(kw_only=True)
class Started:
    """The broker (re)started; whatever an earlier run had queued or served is gone."""

    at: int
    run: str


@frozen(kw_only=True)
class Request:
    """A client asks for GPU work. `deadline` is an absolute time, None: `queue_timeout_us`."""

    at: int
    request: str
    consumer: str
    kind: str = ""
    priority: int | None = None
    deadline: int | None = None


@frozen(kw_only=True)
class Cancel:
    """The client has left, or an operator says so."""

    at: int
    request: str


@frozen(kw_only=True)
class ServeDone:
    """The GPU work of a request is over, which may be long after its HTTP answer."""

    at: int
    request: str
    outcome: Outcome = "ok"


@frozen(kw_only=True)
class UnloadDone:
    """The unload call was accepted, or failed. Accepted does not yet mean that memory is free."""

    at: int
    consumer: str
    epoch: int
    error: str | None = None


@frozen(kw_only=True)
class SwapDone:
    """The load step ended: the target serves, or `error` says why not."""

    at: int
    consumer: str
    epoch: int
    error: str | None = None


@frozen(kw_only=True)
class Unload:
    """An operator wants them out (empty: all that may be): drained, or with `force` at once."""

    at: int
    consumers: tuple[str, ...] = ()
    force: bool = False


@frozen(kw_only=True)
class Load:
    at: int
    consumer: str
    only_if_free: bool = False


@frozen(kw_only=True)
class GpuReading:
    index: int
    total_mib: int
    used_mib: int
    free_mib: int


@frozen(kw_only=True)
class GpuSample:
    """One reading of every card; `taken` is when it began, `error` why there is none."""

    at: int
    taken: int
    gpus: tuple[GpuReading, ...] = ()
    error: str | None = None


@frozen(kw_only=True)
class ProbeResult:
    """One health probe. `resident`, `vram_mib` and `busy` are None where it cannot tell."""

    at: int
    consumer: str
    taken: int
    healthy: bool
    resident: bool | None = None
    vram_mib: int | None = None
    busy: bool | None = None
    failure: ProbeFailure | None = None
    error: str | None = None


@frozen(kw_only=True)
class Pin:
    at: int
    consumer: str
    pinned: bool = True


@frozen(kw_only=True)
class Reconfigured:
    """A checked new configuration takes over."""

    at: int
    config: Config


@frozen(kw_only=True)
class Tick:
    at: int


@frozen(kw_only=True)
class Drain:
    at: int


@frozen(kw_only=True)
class Resume:
    at: int


@frozen(kw_only=True)
class Shutdown:
    at: int


Event: TypeAlias = (
    Started
    | Request
    | Cancel
    | ServeDone
    | UnloadDone
    | SwapDone
    | Unload
    | Load
    | GpuSample
    | ProbeResult
    | Pin
    | Reconfigured
    | Tick
    | Drain
    | Resume
    | Shutdown
)

__all__ = [
    "Cancel",
    "Drain",
    "Event",
    "GpuReading",
    "GpuSample",
    "Load",
    "Outcome",
    "Pin",
    "ProbeFailure",
    "ProbeResult",
    "Reconfigured",
    "Request",
    "Resume",
    "ServeDone",
    "Shutdown",
    "Started",
    "SwapDone",
    "Tick",
    "Unload",
    "UnloadDone",
]

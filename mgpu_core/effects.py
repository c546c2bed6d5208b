"""What is to be done: the outputs of the scheduler. The runtime carries them out, in order.

Nothing is returned to the scheduler but later events. Each `StartUnload` is answered by exactly
one `UnloadDone` and each `StartLoad` by exactly one `SwapDone`, with the same epoch.
"""

from typing import Literal, TypeAlias

from attrs import frozen

How = Literal["routes", "driver"]


@frozen(kw_only=True)
class Serve:
    """Proxy it now; report `ServeDone` when its GPU work is over."""

    request: str
    consumer: str


@frozen(kw_only=True)
class Reject:
    """Answer with an error. `retry_after` is in seconds, None where nobody can know."""

    request: str
    code: str
    message: str
    consumer: str | None
    retryable: bool
    retry_after: int | None = None


@frozen(kw_only=True)
class StartUnload:
    consumer: str
    epoch: int
    how: How = "routes"


@frozen(kw_only=True)
class StartLoad:
    consumer: str
    epoch: int


@frozen(kw_only=True)
class SampleGpu:
    """Read the cards now; report a `GpuSample`."""


@frozen(kw_only=True)
class Probe:
    consumer: str


@frozen(kw_only=True)
class WakeAt:
    """Send a `Tick` no later than this; a later `WakeAt` replaces this one."""

    time: int


Effect: TypeAlias = Serve | Reject | StartUnload | StartLoad | SampleGpu | Probe | WakeAt

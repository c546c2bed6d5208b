"""The time of the run, as the scheduler counts it."""

import time
from collections.abc import Callable

Nanoseconds = Callable[[], int]


class Clock:
    """Microseconds since the Unix epoch that never go back.

    The wall clock is read once, when the clock is made; from there on the monotonic clock counts,
    so that a jump of the wall clock (NTP, an operator, summer time) never reaches the core.
    """

    def __init__(
        self, wall_ns: Nanoseconds = time.time_ns, monotonic_ns: Nanoseconds = time.monotonic_ns
    ) -> None:
        self._monotonic_ns = monotonic_ns
        self._offset_ns = wall_ns() - monotonic_ns()

    def now(self) -> int:
        return (self._offset_ns + self._monotonic_ns()) // 1000

"""The two state machines as tables: what a consumer's memory can do, and how a swap goes on.

Everything that moves is moved through these tables; a move that is not in here is a defect of the
core. The diagrams in docs/architecture.md are drawn from them.
"""

from collections.abc import Mapping
from enum import StrEnum

from mgpu_core.state import ABSENT, LOADING, RESIDENT, UNKNOWN, UNLOADING, Residency, SwapPhase


class Cause(StrEnum):
    """What moves a consumer."""

    LOAD_STARTED = "load started"
    LOADED = "loaded"
    LOAD_FAILED = "load failed"
    COLD_STARTED = "first request granted"
    COLD_START_FAILED = "first request failed"
    UNLOAD_STARTED = "unload started"
    UNLOADED = "unloaded"
    UNLOAD_FAILED = "unload failed"
    LEAKED = "its memory did not come free"
    SEEN_RESIDENT = "seen resident"
    SEEN_ABSENT = "seen absent"
    REFUSED = "refuses connections"


RESIDENCY: Mapping[tuple[Residency, Cause], Residency] = {
    (ABSENT, Cause.LOAD_STARTED): LOADING,
    (ABSENT, Cause.COLD_STARTED): RESIDENT,
    (ABSENT, Cause.UNLOAD_STARTED): UNLOADING,  # it may hold something that nobody saw it take
    (ABSENT, Cause.SEEN_RESIDENT): RESIDENT,
    (ABSENT, Cause.SEEN_ABSENT): ABSENT,
    (ABSENT, Cause.REFUSED): ABSENT,
    (ABSENT, Cause.LEAKED): UNKNOWN,
    (LOADING, Cause.LOADED): RESIDENT,
    (LOADING, Cause.LOAD_FAILED): UNKNOWN,
    (LOADING, Cause.UNLOAD_STARTED): UNLOADING,  # by force
    (RESIDENT, Cause.UNLOAD_STARTED): UNLOADING,
    (RESIDENT, Cause.COLD_START_FAILED): UNKNOWN,
    (RESIDENT, Cause.SEEN_RESIDENT): RESIDENT,
    (RESIDENT, Cause.SEEN_ABSENT): ABSENT,
    (RESIDENT, Cause.REFUSED): ABSENT,
    (UNLOADING, Cause.UNLOADED): ABSENT,
    (UNLOADING, Cause.UNLOAD_FAILED): UNKNOWN,
    (UNKNOWN, Cause.LOAD_STARTED): LOADING,
    (UNKNOWN, Cause.COLD_STARTED): RESIDENT,
    (UNKNOWN, Cause.UNLOAD_STARTED): UNLOADING,
    (UNKNOWN, Cause.SEEN_RESIDENT): RESIDENT,
    (UNKNOWN, Cause.SEEN_ABSENT): ABSENT,
    (UNKNOWN, Cause.REFUSED): ABSENT,
}


class Turn(StrEnum):
    """What brings a swap on."""

    UNLOADED = "all victims are out"
    NOTHING_TO_UNLOAD = "no victim holds memory"
    ROOM = "the memory is seen free, or believed to be"
    PLANNED_ANEW = "it does not fit: more victims"


SWAP: Mapping[tuple[SwapPhase, Turn], SwapPhase] = {
    (SwapPhase.UNLOADING, Turn.UNLOADED): SwapPhase.SETTLING,
    (SwapPhase.UNLOADING, Turn.NOTHING_TO_UNLOAD): SwapPhase.LOADING,
    (SwapPhase.SETTLING, Turn.ROOM): SwapPhase.LOADING,
    (SwapPhase.SETTLING, Turn.PLANNED_ANEW): SwapPhase.UNLOADING,
}

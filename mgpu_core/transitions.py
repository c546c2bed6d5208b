"""The two state machines as tables: what a consumer's memory can do, and how a swap goes on.

Everything that moves is moved through these tables; a move that is not in here is a defect of the
core. The diagrams in docs/architecture.md are drawn from them.
"""

from collections.abc import Mapping
from enum import StrEnum

from mgpu_core.state import Residency, SwapPhase


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


_ABSENT, _LOADING, _RESIDENT, _UNLOADING, _UNKNOWN = (
    Residency.ABSENT,
    Residency.LOADING,
    Residency.RESIDENT,
    Residency.UNLOADING,
    Residency.UNKNOWN,
)

RESIDENCY: Mapping[tuple[Residency, Cause], Residency] = {
    (_ABSENT, Cause.LOAD_STARTED): _LOADING,
    (_ABSENT, Cause.COLD_STARTED): _RESIDENT,
    (_ABSENT, Cause.UNLOAD_STARTED): _UNLOADING,  # it may hold something that nobody saw it take
    (_ABSENT, Cause.SEEN_RESIDENT): _RESIDENT,
    (_ABSENT, Cause.SEEN_ABSENT): _ABSENT,
    (_ABSENT, Cause.REFUSED): _ABSENT,
    (_ABSENT, Cause.LEAKED): _UNKNOWN,
    (_LOADING, Cause.LOADED): _RESIDENT,
    (_LOADING, Cause.LOAD_FAILED): _UNKNOWN,
    (_LOADING, Cause.UNLOAD_STARTED): _UNLOADING,  # by force
    (_RESIDENT, Cause.UNLOAD_STARTED): _UNLOADING,
    (_RESIDENT, Cause.COLD_START_FAILED): _UNKNOWN,
    (_RESIDENT, Cause.SEEN_RESIDENT): _RESIDENT,
    (_RESIDENT, Cause.SEEN_ABSENT): _ABSENT,
    (_RESIDENT, Cause.REFUSED): _ABSENT,
    (_UNLOADING, Cause.UNLOADED): _ABSENT,
    (_UNLOADING, Cause.UNLOAD_FAILED): _UNKNOWN,
    (_UNKNOWN, Cause.LOAD_STARTED): _LOADING,
    (_UNKNOWN, Cause.COLD_STARTED): _RESIDENT,
    (_UNKNOWN, Cause.UNLOAD_STARTED): _UNLOADING,
    (_UNKNOWN, Cause.SEEN_RESIDENT): _RESIDENT,
    (_UNKNOWN, Cause.SEEN_ABSENT): _ABSENT,
    (_UNKNOWN, Cause.REFUSED): _ABSENT,
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

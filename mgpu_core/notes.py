"""Why it was decided so: one structured note for each decision on a request or a consumer.

Whatever explains (the status page, the text of the log) reads notes and derives no reason anew.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from attrs import field, frozen

Detail: TypeAlias = int | str | bool | tuple[str, ...] | Mapping[str, int] | None


class Why(StrEnum):
    """For what a request waits. The names are public: logs and status hold them."""

    CONSUMER_FULL = "consumer_full"  # its consumer, or that one's server, serves all it may
    SLOT = "slot"  # other consumers hold the slots of a card it needs
    SWAP = "swap"  # its consumer is being brought in: it joined that swap
    LEAVING = "leaving"  # an operator wants its consumer out first
    UNLOADING = "unloading"  # its consumer is on its way out
    COLLISION = "collision"  # its swap and one under way want the same memory
    VICTIM_AT_WORK = "victim_at_work"  # who has to go serves, loads, unloads or is owed
    VICTIM_BUSY = "victim_busy"  # who has to go works for somebody past the broker
    MEMORY = "memory"  # only promises, loads or unloads under way stand in the way
    UNFIT = "unfit"  # memory that no eviction can free stands in the way
    COOLDOWN = "cooldown"  # who has to go refused to, a moment ago
    PROMOTED_AHEAD = "promoted_ahead"  # a request that was overtaken often enough goes first
    NO_OVERLAP = "no_overlap"  # the card may not load while it serves, or serve while it loads


@frozen(kw_only=True)
class Reason:
    """Why a request waits. The numbers are those of the moment: they make no new reason."""

    why: Why
    who: tuple[str, ...] = ()
    # What each of `who` does now, where that is why: unloading, settling, loading or working.
    doing: tuple[str, ...] = ()
    numbers: Mapping[str, int] = field(factory=dict, eq=False)


class Note(NamedTuple):
    """`type` says what was decided or seen, `details` hold the numbers used.

    A tuple is made in a third of the time that an attrs class takes, and a step makes dozens.
    """

    type: str
    request: str | None
    consumer: str | None
    details: Mapping[str, Detail]

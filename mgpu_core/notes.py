"""Why it was decided so: one structured note for each decision on a request or a consumer.

Whatever explains (the status page, the text of the log) reads notes and derives no reason anew.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple, TypeAlias, cast

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
    """What was decided or seen, flat and in the order in which a log holds it: its `type`, the
    `request` and the `consumer` that it is about, then the numbers used.

    Made in one go and logged as it is: a step has dozens where many begin to wait.
    """

    told: Mapping[str, Detail]

    @property
    def type(self) -> str:
        return cast("str", self.told["type"])

    @property
    def request(self) -> str | None:
        return cast("str | None", self.told.get("request"))

    @property
    def consumer(self) -> str | None:
        return cast("str | None", self.told.get("consumer"))

    @property
    def details(self) -> dict[str, Detail]:
        """Give all but its type and whom it is about."""
        return {key: value for key, value in self.told.items() if key not in _ABOUT}


_ABOUT = frozenset({"type", "request", "consumer"})

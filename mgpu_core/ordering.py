"""Questions that a state and a draft of one answer alike: who comes first, who is pinned."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from mgpu_core.config import Config
from mgpu_core.state import Card, ConsumerState, Counters, RequestState


class Believed(Protocol):
    """A `State`, or the `Draft` of one."""

    @property
    def draining(self) -> bool: ...
    @property
    def stopping(self) -> bool: ...
    @property
    def config(self) -> Config: ...
    @property
    def consumers(self) -> Mapping[str, ConsumerState]: ...
    @property
    def retired(self) -> Sequence[str]: ...
    @property
    def requests(self) -> Mapping[str, RequestState]: ...
    @property
    def waiting(self) -> Mapping[str, int]: ...
    @property
    def serving(self) -> Mapping[str, int]: ...
    @property
    def cards(self) -> Mapping[int, Card]: ...
    @property
    def counters(self) -> Counters: ...
    @property
    def queue(self) -> Sequence[str]: ...
    @property
    def overtaken(self) -> Mapping[str, int]: ...
    @property
    def overtaken_high(self) -> Mapping[str, int]: ...


def is_pinned(s: Believed, consumer: str) -> bool:
    override = s.consumers[consumer].pinned
    return s.config.consumers[consumer].pinned if override is None else override


def is_promoted(s: Believed, request: str) -> bool:
    """Say whether it was overtaken so often that it goes first."""
    bound = s.config.overtake_bound
    if bound is None or s.requests[request].only_if_free:
        return False
    return s.overtaken[request] >= bound or s.overtaken_high[request] >= 2 * bound


def walk_order(s: Believed) -> tuple[Sequence[str], Sequence[str]]:
    """Give the queue as it is walked: the promoted by age, then all others."""
    bound = s.config.overtake_bound
    if bound is None or not s.queue:
        return (), s.queue
    if max(s.overtaken.values()) < bound and max(s.overtaken_high.values()) < 2 * bound:
        return (), s.queue
    promoted = [name for name in s.queue if is_promoted(s, name)]
    promoted.sort(key=lambda name: s.requests[name].arrival)
    first = set(promoted)
    return promoted, [name for name in s.queue if name not in first]

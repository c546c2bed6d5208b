"""The accounting of memory as core.md 4.2 and 4.3 tell it, written a second time, for judges.

Plain sums over the public state. Where the contract leaves a choice, the kinder reading is taken:
a judge may miss something, but what it reports is wrong.
"""

from collections.abc import Iterable

from mgpu_core.config import Consumer
from mgpu_core.simulation.books import Books
from mgpu_core.state import Card, Residency, State

HOLDING = frozenset(Residency) - {Residency.ABSENT}


def needs(state: State, consumer: Consumer) -> dict[int, int]:
    """What must be free by card before it is brought in; nothing: nobody has to make room."""
    if consumer.vram_managed:
        return {}
    belief = state.consumers.get(consumer.name)
    measured = belief.measured_mib if belief and consumer.vram_auto else None
    found = {}
    for gpu, declared in consumer.vram_mib.items():
        steady = measured if measured is not None and len(consumer.vram_mib) == 1 else declared
        if need := max(steady, consumer.vram_load_mib):
            found[gpu] = need
    return found


def held(state: State, consumer: Consumer, gpu: int) -> int:
    if consumer.vram_managed or gpu not in consumer.vram_mib:
        return 0
    belief = state.consumers[consumer.name]
    if belief.measured_mib is not None and len(consumer.vram_mib) == 1:
        return belief.measured_mib
    return consumer.vram_mib[gpu]


def gain(state: State, consumer: Consumer, gpu: int) -> int:
    """What its unload should give back at best: as measured, else as declared; of one that was
    brought up and has not taken its memory yet, what is set aside for it.
    """
    promise, belief = state.promises.get(consumer.name), state.consumers[consumer.name]
    if promise and promise.granted is None and belief.residency is not Residency.ABSENT:
        return max(promise.mib.get(gpu, 0), held(state, consumer, gpu) - consumer.vram_residue_mib)
    return max(0, held(state, consumer, gpu) - consumer.vram_residue_mib)


def residue(state: State, consumer: Consumer, gpu: int) -> int:
    """What it may have left of a card when it went: no more than nobody else is known to hold."""
    card = state.cards.get(gpu)
    if card is None or gpu not in consumer.vram_mib:
        return 0
    others = sum(
        held(state, state.config.consumers[name], gpu)
        for name, belief in state.consumers.items()
        if name != consumer.name and belief.residency in HOLDING
    )
    return max(0, min(consumer.vram_residue_mib, card.used_mib - others))


def good_card(state: State, gpu: int) -> Card | None:
    card = state.cards.get(gpu)
    return card if card and state.at - card.taken <= 3 * state.config.poll_interval_us else None


def total(state: State, gpu: int) -> int | None:
    settings, card = state.config.gpus.get(gpu), state.cards.get(gpu)
    if settings is not None and settings.total_mib is not None:
        return settings.total_mib
    return card.total_mib if card else None


def cushion(state: State, gpu: int) -> int:
    settings = state.config.gpus.get(gpu)
    return settings.cushion_mib if settings else 0


def free_by_card(state: State, target: str, gpu: int, promised: Iterable[str]) -> int | None:
    """What the card itself says is free, less what is promised to these others."""
    card = good_card(state, gpu)
    if card is None:
        return None
    promises = (state.promises[one] for one in promised if one != target)
    return card.free_mib - sum(promise.mib.get(gpu, 0) for promise in promises)


def free_by_belief(state: State, target: str, gpu: int, *, gone: Iterable[str] = ()) -> int | None:
    """What the static budget says: the total less what everybody is believed to hold, once."""
    whole = total(state, gpu)
    if whole is None:
        return None
    settings, card = state.config.gpus.get(gpu), state.cards.get(gpu)
    beside = state.config.consumers[target].can_coexist_with
    taken = sum(
        share(state, name, gpu)
        for name in state.consumers
        if name not in {target, *gone} and name not in beside
    )
    reserved = settings.reserved_mib if settings else 0
    return whole - reserved - taken - (card.foreign_mib if card else 0)


def share(state: State, name: str, gpu: int) -> int:
    """What one consumer counts, once: as a promise or as one that is in."""
    belief, promise = state.consumers[name], state.promises.get(name)
    if promise is not None and promise.done is None and belief.residency is not Residency.RESIDENT:
        return promise.mib.get(gpu, 0)
    if belief.residency not in HOLDING:
        return 0
    return held(state, state.config.consumers[name], gpu)


def just_freed(state: State, books: Books, target: str, gpu: int) -> int:
    """What unloads gave back that ended after the card was read."""
    card = good_card(state, gpu)
    if card is None:
        return 0
    return sum(
        gain(state, state.config.consumers[name], gpu)
        for name, at in books.unloaded_at.items()
        if at >= card.taken and name in state.consumers and name != target
    )

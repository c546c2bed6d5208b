"""Victims that give back less memory than they should: found by a swap that waits for it."""

from mgpu_core.draft import Draft
from mgpu_core.effects import Probe
from mgpu_core.memory import full_gain_mib, good_card
from mgpu_core.state import ABSENT, Source, Swap
from mgpu_core.transitions import Cause


def trust_again(d: Draft, swap: Swap) -> None:
    """Trust a leaky victim again when what came free is what it should give."""
    freed = _freed_mib(d, swap)
    should = sum(full_gain_mib(d, name) for name in swap.expected_mib)
    for name in swap.expected_mib:
        if d.consumers[name].leaky_mib is not None and 2 * freed >= should:
            d.update(name, leaky_mib=None)


def mark_leaky(d: Draft, swap: Swap) -> None:
    """Remember whose unload gave back less than half, where nothing else can be the reason."""
    cards = [good_card(d, gpu) for gpu in swap.free_before_mib]
    expected, freed = sum(swap.expected_mib.values()), _freed_mib(d, swap)
    if not expected or not all(cards) or any(_disturbed(d, swap, g) for g in swap.free_before_mib):
        return
    if freed < 0 or 2 * freed >= expected:
        return  # less than before: somebody else took memory meanwhile
    for name, should in swap.expected_mib.items():
        measured = freed * should // expected
        d.update(name, leaky_mib=measured)
        d.note("Leaky", consumer=name, expected_mib=should, freed_mib=measured)
        if d.consumers[name].residency is ABSENT:
            # It holds most of its memory still, so it can be told to go again, or be served.
            d.move(name, Cause.LEAKED, Source.NVML, uncertain="unload")
            d.do(Probe(consumer=name))


def _freed_mib(d: Draft, swap: Swap) -> int:
    """What came free on the victims' cards since they were told to go."""
    return sum(
        card.free_mib - before
        for gpu, before in swap.free_before_mib.items()
        if (card := good_card(d, gpu))
    )


def _disturbed(d: Draft, swap: Swap, gpu: int) -> bool:
    """Something else moved memory on this card since the swap began."""
    ours = {swap.target, *swap.evicted}
    return any(
        gpu in d.consumer(name).vram_mib and (name in d.swaps or state.moved >= swap.since)
        for name, state in d.consumers.items()
        if name not in ours
    )

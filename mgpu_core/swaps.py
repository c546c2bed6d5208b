"""Swaps: bringing one target in. Plan, unload, see the memory free, load; each step by an event."""

from attrs import evolve

from mgpu_core.config import SECOND_US
from mgpu_core.draft import Draft
from mgpu_core.leaks import mark_leaky, trust_again
from mgpu_core.memory import (
    alike,
    at_work,
    cooling_down,
    fits_as_believed,
    fits_now,
    gain_mib,
    good_card,
    is_busy,
    kept_mib,
    may_be_evicted,
    need_mib,
    promise_for,
    promise_loading,
    shortage,
    stops_a_leak,
    stops_with,
    view_for,
)
from mgpu_core.notes import Reason, Why
from mgpu_core.state import ABSENT, RESIDENT, Swap, SwapPhase
from mgpu_core.transitions import Turn

# Between two looks at the cards while a swap waits to see memory come free.
SETTLE_POLL_US = SECOND_US // 4


def plan(d: Draft, target: str) -> tuple[str, ...] | None:
    """Ask the planner who has to go; within a swap, for what it may still unload."""
    if d.own_planner is not None:
        return _ask(d, target)
    # The built-in ones name nobody for a resident, and the same for all that are alike.
    if d.consumers[target].residency is RESIDENT:
        return ()
    return d.remember(("plan", alike(d, target)), lambda: _ask(d, target))


def _ask(d: Draft, target: str) -> tuple[str, ...] | None:
    swap = d.swaps.get(target)
    left = d.config.max_evictions - (len(swap.evicted) if swap else 0)
    victims = d.planner.victims(target, view_for(d, target, max_evictions=left))
    if victims is None and any(stops_a_leak(d, name) for name in d.present()):
        view = view_for(d, target, max_evictions=left, by_driver=True)
        victims = d.planner.victims(target, view)
    if victims is None:
        # Of a planner of one's own: for who is in already, nothing has to fit.
        return () if d.consumers[target].residency is RESIDENT else None
    return tuple(name for name in dict.fromkeys(victims) if name != target)


def in_the_way(d: Draft, target: str, victims: tuple[str, ...]) -> Reason | None:
    """Say why these victims can't go now (rules 4 and 5), None if they can."""
    if d.swaps and (colliding := _colliding(d, target, set(victims))):
        return Reason(why=Why.COLLISION, who=colliding)
    if d.own_planner is not None and (beside := _beside(d, target, victims)):
        return Reason(why=Why.UNFIT, who=beside)
    return d.remember(("going", victims), lambda: _not_yet(d, victims))


def _colliding(d: Draft, target: str, victims: set[str]) -> tuple[str, ...]:
    """Whose swap evicts me, would be undone by mine, or counts on the same victim."""
    return tuple(
        sorted(
            swap.target
            for swap in d.swaps.values()
            if swap.target != target
            and (
                swap.target in victims
                or target in swap.victims
                or not victims.isdisjoint(swap.victims)
            )
        )
    )


def _not_yet(d: Draft, victims: tuple[str, ...]) -> Reason | None:
    known = [name for name in victims if name in d.consumers]
    going = [one for name in known for one in (name, *stops_with(d, name))]
    holding = [name for name in going if d.consumers[name].residency is not ABSENT]
    if forbidden := [name for name in holding if _forbidden(d, name)]:
        return Reason(why=Why.UNFIT, who=tuple(forbidden))
    if cooling := [name for name in holding if cooling_down(d, name)]:
        return Reason(why=Why.COOLDOWN, who=tuple(cooling))
    if busy := [name for name in going if is_busy(d, name) and name not in d.serving]:
        return Reason(why=Why.VICTIM_BUSY, who=tuple(busy))
    if working := [name for name in going if at_work(d, name)]:
        return victims_at_work(d, tuple(working))
    return None


def victims_at_work(d: Draft, names: tuple[str, ...]) -> Reason:
    """Say of those who would have to go what they still do."""
    return Reason(
        why=Why.VICTIM_AT_WORK, who=names, doing=tuple(_work_of(d, name) for name in names)
    )


def _work_of(d: Draft, name: str) -> str:
    """Say what of it has to end. Who is owed serves soon, perhaps within this step."""
    operation = d.consumers[name].operation
    if operation is not None:
        return f"{operation.kind}ing"
    return "loading" if name in d.swaps else "working"


def _beside(d: Draft, target: str, victims: tuple[str, ...]) -> tuple[str, ...]:
    """Whom a planner of one's own would send out although they may stay beside the target."""
    holding = [
        one
        for name in victims
        if name in d.consumers and d.consumers[name].residency is not ABSENT
        for one in (name, *stops_with(d, name))
    ]
    spared = d.consumer(target).can_coexist_with
    return tuple(name for name in dict.fromkeys(holding) if name in spared)


def _forbidden(d: Draft, name: str) -> bool:
    """A planner of one's own may name it, but nothing may unload it."""
    return not cooling_down(d, name) and not may_be_evicted(d, name)


def start(d: Draft, target: str, victims: tuple[str, ...], *, restore: bool) -> None:
    """Begin a swap (rule 6): set its memory aside and send the victims out."""
    epoch = d.next_epoch()
    swap = d.put_swap(
        Swap(target=target, epoch=epoch, since=d.at, victims=victims, restore=restore)
    )
    promise_for(d, target)
    needs = need_mib(d.consumer(target), d.consumers[target])
    d.note(
        "SwapStarted",
        consumer=target,
        epoch=epoch,
        victims=victims,
        need_mib={str(gpu): need for gpu, need in needs.items()},
        free_mib={str(gpu): card.free_mib for gpu in needs if (card := good_card(d, gpu))},
    )
    _evict(d, swap, victims)


def _evict(d: Draft, swap: Swap, victims: tuple[str, ...]) -> None:
    """Send out those of the victims that hold memory, and remember what that should give."""
    expected, before = dict(swap.expected_mib), dict(swap.free_before_mib)
    evicted = list(swap.evicted)
    known = [name for name in victims if name in d.consumers]
    # Those first who take others of their server with them.
    for name in sorted(known, key=lambda name: not stops_with(d, name)):
        state = d.consumers[name]
        if state.residency is ABSENT or state.operation is not None:
            continue
        cards = {gpu: card for gpu in d.consumer(name).vram_mib if (card := good_card(d, gpu))}
        # Of who is stopped no process is left that could keep anything.
        if d.goes_by_route(name) and not any(kept_mib(d, name, gpu) for gpu in cards):
            expected[name] = sum(gain_mib(d, name, gpu) for gpu in cards)
        before = {gpu: card.free_mib for gpu, card in cards.items()} | before
        evicted.append(name)
        d.start_unload(name, swap.epoch, because=f"swap of {swap.target}")
    d.put_swap(
        evolve(
            swap,
            evicted=tuple(evicted),
            expected_mib=expected,
            free_before_mib=before,
        )
    )


def advance_all(d: Draft) -> None:
    """Bring every swap as far as it goes now, the oldest first."""
    for target in sorted(d.swaps, key=lambda name: d.swaps[name].epoch):
        while (swap := d.swaps.get(target)) is not None and _advance(d, swap):
            pass


def _advance(d: Draft, swap: Swap) -> bool:
    """Take one step of a swap; False: it waits for an event, or is over."""
    if swap.phase is SwapPhase.LOADING:
        return False
    if swap.phase is SwapPhase.UNLOADING and _unloads_under_way(d, swap):
        return False
    if not d.joined(swap.target):
        end(d, swap, because="nobody waits for it any more")
        return False
    if swap.phase is SwapPhase.SETTLING:
        return _settle(d, swap)
    if swap.evicted:
        d.turn(swap, Turn.UNLOADED, settle_until=d.at + d.config.settle_timeout_us)
        return True
    return _load(d, d.turn(swap, Turn.NOTHING_TO_UNLOAD))


def _unloads_under_way(d: Draft, swap: Swap) -> tuple[str, ...]:
    """Give those of its victims that are on their way out."""
    return tuple(
        name
        for name in swap.evicted
        if (operation := d.consumers[name].operation) is not None
        and operation.kind == "unload"
        and operation.epoch == swap.epoch
    )


def tell(d: Draft) -> None:
    """Let those who wait in a swap know how far it has come."""
    for target, swap in d.swaps.items():
        if swap is not d.before.swaps.get(target):
            reason = stage(d, swap)
            for name in d.joined(target):
                d.why(name, reason)


def stage(d: Draft, swap: Swap) -> Reason:
    """Say whose unload, whose memory or whose load a swap waits for."""
    if leaving := _unloads_under_way(d, swap):
        who, doing = leaving, "unloading"
    elif swap.evicted and swap.phase is not SwapPhase.LOADING:
        who, doing = swap.evicted, "settling"
    else:
        return Reason(why=Why.SWAP, who=(swap.target,), doing=("loading",))
    return Reason(
        why=Why.SWAP, who=who, doing=(doing,) * len(who), numbers=shortage(d, swap.target)
    )


def _settle(d: Draft, swap: Swap) -> bool:
    """Wait for a sample taken after the last unload that shows the memory; not for ever."""
    assert swap.unloaded is not None
    assert swap.settle_until is not None
    needs = need_mib(d.consumer(swap.target), d.consumers[swap.target])
    cards = [card for gpu in needs if (card := good_card(d, gpu))]
    newer = [card for card in cards if card.taken > swap.unloaded]
    seen = bool(cards) and len(newer) == len(cards)
    if seen and fits_now(d, swap.target):
        trust_again(d, swap)
        return _load(d, d.turn(swap, Turn.ROOM))
    nothing_to_see = not cards or (swap.failed and len(swap.evicted) == 1)
    if d.at < swap.settle_until and not nothing_to_see:
        if swap.sample_at is None or d.at >= swap.sample_at:
            d.sample()
            d.put_swap(evolve(swap, sample_at=d.at + SETTLE_POLL_US))
        return False
    if swap.failed:
        return _plan_anew(d, swap, because="an unload failed")
    if not newer and not fits_as_believed(d, swap.target):
        return _plan_anew(d, swap, because="others are in its place now")
    if not newer:
        d.note("UnloadBelieved", consumer=swap.target, epoch=swap.epoch)
        return _load(d, d.turn(swap, Turn.ROOM))
    mark_leaky(d, swap)
    return _plan_anew(d, swap, because="the unloads did not free enough")


def _plan_anew(d: Draft, swap: Swap, *, because: str) -> bool:
    """Go on with the real numbers: more victims, or none at all."""
    victims = plan(d, swap.target)
    d.note(
        "PlannedAnew",
        consumer=swap.target,
        epoch=swap.epoch,
        because=because,
        victims=victims,
    )
    left = d.config.max_evictions - len(swap.evicted)
    if victims is None or in_the_way(d, swap.target, victims):
        end(d, swap, because="no set of victims can go now")
        return False
    more = tuple(
        name
        for name in victims
        if name in d.consumers and d.consumers[name].residency is not ABSENT
    )
    if len(more) > left:
        end(d, swap, because="too many evictions for one swap")
        return False
    if not more:
        return _load(d, d.turn(swap, Turn.ROOM))
    new = d.turn(
        swap,
        Turn.PLANNED_ANEW,
        victims=tuple(dict.fromkeys((*swap.victims, *victims))),
        failed=False,
        expected_mib={},
        free_before_mib={},
    )
    _evict(d, new, more)
    return True


def _load(d: Draft, swap: Swap) -> bool:
    """The memory is there: load the target, or let its first request do so."""
    consumer, state = d.consumer(swap.target), d.consumers[swap.target]
    if state.residency is RESIDENT:
        finish(d, swap)
    elif consumer.loadable:
        promise_loading(d, swap.target)
        d.start_load(swap.target, swap.epoch)
    else:
        d.update(swap.target, cleared=True)
        finish(d, swap)
    return False


def finish(d: Draft, swap: Swap) -> None:
    """The target is in, or may be started: who waited for it is served first, or owed."""
    waiters = d.joined(swap.target)
    forget(d, swap)
    for name in waiters:
        if d.requests[name].operator is not None:
            d.brought_in(name)
        else:
            d.enqueue_again(name, owed=True)
            d.arrived.append(name)


def room_is_gone(d: Draft, target: str) -> bool:
    """Was the memory cleared for a cold start taken since?

    A promise binds only whom the core tracks; others may take it while the first request waits,
    which a newer sample shows. Without a sample what is believed may have changed: one came back.
    """
    state = d.consumers[target]
    cards = [good_card(d, gpu) for gpu in need_mib(d.consumer(target), state)]
    newer = any(card and card.taken >= state.touched for card in cards)
    return (newer or not any(cards)) and not fits_now(d, target)


def give_up_cold_start(d: Draft, target: str) -> None:
    """Plan anew for those who wait for it; they keep their turn."""
    d.update(target, cleared=False)
    d.give_up_promise(target)
    d.note("ColdStartGivenUp", consumer=target, because="its memory was taken")


def end(d: Draft, swap: Swap, *, because: str) -> None:
    """Give a swap up before its load: waiters go back to their places."""
    d.note("SwapEnded", consumer=swap.target, epoch=swap.epoch, because=because)
    waiters = d.joined(swap.target)
    forget(d, swap)
    d.give_up_promise(swap.target)
    for name in waiters:
        d.enqueue_again(name, owed=False)


def abandon(d: Draft, swap: Swap) -> None:
    """Forget a swap that force has overtaken; its unloads go on to their end, and what was set
    aside for its target ends with that.
    """
    d.note("SwapEnded", consumer=swap.target, epoch=swap.epoch, because="unloaded by force")
    assert not d.joined(swap.target)
    forget(d, swap)


def forget(d: Draft, swap: Swap) -> None:
    d.drop_swap(swap)
    for name in (swap.target, *swap.victims):
        if name in d.consumers:
            d.update(name, touched=d.at)

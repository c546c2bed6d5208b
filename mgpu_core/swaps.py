"""Swaps: bringing one target in. Plan, unload, see the memory free, load; each step by an event."""

from attrs import evolve

from mgpu_core.config import SECOND_US
from mgpu_core.draft import Draft
from mgpu_core.effects import Probe, SampleGpu
from mgpu_core.memory import (
    alike,
    at_work,
    cooling_down,
    full_gain_mib,
    gain_mib,
    good_card,
    is_busy,
    may_be_evicted,
    need_mib,
    promise_for,
    promise_taken,
    stops_a_leak,
    stops_with,
    view_for,
)
from mgpu_core.notes import Reason, Why
from mgpu_core.state import (
    Cooldown,
    Residency,
    Source,
    Swap,
    SwapPhase,
)
from mgpu_core.transitions import Cause, Turn

FIRST_COOLDOWN_US = 5 * SECOND_US
LONGEST_COOLDOWN_US = 300 * SECOND_US
# Between two looks at the cards while a swap waits to see memory come free.
SETTLE_POLL_US = SECOND_US // 4


def plan(d: Draft, target: str) -> tuple[str, ...] | None:
    """Ask the planner who has to go; within a swap, for what it may still unload."""
    if d.own_planner is not None:
        return _ask(d, target)
    # The built-in ones name nobody for a resident, and the same for all that are alike.
    if d.consumers[target].residency is Residency.RESIDENT:
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
        return None
    return tuple(name for name in dict.fromkeys(victims) if name != target)


def in_the_way(d: Draft, target: str, victims: tuple[str, ...]) -> Reason | None:
    """Say why these victims can't go now (rules 4 and 5), None if they can."""
    colliding = sorted(
        swap.target
        for swap in d.swaps.values()
        if swap.target != target
        and (
            swap.target in victims
            or target in swap.victims
            or not set(victims).isdisjoint(swap.victims)
        )
    )
    if colliding:
        return Reason(why=Why.COLLISION, who=tuple(colliding))
    return d.remember(("going", victims), lambda: _not_yet(d, victims))


def _not_yet(d: Draft, victims: tuple[str, ...]) -> Reason | None:
    going = [one for name in victims for one in (name, *stops_with(d, name)) if one in d.consumers]
    holding = [name for name in going if d.consumers[name].residency is not Residency.ABSENT]
    if forbidden := [name for name in holding if _forbidden(d, name)]:
        return Reason(why=Why.UNFIT, who=tuple(forbidden))
    if cooling := [name for name in holding if cooling_down(d, name)]:
        return Reason(why=Why.COOLDOWN, who=tuple(cooling))
    if busy := [name for name in going if is_busy(d, name) and name not in d.serving]:
        return Reason(why=Why.VICTIM_BUSY, who=tuple(busy))
    if working := [name for name in going if at_work(d, name)]:
        return Reason(why=Why.VICTIM_AT_WORK, who=tuple(working))
    return None


def _forbidden(d: Draft, name: str) -> bool:
    """A planner of one's own may name it, but nothing may unload it."""
    return not cooling_down(d, name) and not may_be_evicted(d, name)


def start(d: Draft, target: str, victims: tuple[str, ...], *, restore: bool = False) -> None:
    """Begin a swap (rule 6): set its memory aside and send the victims out."""
    epoch = d.next_epoch()
    swap = d.put_swap(
        Swap(target=target, epoch=epoch, since=d.at, victims=victims, restore=restore)
    )
    d.update(target, touched=d.at)
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
    for name in victims:
        if name not in d.consumers or d.consumers[name].residency is Residency.ABSENT:
            continue
        if d.consumers[name].operation is not None:
            continue  # it goes already, with its server
        cards = {gpu: card for gpu in d.consumer(name).vram_mib if (card := good_card(d, gpu))}
        expected[name] = sum(gain_mib(d, name, gpu, by_driver=True) for gpu in cards)
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
    for swap in sorted(d.swaps.values(), key=lambda swap: swap.epoch):
        while swap.target in d.swaps and _advance(d, d.swaps[swap.target]):
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
        d.turn(
            swap,
            Turn.UNLOADED,
            settle_until=d.at + d.config.settle_timeout_us,
            unloaded=d.at,
            sample_at=d.at,
        )
        return True
    return _load(d, d.turn(swap, Turn.NOTHING_TO_UNLOAD))


def _unloads_under_way(d: Draft, swap: Swap) -> bool:
    return any(
        operation is not None and operation.kind == "unload" and operation.epoch == swap.epoch
        for operation in (d.consumers[name].operation for name in swap.evicted)
    )


def _settle(d: Draft, swap: Swap) -> bool:
    """Wait for a sample taken after the last unload that shows the memory; not for ever."""
    assert swap.unloaded is not None
    assert swap.settle_until is not None
    needs = need_mib(d.consumer(swap.target), d.consumers[swap.target])
    cards = [card for gpu in needs if (card := good_card(d, gpu))]
    newer = [card for card in cards if card.taken > swap.unloaded]
    seen = bool(cards) and len(newer) == len(cards)
    if seen and not view_for(d, swap.target, max_evictions=0).missing_mib():
        _unloads_were_clean(d, swap)
        return _load(d, d.turn(swap, Turn.ROOM))
    nothing_to_see = not cards or (swap.failed and len(swap.evicted) == 1)
    if d.at < swap.settle_until and not nothing_to_see:
        if swap.sample_at is None or d.at >= swap.sample_at:
            d.do(SampleGpu())
            d.put_swap(evolve(swap, sample_at=d.at + SETTLE_POLL_US))
        return False
    if swap.failed:
        return _plan_anew(d, swap, because="an unload failed")
    if not newer:
        d.note("UnloadBelieved", consumer=swap.target, epoch=swap.epoch)
        return _load(d, d.turn(swap, Turn.ROOM))
    _mark_leaky(d, swap)
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
        if name in d.consumers and d.consumers[name].residency is not Residency.ABSENT
    )
    if len(more) > left:
        end(d, swap, because="too many evictions for one swap")
        return False
    if not more:
        if swap.phase is SwapPhase.SETTLING:
            return _load(d, d.turn(swap, Turn.ROOM))
        return _load(d, d.turn(swap, Turn.NOTHING_TO_UNLOAD))
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
    if state.residency is Residency.RESIDENT:
        finish(d, swap)
    elif consumer.loadable:
        d.start_load(swap.target, swap.epoch)
    else:
        d.update(swap.target, cleared=True)
        finish(d, swap)
    return False


def finish(d: Draft, swap: Swap) -> None:
    """The target is in, or may be started: who waited for it is served first, or owed."""
    waiters = d.joined(swap.target)
    _forget(d, swap)
    for name in waiters:
        if d.requests[name].operator is not None:
            d.drop(name)
        else:
            d.enqueue_again(name, owed=True)
            d.arrived.append(name)


def end(d: Draft, swap: Swap, *, because: str) -> None:
    """Give a swap up before its load: waiters go back to their places."""
    d.note("SwapEnded", consumer=swap.target, epoch=swap.epoch, because=because)
    waiters = d.joined(swap.target)
    _forget(d, swap)
    d.give_up_promise(swap.target)
    for name in waiters:
        d.enqueue_again(name, owed=False)


def abandon(d: Draft, swap: Swap) -> None:
    """Forget a swap that force has overtaken; its unloads go on to their end."""
    d.note("SwapEnded", consumer=swap.target, epoch=swap.epoch, because="unloaded by force")
    assert not d.joined(swap.target)
    _forget(d, swap)
    d.give_up_promise(swap.target)


def _forget(d: Draft, swap: Swap) -> None:
    d.drop_swap(swap)
    d.update(swap.target, touched=d.at)


# ------------------------------------------------------------------------------------ completions


def loaded(d: Draft, name: str, error: str | None) -> None:
    """The load of a swap ended."""
    state, swap = d.consumers[name], d.swaps[name]
    assert state.operation is not None
    if error is not None:
        cooldown = _longer(d, state.load_cooldown)
        d.note("LoadFailed", consumer=name, error=error, failures=cooldown.failures)
        d.move(
            name,
            Cause.LOAD_FAILED,
            Source.COMMAND,
            uncertain="load",
            load_cooldown=cooldown,
            touched=d.at,
        )
        for request in d.waiting_for(name):
            d.reject(
                request,
                "load_failed",
                f"{name} failed to load ({error})",
                retry_after_us=cooldown.until - d.at,
            )
        _forget(d, swap)
        d.give_up_promise(name)
        return
    d.move(
        name,
        Cause.LOADED,
        Source.COMMAND,
        load_us=d.at - state.operation.since,
        load_cooldown=None,
        leaky_mib=None,
        idle_since=None if swap.restore else d.at,
        refused=False,
        healthy=True,
        probe_failures=0,
        touched=d.at,
    )
    if not d.consumer(name).lazy:
        promise_taken(d, name)
    finish(d, swap)


def unloaded(d: Draft, name: str, error: str | None) -> None:
    """An unload ended, for all that went with it."""
    operation = d.consumers[name].operation
    assert operation is not None
    together = [
        one
        for one in (name, *d.siblings(name))
        if d.consumers[one].operation is not None
        and d.consumers[one].operation.epoch == operation.epoch  # type: ignore[union-attr]
        and (one == name or operation.how == "driver")
    ]
    for one in together:
        _one_unloaded(d, one, error)
    for swap in list(d.swaps.values()):
        if swap.epoch == operation.epoch:
            d.put_swap(_after_unload(d, swap, together, error))


def _after_unload(d: Draft, swap: Swap, names: list[str], error: str | None) -> Swap:
    if error is None:
        return evolve(swap, unloaded=d.at)
    expected = {name: mib for name, mib in swap.expected_mib.items() if name not in names}
    return evolve(swap, unloaded=d.at, failed=True, expected_mib=expected)


def _one_unloaded(d: Draft, name: str, error: str | None) -> None:
    state = d.consumers[name]
    by_route = state.operation is not None and state.operation.how == "routes"
    if error is None:
        d.move(
            name,
            Cause.UNLOADED,
            Source.COMMAND,
            unload_cooldown=None,
            leaving=False,
            cleared=False,
            touched=d.at,
            # Where a driver stopped it, no process is left that could hold anything.
            leaky_mib=state.leaky_mib if by_route else None,
        )
        promise_taken(d, name)  # what it took since the last sample is not free yet
        return
    cooldown = _longer(d, state.unload_cooldown)
    d.note("UnloadFailed", consumer=name, error=error, failures=cooldown.failures)
    d.move(
        name,
        Cause.UNLOAD_FAILED,
        Source.COMMAND,
        uncertain="unload",
        unload_cooldown=cooldown,
        leaving=False,
        touched=d.at,
    )
    promise_taken(d, name)
    d.do(Probe(consumer=name))


def _longer(d: Draft, cooldown: Cooldown | None) -> Cooldown:
    """Double the wait with each failure in a row."""
    failures = 1 if cooldown is None else cooldown.failures + 1
    wait = min(LONGEST_COOLDOWN_US, FIRST_COOLDOWN_US << min(failures - 1, 10))
    return Cooldown(failures=failures, until=d.at + wait)


# ------------------------------------------------------------------------------------------ leaks


def _unloads_were_clean(d: Draft, swap: Swap) -> None:
    """Trust a leaky victim again when what came free is what it should give."""
    freed = _freed_mib(d, swap)
    should = sum(full_gain_mib(d, name) for name in swap.expected_mib)
    for name in swap.expected_mib:
        if d.consumers[name].leaky_mib is not None and 2 * freed >= should:
            d.update(name, leaky_mib=None)


def _mark_leaky(d: Draft, swap: Swap) -> None:
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
        if d.consumers[name].residency is Residency.ABSENT:
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

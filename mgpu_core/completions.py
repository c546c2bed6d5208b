"""Events that end a load or an unload, and what becomes of those who waited for it."""

from collections.abc import Sequence

from attrs import evolve

from mgpu_core.config import SECOND_US
from mgpu_core.draft import Draft
from mgpu_core.effects import Probe
from mgpu_core.events import SwapDone, UnloadDone
from mgpu_core.memory import promise_taken
from mgpu_core.state import Cooldown, Operation, Source, Swap
from mgpu_core.swaps import finish, forget
from mgpu_core.transitions import Cause

FIRST_COOLDOWN_US = 5 * SECOND_US
LONGEST_COOLDOWN_US = 300 * SECOND_US


def on_unload_done(d: Draft, event: UnloadDone) -> None:
    operation = _operation(d, event.consumer)
    if operation is None or operation.kind != "unload" or operation.epoch != event.epoch:
        d.note("Ignored", consumer=event.consumer, what="UnloadDone", because="old epoch")
        return
    unloaded(d, event.consumer, event.error)


def on_swap_done(d: Draft, event: SwapDone) -> None:
    operation = _operation(d, event.consumer)
    if operation is None or operation.kind != "load" or operation.epoch != event.epoch:
        d.note("Ignored", consumer=event.consumer, what="SwapDone", because="old epoch")
        if event.consumer in d.consumers:
            d.do(Probe(consumer=event.consumer))  # a load that was given up has ended after all
        return
    loaded(d, event.consumer, event.error)


def _operation(d: Draft, name: str) -> Operation | None:
    state = d.consumers.get(name)
    return state.operation if state else None


def give_up_overdue(d: Draft) -> None:
    """Take a completion that does not come for a failure."""
    for name in d.restless():
        operation = d.consumers[name].operation  # it may have ended with its server just now
        if operation is None or d.at < operation.deadline:
            continue
        ended = loaded if operation.kind == "load" else unloaded
        ended(d, name, "timeout")


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
            uncertain=state.uncertain or "load",
            load_cooldown=cooldown,
        )
        for request in d.waiting_for(name):
            d.reject(
                request,
                "load_failed",
                f"{name} failed to load ({error})",
                retry_after_us=cooldown.until - d.at,
            )
        forget(d, swap)
        promise_taken(d, name)  # what it took since the last sample is not free before the next
        _read_again(d, [name])
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
    )
    if not d.consumer(name).lazy or not d.joined(name):
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
    _read_again(d, together)
    for swap in list(d.swaps.values()):
        if swap.epoch == operation.epoch:
            d.put_swap(_after_unload(d, swap, together, error))


def _read_again(d: Draft, names: Sequence[str]) -> None:
    """What is known of their cards, where anything is, is older than this."""
    if any(gpu in d.cards for name in names for gpu in d.consumer(name).vram_mib):
        d.sample()


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
            touched=d.at,
            # Where a driver stopped it, no process is left that could hold anything.
            leaky_mib=state.leaky_mib if by_route else None,
        )
        _end_promise(d, name)
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
    _end_promise(d, name)
    d.do(Probe(consumer=name))


def _end_promise(d: Draft, name: str) -> None:
    """What it took since the last sample is not free before the next one."""
    if name not in d.swaps:
        promise_taken(d, name)


def _longer(d: Draft, cooldown: Cooldown | None) -> Cooldown:
    """Double the wait with each failure in a row."""
    failures = 1 if cooldown is None else cooldown.failures + 1
    wait = min(LONGEST_COOLDOWN_US, FIRST_COOLDOWN_US << min(failures - 1, 10))
    return Cooldown(failures=failures, until=d.at + wait)

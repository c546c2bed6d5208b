"""What a planner of one's own must keep to: `Watched` stands between the scheduler and it.

A planner is believed about who should go; that it answers at all, the same each time, and within
what it was shown, is looked at here, whenever it is asked.
"""

from collections.abc import Container, Iterable, Iterator
from typing import TypeGuard

from attrs import define, evolve, field

from mgpu_core.planners import Holder, Planner, View
from mgpu_core.simulation.oracles import Violation

Answer = tuple[str, ...] | None


@define
class Watched:
    """Asks the planner twice and keeps what is wrong with its answers until `found` takes it.

    Where the planner raises, or gives what is no answer, the scheduler hears that no set would do.
    """

    planner: Planner
    # How often it named somebody though all would fit without.
    needless: int = 0
    _wrong: list[str] = field(factory=list)
    _named: set[str] = field(factory=set)

    def victims(self, target: str, view: View) -> Answer:
        shown = _copied(view)
        try:
            answer: object = self.planner.victims(target, view)
            again: object = self.planner.victims(target, view)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it is its own fault
            self._wrong.append(f"for {target} it raises {told(error)}")
            return None
        if view != shown:
            self._wrong.append(f"for {target} it changes the view that it is shown")
            return None
        if not _is_answer(answer):
            self._wrong.append(f"for {target} it answers {answer!r}: no tuple of names, no None")
            return None
        if answer != again:
            self._wrong.append(f"for {target} it answers {answer}, and asked again {again}")
        self._named.update(answer or ())
        self._wrong += complaints(target, view, answer)
        self.needless += bool(_needless(view, answer))
        return answer

    def found(self, known: Container[str]) -> list[Violation]:
        """Take what was wrong since the last time; `known` are all who were ever configured."""
        strangers = sorted(name for name in self._named if name not in known)
        wrong = self._wrong + [f"it names {name}, which is no consumer" for name in strangers]
        self._wrong, self._named = [], set()
        return [Violation("planner", text) for text in wrong]


def told(error: BaseException) -> str:
    """Put an exception and where it came from into a line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        code = trace.tb_frame.f_code
        where = f" ({code.co_filename}, line {trace.tb_lineno}, in {code.co_name})"
    return f"{type(error).__name__}: {error}{where}"


def complaints(target: str, view: View, answer: Answer) -> Iterator[str]:
    """Say what the view itself shows to be wrong with an answer."""
    if answer is None:
        if enough := _a_set(target, view):
            yield f"for {target} it answers None, though {enough}"
        return
    named = [view.holders[name] for name in dict.fromkeys(answer) if name in view.holders]
    if target in answer:
        yield f"for {target} it names {target} itself"
    for holder in named:
        if holder.name != target and (why := _not_to_be_named(holder, view)):
            yield f"for {target} it names {holder.name}, which {why}"
    if len(named) > view.max_evictions:
        yield f"for {target} it names {len(named)}, where {view.max_evictions} may go"
    if not view.resident and (missing := view.missing_mib(_going(named, view))):
        short = ", ".join(f"{mib} MiB on GPU {gpu}" for gpu, mib in missing.items())
        yield f"for {target} it names {answer}, and with them gone {short} are still missing"


def _not_to_be_named(holder: Holder, view: View) -> str | None:
    if holder.pinned:
        return "is pinned"
    if not holder.evictable:
        return "may not be unloaded (evictable is False)"
    beside = [name for name in (holder.name, *holder.stops_with) if name in view.protected]
    return f"takes {beside} with it, which may stay (protected)" if beside else None


def _a_set(target: str, view: View) -> str | None:
    """Say what would do, where something surely would; at work or not, it can be waited for."""
    missing = view.missing_mib()
    if view.resident or not missing:
        return "nobody has to go for it"

    def relief(holder: Holder) -> int:
        return sum(min(holder.gain_mib.get(gpu, 0), mib) for gpu, mib in missing.items())

    largest = sorted(view.candidates(target), key=relief, reverse=True)[: view.max_evictions]
    if view.missing_mib(largest):
        return None
    return f"it would fit with {[holder.name for holder in largest]} gone"


def _going(named: Iterable[Holder], view: View) -> list[Holder]:
    """Give who goes: those named, and the others of their servers where only a stop helps."""
    names = {one for holder in named for one in (holder.name, *holder.stops_with)}
    return [view.holders[name] for name in sorted(names) if name in view.holders]


def _needless(view: View, answer: Answer) -> list[str]:
    """Give who need not go, as the view itself counts: it would fit as well without."""
    named = [view.holders[name] for name in answer or () if name in view.holders]
    if view.resident or view.missing_mib(named):
        return []
    return [
        one.name
        for one in named
        if not view.missing_mib(other for other in named if other is not one)
    ]


def _is_answer(answer: object) -> TypeGuard[Answer]:
    if answer is None:
        return True
    return isinstance(answer, tuple) and all(isinstance(name, str) for name in answer)


def _copied(view: View) -> View:
    holders = {
        name: evolve(holder, gain_mib=dict(holder.gain_mib), need_mib=dict(holder.need_mib))
        for name, holder in view.holders.items()
    }
    need_mib, free_mib = dict(view.need_mib), dict(view.free_mib)
    return evolve(view, holders=holders, need_mib=need_mib, free_mib=free_mib)

"""Planners of one's own, for docs/writing-a-planner.md: one that is proved, one that looks so."""

from mgpu_core.planners import Holder, View


class LargestFirst:
    """As few as possible have to go: who gives back most of what is missing goes first."""

    def victims(self, target: str, view: View) -> tuple[str, ...] | None:
        if view.resident:
            return ()  # it is in: nothing has to fit
        candidates = view.candidates(target)
        idle = [holder for holder in candidates if holder.idle]
        # Idle ones can go at once. Where they are not enough, others are waited for.
        for pool in (idle, list(candidates)):
            chosen = largest_until_it_fits(pool, view)
            if chosen is not None:
                return tuple(holder.name for holder in chosen)
        return None


def largest_until_it_fits(pool: list[Holder], view: View) -> list[Holder] | None:
    """Take whoever helps most with what is still missing; None: they are not enough."""
    chosen: list[Holder] = []
    while missing := view.missing_mib(chosen):
        if len(chosen) == view.max_evictions:
            return None

        def help_mib(holder: Holder, missing: dict[int, int] = missing) -> int:
            return sum(min(holder.gain_mib.get(gpu, 0), mib) for gpu, mib in missing.items())

        rest = [holder for holder in pool if holder not in chosen and help_mib(holder)]
        if not rest:
            return None
        # Equal ones by name, so that the same view gives the same answer.
        chosen.append(max(rest, key=lambda holder: (help_mib(holder), holder.name)))
    for holder in tuple(chosen):  # with several cards a later one may have made it needless
        others = [other for other in chosen if other is not holder]
        if not view.missing_mib(others):
            chosen = others
    return chosen


class OnlyIdle(LargestFirst):
    """The same, but it would not disturb anybody at work. See why that is no good idea."""

    def victims(self, target: str, view: View) -> tuple[str, ...] | None:
        if view.resident:
            return ()
        idle = [holder for holder in view.candidates(target) if holder.idle]
        chosen = largest_until_it_fits(idle, view)
        return None if chosen is None else tuple(holder.name for holder in chosen)

"""What must have happened in a campaign, or it has proved nothing about it.

Each label is recognised in one step, from its event, effects and notes.
"""

from collections.abc import Callable, Container, Iterator

from mgpu_core import events as ev
from mgpu_core.notes import Note, Why
from mgpu_core.simulation.books import Step
from mgpu_core.state import Residency

# What notes alone tell: the type of the note, a detail and what that says.
NOTED: dict[str, tuple[str, str, object]] = {
    "a promotion": ("Promoted", "", None),
    "a swap with victims": ("Unloading", "because", "swap of "),
    "a leaky victim": ("Leaky", "", None),
    "planned anew after a leaky unload": ("PlannedAnew", "because", "the unloads did not free"),
    "planned anew after a failed unload": ("PlannedAnew", "because", "an unload failed"),
    "a swap that ends: no set": ("SwapEnded", "because", "no set"),
    "a swap that ends: nobody waits": ("SwapEnded", "because", "nobody waits"),
    "a swap that ends: force": ("SwapEnded", "because", "unloaded by force"),
    "an unload by driver": ("Unloading", "how", "driver"),
    "an idle unload": ("Unloading", "because", "it was idle"),
    "an operator's unload": ("Unloading", "because", "an operator wants"),
    "an operator's force": ("Unloading", "because", "an operator forces"),
    "a lazy one lets go for itself": ("Unloading", "because", "what it may hold"),
    "an unload that is believed": ("UnloadBelieved", "", None),
    "a cold start": ("Moved", "because", "first request granted"),
    "a cold start that failed": ("Moved", "because", "first request failed"),
    "a cold start given up": ("ColdStartGivenUp", "", None),
    "a load that failed": ("LoadFailed", "", None),
    "a load that timed out": ("LoadFailed", "error", "timeout"),
    "an unload that failed": ("UnloadFailed", "", None),
    "an unload that timed out": ("UnloadFailed", "error", "timeout"),
    "seen resident": ("Moved", "because", "seen resident"),
    "seen absent": ("Moved", "because", "seen absent"),
    "a refused connection": ("Moved", "because", "refuses"),
    "unreachable": ("Unreachable", "", None),
    "healthy again": ("Healthy", "", None),
    "a measured footprint": ("Measured", "", None),
    "a failed sample": ("SampleFailed", "", None),
    "an old sample": ("Ignored", "what", "GpuSample"),
    "an old epoch": ("Ignored", "because", "old epoch"),
    "a probe of one at work": ("Ignored", "because", "it was at work"),
    "admitted though unfit": ("Admitted", "", None),
    "retired": ("Retired", "", None),
    "a load that finds no room": ("NotLoaded", "because", "there is no free"),
}
REASONS = {f"waits: {why.value}": why.value for why in Why}
CODES = (
    "no_consumer",
    "shutting_down",
    "consumer_unreachable",
    "load_failed",
    "overloaded",
    "insufficient_vram",
    "queue_timeout",
    "unloaded",
)


def labels(step: Step) -> Iterator[str]:
    """Give what happened in a step, of what should happen at all."""
    for note in step.notes:
        yield from _noted(note)
    for effect in step.rejected:
        yield f"rejected: {effect.code}"
    for label, happened in SEEN.items():
        if happened(step):
            yield label


def _cancelled_while(step: Step, where: Container[str]) -> bool:
    return isinstance(step.event, ev.Cancel) and step.event.request in where


def _restarted_beside_a_resident(step: Step) -> bool:
    resident = [c for c in step.before.consumers.values() if c.residency is Residency.RESIDENT]
    return isinstance(step.event, ev.Started) and bool(step.before.run) and bool(resident)


def _joined_what_lost_a_waiter(step: Step) -> bool:
    """Somebody joins a swap one of whose waiters has left."""
    return any(
        step.now.waiting[name].consumer in step.books.deserted
        for name in step.now.joined - step.books.joined
    )


# What the books and the state tell.
SEEN: dict[str, Callable[[Step], bool]] = {
    "a join": lambda step: bool(step.now.joined - step.books.joined),
    "a join after a cancel": _joined_what_lost_a_waiter,
    "a cancel at the grant": lambda step: _cancelled_while(step, step.books.jobs),
    "an owed consumer": lambda step: bool(step.now.owed.keys() - step.books.owed.keys()),
    "two swaps at once": lambda step: len(step.after.swaps) > 1,
    "two served in one step": lambda step: len(step.served) > 1,
    "a preload": lambda step: _operator(step, "preload"),
    "a restore": lambda step: _operator(step, "restore"),
    "a restart with something resident": _restarted_beside_a_resident,
    "a second plan in one swap": lambda step: (
        bool(step.unloads) and any(note.type == "PlannedAnew" for note in step.notes)
    ),
}
LABELS = (*NOTED, *REASONS, *(f"rejected: {code}" for code in CODES), *SEEN)


def _operator(step: Step, kind: str) -> bool:
    return any(request.operator == kind for request in step.after.requests.values())


def _noted(note: Note) -> Iterator[str]:
    if note.type == "Waits":
        yield f"waits: {note.details['why']}"
        return
    for label, (kind, key, begins) in NOTED.items():
        if note.type == kind and (not key or str(note.details.get(key)).startswith(str(begins))):
            yield label

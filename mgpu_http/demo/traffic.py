"""Who asks for what, and when. Pure: a seed makes one list of arrivals, and both halves get it.

It is an open loop: nobody waits for an earlier answer before asking again, so that a slow half gets
exactly what a fast one gets.
"""

from random import Random

from attrs import frozen

from mgpu_effects.settings import Kind


@frozen(kw_only=True)
class Arrival:
    """One request. `patience_s`: its client leaves when it has no whole answer by then."""

    name: str
    at_s: float
    kind: Kind
    patience_s: float


@frozen(kw_only=True)
class Habit:
    """Somebody who comes again and again, with the same requests each time.

    `steps`: what is asked for, and how many seconds after the first. `times`: how often all that
    is asked at once, at least and at most: one for a person, many for a batch.
    """

    name: str
    every_s: float
    steps: tuple[tuple[Kind, float], ...]
    patience_s: float
    times: tuple[int, int] = (1, 1)


HABITS = (
    Habit(
        name="assistant",
        every_s=10,
        steps=(("stt", 0.0), ("llm", 0.8), ("tts", 1.8)),
        patience_s=15,
    ),
    Habit(name="chat", every_s=9, steps=(("llm", 0.0),), patience_s=20),
    Habit(name="picture", every_s=20, steps=(("image", 0.0),), patience_s=45),
    Habit(name="recordings", every_s=50, steps=(("stt", 0.0),), patience_s=45, times=(6, 10)),
    Habit(name="pictures", every_s=50, steps=(("image", 0.0),), patience_s=60, times=(4, 6)),
    Habit(name="chats", every_s=50, steps=(("llm", 0.0),), patience_s=45, times=(3, 5)),
)


def arrivals(seed: int, seconds: float) -> tuple[Arrival, ...]:
    """Give everything that is asked for within so many seconds, in the order of its coming."""
    found = []
    for habit in HABITS:
        rng = Random(f"{seed} {habit.name}")  # noqa: S311 - to come again, not to be secret
        found += _of(habit, rng, seconds)
    return tuple(sorted(found, key=lambda one: (one.at_s, one.name)))


def _of(habit: Habit, rng: Random, seconds: float) -> list[Arrival]:
    """Everybody comes in every run, however short: the first time within its first half."""
    at_s, visit, found = rng.uniform(0, min(habit.every_s, seconds) / 2), 0, []
    while at_s < seconds:
        visit += 1
        for copy in range(1, rng.randint(*habit.times) + 1):
            for kind, after_s in habit.steps:
                arrival = Arrival(
                    name=f"{habit.name} {visit}.{copy} {kind}",
                    at_s=round(at_s + after_s + rng.uniform(0, 0.2), 3),
                    kind=kind,
                    patience_s=habit.patience_s,
                )
                found.append(arrival)
        at_s += habit.every_s * rng.uniform(0.6, 1.4)
    return [arrival for arrival in found if arrival.at_s < seconds]

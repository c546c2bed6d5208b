"""Chance comes in as an argument, so that a run is a function of it.

`random.Random(seed)` and Hypothesis' `randoms(use_true_random=False)` both fit. Integers only:
they shrink well, and they are the same on every machine.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Chance(Protocol):
    def randint(self, a: int, b: int, /) -> int:
        """Draw an integer, both ends included."""


class Plain:
    """No chance at all: of everything the first, and what may not happen does not."""

    def randint(self, a: int, _b: int, /) -> int:
        return a


def pick(chance: Chance, options: Sequence[T]) -> T:
    """Draw one of these; the first is the plainest."""
    return options[chance.randint(0, len(options) - 1)]


def likely(chance: Chance, per_mille: int) -> bool:
    """Draw a yes with so many chances in a thousand; the plain answer is no."""
    return per_mille > 0 and chance.randint(1, 1000) > 1000 - per_mille

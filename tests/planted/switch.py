"""Let one mutant take the place of its function while a test runs.

The text that mutmut makes of a module holds each function many times over, and a table of them. It
is made to import this instead of mutmut's own switch, which asks the environment at every call.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

# Which mutant is at work, by its module; nowhere else is anything changed.
active: dict[str, str] = {}
# What was called so far, as `module.function`; None: nobody asks.
called: set[str] | None = None

MutantDict = dict[str, Callable[..., Any]]
ORIGINAL = "_mutmut_orig"


def stem(mutant: str) -> str:
    """Give the name that all mutants of one function share."""
    return mutant.rpartition("__mutmut_")[0]


def wrap_in_trampoline(variants: MutantDict) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        module = function.__module__

        @wraps(function)
        def switched(*args: Any, **kwargs: Any) -> Any:
            original = variants[ORIGINAL]
            if called is not None:
                called.add(f"{module}.{stem(original.__name__)}")
            return variants.get(active.get(module, ORIGINAL), original)(*args, **kwargs)

        return switched

    return decorate

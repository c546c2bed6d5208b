"""The properties in words, for whoever is told that one is broken; docs/proving.md tells more."""

from collections.abc import Mapping

PROPERTIES: Mapping[str, str] = {
    "P1": "every admitted request ends once, by its deadline, and by itself where that is fair",
    "P2": "nothing behind a promoted request takes from it, and a victim is granted nothing",
    "P3": "nothing is unloaded for a swap unless with its whole set gone the target fits",
    "P4": "what serves, is busy, loads, is owed, pinned, managed or protected is not unloaded",
    "P5": "a consumer loads once at a time, whatever its waiters do",
    "P6": "an answer to nothing changes nothing",
    "P7": "nothing loads without room for it",
    "P8": "a request is not overtaken more often than the bound says",
    "P9": "a cancelled request leaves nothing behind, and nobody falls back for it",
    "P10": "counts are right, and no grant exceeds a limit",
    "P11": "the same events give the same decisions again",
    "P12": "a new run of the broker begins clean and meets reality",
    "P13": "the order of a configuration decides nothing",
    "P14": "nobody waits who could be served, or whose swap could start",
    "P15": "who was loaded for a waiter serves it before it goes, and a step ends",
    "planner": "a planner answers, the same each time, with names that may go and make room",
}

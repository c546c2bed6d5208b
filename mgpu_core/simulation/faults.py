"""What goes wrong in a run: each fault is off, or on with a rate of its own.

Rates are chances in a thousand: of a load, an unload, a probe, a sample, a job, an answer; those
of the last group, of each act in the script of a run (see `making`).
"""

from collections.abc import Mapping

from attrs import evolve, fields, frozen

from mgpu_core.simulation.chance import Chance, likely, pick


@frozen(kw_only=True)
class Faults:
    load_fails: int = 0
    load_hangs: int = 0  # its answer comes long after the scheduler gave it up
    load_late: int = 0  # it takes several times as long as usual
    unload_fails: int = 0
    unload_hangs: int = 0
    unload_keeps: int = 0  # it is accepted, and no memory comes free
    frees_late: int = 0  # the memory comes free seconds after the answer

    probe_flaps: int = 0  # no answer, or a bad one, from a service that is well
    probe_lies: int = 0  # it says loaded for unloaded, busy for idle
    probe_slow: int = 0  # its answer comes seconds after it looked
    sample_missing: int = 0
    sample_stale: int = 0  # it was taken seconds ago
    sample_wrong: int = 0

    job_fails: int = 0
    job_crashes: int = 0  # the whole service dies while it serves
    leaves_at_grant: int = 0  # the client goes in the very moment of its grant
    answered_twice: int = 0
    answer_lost: int = 0  # the answer to a load or unload
    answered_late: int = 0  # and so out of order

    client_leaves: int = 0
    foreign: int = 0  # another process takes memory, and gives it back
    busy: int = 0  # somebody works with a service past the broker
    operator: int = 0
    reconfigured: int = 0
    broker_crashes: int = 0
    clock_stops: int = 0

    def at_least(self, rates: Mapping[str, int]) -> "Faults":
        return evolve(
            self, **{name: max(rate, getattr(self, name)) for name, rate in rates.items()}
        )


CALM = Faults()
NAMES = tuple(field.name for field in fields(Faults))
# The last: everything fails in this way, which no mixture of rates would bring about.
RATES = (20, 100, 300, 1000)


def swarm(chance: Chance) -> Faults:
    """Draw which faults there are in a run, and how often: few at a time, or many, or none."""
    share = pick(chance, (0, 80, 80, 250, 500))
    faults = {name: pick(chance, RATES) for name in NAMES if likely(chance, share)}
    if likely(chance, 100):
        faults["sample_missing"] = 1000  # a host whose cards nobody can read
    return Faults(**faults)

"""Ways to schedule, by name, and what each makes of the same arrivals.

Each of them is the scheduler itself with other settings or another planner, on the same simulated
host: what differs between two runs is the policy, and nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import evolve, field, frozen

from mgpu_core.planners import Holder, Lru, OrderKey, Planner
from mgpu_core.scheduler import Scheduler
from mgpu_core.simulation.chance import Chance
from mgpu_core.simulation.measures import Measures, Meter
from mgpu_core.simulation.workload import FOREVER_US, Workload
from mgpu_core.simulation.world import World


class Belady(Lru):
    """Clairvoyant: whose next use lies furthest in the future goes first.

    A floor to compare with. It is given every arrival in advance; how many of them have been
    granted, and so which is next, it sees in the view.
    """

    def __init__(self, arrivals: Mapping[str, Sequence[int]]) -> None:
        self._arrivals = arrivals

    def order(self, holder: Holder) -> OrderKey:
        times, granted = self._arrivals.get(holder.name, ()), holder.uses + holder.serving
        never = granted >= len(times)
        return (-FOREVER_US if never else -times[granted], 0, holder.name)


@frozen(kw_only=True)
class Policy:
    """What it is called in a table, and what of a configuration makes it."""

    title: str
    settings: Mapping[str, Any] = field(factory=dict)
    planner: Callable[[Workload], Planner | None] = lambda _workload: None


POLICIES: Mapping[str, Policy] = {
    "fifo": Policy(
        title="strictly in order of arrival, loads beside work",
        settings={"overtake_bound": 0},
    ),
    "serial-lru": Policy(
        title="one lock: in order of arrival, one thing at a time",
        settings={"overtake_bound": 0, "overlap_loads": False},
    ),
    "llama-swap": Policy(
        title="llama-swap's: what is loaded first, without a bound",
        settings={"overtake_bound": None},
    ),
    "default": Policy(title="mgpu as shipped: what is loaded first, 8 overtakes at most"),
    "default-gdsf": Policy(
        title="the same, evicting what is cheap to bring back",
        settings={"eviction": "gdsf"},
    ),
    "belady": Policy(
        title="the same, knowing the future",
        planner=lambda workload: Belady(workload.arrivals()),
    ),
}


def simulate(workload: Workload, policy: Policy, chance: Chance) -> Measures:
    """Let the scheduler work off every arrival; the end of the last one ends the run."""
    config = evolve(workload.config, **policy.settings)
    world = World(
        config,
        chance=chance,
        script=workload.script,
        scheduler=Scheduler(config, policy.planner(workload)),
        traits=workload.traits,
        resident=frozenset(),
        rereads=True,
    )
    meter = Meter()
    for event, transition in world.run(world.now + FOREVER_US // 2):
        meter.see(event, transition, world.began)
        if meter.ended == len(workload.script):
            return meter.measures()
    assert not workload.script, f"{len(workload.script) - meter.ended} requests never end"
    return meter.measures()

"""A simulated host around the scheduler, and the properties that must hold in it.

`world` does what the scheduler says and answers as services, cards and clients would; `faults`
says what goes wrong; `making` draws configurations and traffic; `oracles` judge every step from
outside; `reach` tells what happened; `run` plays one whole run, and campaigns of them.

Nothing here reads a clock or makes chance: time is virtual, and whoever calls brings the chance.
"""

from mgpu_core.simulation.chance import Chance
from mgpu_core.simulation.faults import Faults, swarm
from mgpu_core.simulation.making import unfair_because
from mgpu_core.simulation.oracles import ORACLES, Judge, Violation
from mgpu_core.simulation.properties import PROPERTIES
from mgpu_core.simulation.run import Report, campaign, first_violation, folded, play
from mgpu_core.simulation.shrinking import judged, smallest
from mgpu_core.simulation.world import Ask, Script, World

__all__ = [
    "ORACLES",
    "PROPERTIES",
    "Ask",
    "Chance",
    "Faults",
    "Judge",
    "Report",
    "Script",
    "Violation",
    "World",
    "campaign",
    "first_violation",
    "folded",
    "judged",
    "play",
    "smallest",
    "swarm",
    "unfair_because",
]

"""The scheduler: a pure state machine. Events in, effects and notes out.

`Scheduler(config, planner).step(state, event)` gives `Transition(state, effects, notes)`.
"""

from mgpu_core.config import Config, Consumer, Gpu
from mgpu_core.planners import Holder, Planner, View
from mgpu_core.scheduler import Scheduler, Transition
from mgpu_core.state import State

__all__ = [
    "Config",
    "Consumer",
    "Gpu",
    "Holder",
    "Planner",
    "Scheduler",
    "State",
    "Transition",
    "View",
]

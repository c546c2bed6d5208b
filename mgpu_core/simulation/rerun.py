"""A recorded run lived through again in the simulated host, under any configuration or planner."""

from collections.abc import Iterator, Mapping

from attrs import evolve

from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Config, in_order
from mgpu_core.planners import Planner
from mgpu_core.scheduler import Scheduler
from mgpu_core.simulation.chance import Plain
from mgpu_core.simulation.faults import CALM, Faults
from mgpu_core.simulation.measures import Meter
from mgpu_core.simulation.recorded import Recording
from mgpu_core.simulation.world import World
from mgpu_core.state import ConsumerState, Residency, State, initial_state

UNREAD = Faults(sample_missing=1000)
# Whoever waits still so long after the last arrival is left waiting.
AFTERWARDS_US = 24 * 3600 * SECOND_US


def rerun(
    recording: Recording,
    meter: Meter,
    config: Config | None = None,
    planner: Planner | None = None,
) -> Iterator[int]:
    """Let everybody come again, until nobody waits; the meter sees it all.

    Give the time of each event, in microseconds. `config` None: that of the log, with every change
    of it; a new one holds from the beginning to the end.
    """
    script = recording.script
    if config is not None:
        script = tuple(one for one in script if not isinstance(one[1], ev.Reconfigured))
    config = in_order(config or recording.config)
    world = World(
        config,
        chance=Plain(),
        script=script,
        faults=CALM if recording.cards_mib else UNREAD,
        scheduler=Scheduler(config, planner),
        traits=dict.fromkeys(config.consumers, recording.usual) | {**recording.traits},
        resident=frozenset(),
        state=_remembered(recording, config),
        cards_mib=_cards_mib(recording, config),
        sample_ms=(recording.sample_ms, recording.sample_ms),
        repolls=True,
        polls=recording.polls,
        resumes=recording.resumes,
    )
    for event, transition in world.run(recording.end_us + AFTERWARDS_US):
        if event.at > recording.end_us and not meter.waiting:
            return
        meter.see(event, transition)
        yield event.at


def _remembered(recording: Recording, config: Config) -> State:
    """Give what the recorded run knew at its beginning. Who was on the way comes again, so of that
    it knows nothing; a run that starts lets go of more.
    """
    fresh, known = initial_state(config), recording.state
    return evolve(
        fresh,
        at=recording.start_us,
        run=known.run,
        epoch=known.epoch,
        arrivals=known.arrivals,
        age=known.age,
        last_work=known.last_work,
        cards=known.cards if recording.resumes else {},
        consumers={
            name: _at_rest(known.consumers[name]) if name in known.consumers else one
            for name, one in fresh.consumers.items()
        },
    )


def _at_rest(one: ConsumerState) -> ConsumerState:
    """Give what is believed of it once it does nothing; who was just moving is taken to be out."""
    moving = {Residency.LOADING, Residency.UNLOADING}
    return evolve(
        one,
        residency=Residency.ABSENT if one.residency in moving else one.residency,
        operation=None,
        cleared=False,
        starter=None,
        leaving=False,
    )


def _cards_mib(recording: Recording, config: Config) -> Mapping[int, int]:
    """Give the cards as they were read, but for those that the new configuration resizes."""
    old = recording.config.gpus
    return {
        gpu: mib
        for gpu, mib in recording.cards_mib.items()
        if gpu in config.gpus
        and (
            config.gpus[gpu].total_mib is None
            or (gpu in old and old[gpu].total_mib == config.gpus[gpu].total_mib)
        )
    }

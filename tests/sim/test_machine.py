"""The world step by step: Hypothesis decides what the environment does next, and makes it small."""

from unittest import mock

import pytest
from attrs import evolve, fields
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Config
from mgpu_core.simulation.chance import Chance
from mgpu_core.simulation.faults import CALM, RATES, Faults
from mgpu_core.simulation.making import Setting, draw_changed, draw_config
from mgpu_core.simulation.oracles import Violation
from mgpu_core.simulation.run import Run
from mgpu_core.simulation.world import Act, Ask, BrokerCrash, Busy, ClockStops, Foreign
from mgpu_core.transcript import transcript

CHANCE = st.randoms(use_true_random=False)
# Those of a service, a sample, an answer; the environment's own are the rules.
RATED = [field.name for field in fields(Faults)][
    : [f.name for f in fields(Faults)].index("foreign")
]
NUMBER = st.integers(0, 11)
SECONDS = st.sampled_from([0.2, 1, 5, 20])


@st.composite
def configurations(draw: st.DrawFn, *, fair: bool) -> Config:
    return draw_config(draw(CHANCE), fair=fair)


def us(seconds: float) -> int:
    return round(seconds * SECOND_US)


class Environment(RuleBasedStateMachine):
    """A host of which each rule is something that may happen to it next."""

    @initialize(data=st.data(), fair=st.booleans(), chance=CHANCE)
    def begin(self, data: st.DataObject, fair: bool, chance: Chance) -> None:
        config = data.draw(configurations(fair=fair))
        setting = Setting(config=config, script=(), faults=CALM, fair=fair)
        self.chance = chance
        self.run_ = Run(setting, chance)
        self.violation: Violation | None = None
        self.names = list(config.consumers) or ["nobody"]
        self.pass_by(0.2)

    def happens(self, act: Act) -> None:
        self.run_.calm = self.run_.calm and isinstance(act, Ask)
        self.run_.world.happen(act)
        self.pass_by(0)

    def pass_by(self, seconds: float) -> None:
        self.violation = self.violation or self.run_.until(self.run_.world.now + us(seconds))

    def name(self, number: int) -> str:
        return self.names[number % len(self.names)]

    # ------------------------------------------------------------------------------- clients

    @rule(
        number=NUMBER,
        work=SECONDS,
        priority=st.sampled_from([None, None, 0, 4]),
        deadline=st.none() | SECONDS,
    )
    def a_client_asks(
        self, number: int, work: float, priority: int | None, deadline: float | None
    ) -> None:
        deadline_us = None if deadline is None else us(deadline)
        self.happens(
            Ask(
                consumer=self.name(number),
                work_us=us(work),
                priority=priority,
                deadline_us=deadline_us,
            )
        )

    @rule(numbers=st.lists(NUMBER, min_size=2, max_size=8), work=SECONDS)
    def many_clients_ask(self, numbers: list[int], work: float) -> None:
        for number in numbers:
            self.happens(Ask(consumer=self.name(number), work_us=us(work)))

    @rule(number=NUMBER, seconds=SECONDS)
    def a_client_asks_and_time_passes(self, number: int, seconds: float) -> None:
        self.happens(Ask(consumer=self.name(number)))
        self.pass_by(seconds)

    @precondition(lambda self: self.run_.world.clients)
    @rule(number=NUMBER)
    def a_client_leaves(self, number: int) -> None:
        clients = list(self.run_.world.clients)
        self.run_.world.leave(clients[number % len(clients)])
        self.pass_by(0)

    # ---------------------------------------------------------------------------------- time

    @rule()
    def the_next_happening(self) -> None:
        self.violation = self.violation or self.run_.until(self.run_.world.next_at)

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.pass_by(seconds)

    @rule(seconds=SECONDS)
    def the_clock_stands_still(self, seconds: float) -> None:
        self.happens(ClockStops(us=us(seconds)))

    # ------------------------------------------------------------------------------ operators

    @rule(number=NUMBER, force=st.booleans(), everybody=st.booleans())
    def an_operator_unloads(self, number: int, force: bool, everybody: bool) -> None:
        consumers = () if everybody else (self.name(number),)
        self.happens(ev.Unload(at=0, consumers=consumers, force=force and not everybody))

    @rule(number=NUMBER, only_if_free=st.booleans())
    def an_operator_loads(self, number: int, only_if_free: bool) -> None:
        self.happens(ev.Load(at=0, consumer=self.name(number), only_if_free=only_if_free))

    @rule(number=NUMBER, pinned=st.booleans())
    def an_operator_pins(self, number: int, pinned: bool) -> None:
        self.happens(ev.Pin(at=0, consumer=self.name(number), pinned=pinned))

    @rule(drain=st.booleans())
    def an_operator_drains(self, drain: bool) -> None:
        self.happens(ev.Drain(at=0) if drain else ev.Resume(at=0))

    @rule()
    def the_configuration_is_reloaded(self) -> None:
        config = draw_changed(self.chance, self.run_.setting.config)
        self.happens(ev.Reconfigured(at=0, config=config))

    # ------------------------------------------------------------------------ what goes wrong

    @rule(gpu=st.integers(0, 2), mib=st.sampled_from([2_000, 6_000, 15_000, 0]))
    def others_take_memory(self, gpu: int, mib: int) -> None:
        gpus = list(self.run_.setting.config.gpus)
        self.happens(Foreign(gpu=gpus[gpu % len(gpus)], mib=mib))

    @rule(number=NUMBER, seconds=SECONDS)
    def a_service_works_for_others(self, number: int, seconds: float) -> None:
        self.happens(Busy(consumer=self.name(number), us=us(seconds)))

    @precondition(lambda self: self.run_.world.services)
    @rule(number=NUMBER)
    def a_service_dies(self, number: int) -> None:
        self.run_.calm = False
        names = list(self.run_.world.services)
        self.run_.world.die(names[number % len(names)])
        self.pass_by(0)

    @rule(seconds=SECONDS)
    def the_broker_crashes(self, seconds: float) -> None:
        self.happens(BrokerCrash(down_us=us(seconds)))

    @rule(fault=st.sampled_from(RATED), rate=st.sampled_from([0, *RATES]))
    def something_begins_to_fail(self, fault: str, rate: int) -> None:
        self.run_.calm = False
        self.run_.world.faults = evolve(self.run_.world.faults, **{fault: rate})

    # ---------------------------------------------------------------------------------- judged

    @invariant()
    def no_property_is_broken(self) -> None:
        assert self.violation is None, self.told(self.violation)

    def teardown(self) -> None:
        """Whatever has happened: once all is well, every wait ends, and a replay gives the same."""
        if hasattr(self, "run_") and self.violation is None:
            found = self.run_.after()
            assert found is None, self.told(found)

    def told(self, violation: Violation) -> str:
        return f"{violation}\n\n{transcript(self.run_.setting.config, self.run_.log, last=200)}"


TestEnvironment = Environment.TestCase
TestEnvironment.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_what_breaks_a_property_is_noticed() -> None:
    few = settings(TestEnvironment.settings, max_examples=50, phases=(Phase.generate,))
    with (
        mock.patch("mgpu_core.walk.no_room", return_value=None),
        pytest.raises(AssertionError, match="P10"),
    ):
        run_state_machine_as_test(Environment, settings=few)

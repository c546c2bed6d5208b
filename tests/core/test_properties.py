"""Random histories in a toy world: what must hold after every event, whatever happens."""

import json
from typing import Any, TypeAlias
from unittest import mock

from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.codec import decode_event, decode_state, encode_effect, encode_event, encode_state
from mgpu_core.config import SECOND_US, Consumer, Gpu
from mgpu_core.draft import Draft
from mgpu_core.scheduler import Scheduler
from mgpu_core.walk import walk as walk_those_concerned
from tests.core.world import TOTAL_MIB, CalmWorld, World

PROFILE = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
FOREVER_US = 10**6 * SECOND_US

Action: TypeAlias = tuple[str, int, int]
CALM = [*["ask", "answer"] * 3, "end", "end", "leave", "measure", "pass"]
WILD = [*CALM, "ask", "answer", "repeat", "look", "operate"]
SMALL = st.integers(0, 11)

SIZES: tuple[dict[int, int], ...] = (
    {0: 4_000},
    {0: 9_000},
    {0: 13_000},
    {0: 20_000},
    {1: 13_000},
    {0: 9_000, 1: 9_000},
    {0: 0},
    {},
)


@st.composite
def consumers(draw: st.DrawFn, *, evictable: bool, calm: bool) -> list[Consumer]:
    """Two to five of them. `evictable`: nobody stays in for ever; `calm`: no special rights."""
    made = []
    for name in "abcde"[: draw(st.integers(2, 5))]:
        routes = draw(st.sampled_from(["both", "both", "both", "unload", "driver", "none"]))
        if evictable and routes == "none":
            routes = "both"
        made.append(
            Consumer(
                name=name,
                server="shared" if routes == "driver" and name < "c" and not calm else name,
                vram_mib=draw(st.sampled_from(SIZES)),
                load_route=routes == "both",
                unload_route=routes in {"both", "unload"},
                driver="process" if routes == "driver" else "none",
                vram_managed=not evictable and draw(st.integers(0, 7)) == 7,
                gpu_slot=calm or draw(st.integers(0, 3)) != 3,
                can_coexist_with=() if evictable or draw(st.integers(0, 4)) != 4 else ("a", "b"),
                max_concurrency=draw(st.sampled_from([1, 1, 2, 10])),
                max_pending=draw(st.sampled_from([64, 64, 3])),
                priority=draw(st.sampled_from([2, 2, 0, 4])),
                preload=not calm and draw(st.integers(0, 3)) == 3,
                idle_unload_us=draw(st.sampled_from([None, None, 20 * SECOND_US])),
            )
        )
    return made


@st.composite
def histories(
    draw: st.DrawFn, *, evictable: bool = False, calm: bool = False, **rest: Any
) -> tuple[World, list[Action]]:
    """A world, and what shall happen in it."""
    made = draw(consumers(evictable=evictable, calm=calm))
    slots, absent = draw(st.sampled_from([1, 1, 2, None])), draw(st.integers(0, 31))
    if not evictable:
        rest["overlap_loads"] = draw(st.booleans())
        rest["when_unfit"] = draw(st.sampled_from(["wait", "wait", "reject", "admit"]))
        rest["restore_after_us"] = draw(st.sampled_from([None, 30 * SECOND_US]))
    kind = CalmWorld if calm else World
    core = kind(
        *made,
        gpus=tuple(Gpu(index=i, total_mib=TOTAL_MIB, max_parallel=slots) for i in (0, 1)),
        overtake_bound=draw(st.sampled_from([1, 2, 8, None])),
        eviction=draw(st.sampled_from(["lru", "lru", "gdsf"])),
        absent=[c.name for number, c in enumerate(made) if calm or absent >> number & 1],
        **rest,
    )
    words = CALM if calm else WILD if evictable else [*WILD, "govern"]
    return core, draw(st.lists(st.tuples(st.sampled_from(words), SMALL, SMALL), max_size=60))


@PROFILE
@given(histories())
def test_whatever_happens_every_step_keeps_the_rules_and_every_wait_ends(
    history: tuple[World, list[Action]],
) -> None:
    core, actions = history
    for action in actions:
        core.act(*action)
    core.end_all(limit_s=700)


@PROFILE
@given(histories(evictable=True, queue_timeout_us=FOREVER_US))
def test_where_nothing_stays_in_the_way_nobody_waits_for_a_time_out(
    history: tuple[World, list[Action]],
) -> None:
    core, actions = history
    for action in actions:
        core.act(*action)
    core.make_peace()
    core.end_all(limit_s=700)
    own_deadline = {e.request for e in core.past if isinstance(e, ev.Request) and e.deadline}
    for effect in core.effects:
        if isinstance(effect, fx.Reject) and effect.code == "queue_timeout":
            assert effect.request in own_deadline


@PROFILE
@given(
    histories(
        evictable=True,
        calm=True,
        queue_timeout_us=FOREVER_US,
        load_timeout_us=FOREVER_US,
        unload_timeout_us=FOREVER_US,
    )
)
def test_in_calm_weather_memory_is_kept_overtaking_is_bounded_and_everybody_is_served(
    history: tuple[World, list[Action]],
) -> None:
    core, actions = history
    for action in actions:
        core.act(*action)
    core.end_all(limit_s=700)
    refused = {e.code for e in core.effects if isinstance(e, fx.Reject)}
    assert refused <= {"overloaded"}


def look_at_everybody(d: Draft) -> None:
    d.concerned = None
    walk_those_concerned(d)


@PROFILE
@given(histories())
def test_who_is_not_looked_at_could_not_have_moved_on(
    history: tuple[World, list[Action]],
) -> None:
    core, actions = history
    for action in actions:
        core.act(*action)
    state = core.scheduler.initial()
    for event in core.past:
        quick = core.scheduler.step(state, event)
        with mock.patch("mgpu_core.walk.walk", look_at_everybody):
            whole = core.scheduler.step(state, event)
        assert quick.effects == whole.effects
        assert evolve(quick.state, reasons={}) == evolve(whole.state, reasons={})
        state = quick.state


@PROFILE
@given(histories(), st.floats(0, 1))
def test_a_replay_gives_the_same_effects_from_any_snapshot_and_in_any_order_of_the_configuration(
    history: tuple[World, list[Action]], where: float
) -> None:
    core, actions = history
    for action in actions:
        core.act(*action)
    backwards = evolve(
        core.config,
        consumers=dict(reversed(core.config.consumers.items())),
        gpus=dict(reversed(core.config.gpus.items())),
    )
    scheduler = Scheduler(backwards)
    state = scheduler.initial()
    for number, (event, told) in enumerate(zip(core.past, core.told, strict=True)):
        if number == round(where * len(core.past)):
            state = decode_state(json.loads(json.dumps(encode_state(state))))
        transition = scheduler.step(state, decode_event(encode_event(event), event.at))
        assert [encode_effect(e) for e in transition.effects] == told
        state = transition.state
    assert state == core.state

"""The runtime's one loop: it owns the scheduler's state, and nothing else changes it.

An event is taken from the inbox, stamped, given to the scheduler and written to the log; only then
its effects are begun (`carry_out.py`), and each of them comes back as an event. What is in the
inbox is bounded by what is admitted: each job, command and look has one event in it at a time.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

from mgpu_core.codec import (
    encode_config,
    encode_effect,
    encode_event,
    encode_note,
    encode_state,
)
from mgpu_core.config import SECOND_US
from mgpu_core.events import Cancel, Event, Reconfigured, Request, Shutdown, Started
from mgpu_core.lifecycle import carried_over
from mgpu_core.notes import Note
from mgpu_core.planners import Planner
from mgpu_core.replay import Record
from mgpu_core.scheduler import Scheduler, Transition
from mgpu_core.state import Residency, State
from mgpu_core.why import Waits
from mgpu_effects.calls import control_session
from mgpu_effects.carry_out import Executor
from mgpu_effects.clock import Clock
from mgpu_effects.core_config import core_config
from mgpu_effects.errors import SHUTTING_DOWN, BrokerError
from mgpu_effects.event_log import EventLog, Live, default_dir, recall
from mgpu_effects.footprints import Footprints
from mgpu_effects.gpu_processes import Holders
from mgpu_effects.jobs import Job
from mgpu_effects.proxy import open_session
from mgpu_effects.services import Services
from mgpu_effects.settings import Settings
from mgpu_effects.units import is_model_name, unit_of, units, with_model, without_model
from mgpu_effects.watch import Watch

MakeEvent: TypeAlias = Callable[[int], Event]
# Told the transition of an event once it is written and its effects have begun.
Stepped: TypeAlias = "asyncio.Future[Transition]"

# What every request leaves: the event log has it, the text log would hold little else.
ROUTINE = frozenset({"Granted", "Served"})

# Of so many requests it is known after their end what they waited for, each in so many intervals;
# the event log knows it of all.
ENDED_KEPT = 256
INTERVALS_KEPT = 128
# Of models that the configuration does not name so many are kept: any client may ask for one.
MOST_MET = 32

_log = logging.getLogger(__name__)
_decisions = logging.getLogger("mgpu.decisions")


class Broker:
    """The scheduler at work on real services.

    `failed` is set when the scheduler itself turned out to be defective: what is served goes on,
    nothing more is granted, and the process had better end.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        log_dir: Path | None = None,
        planner: Planner | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings
        self.units = units(settings)
        self.run = secrets.token_hex(4)
        self.failed = asyncio.Event()
        self._clock = clock or Clock()
        self.started_at = self._clock.now()
        self._planner = planner
        self._scheduler = Scheduler(core_config(settings), planner)
        self.state: State = self._scheduler.initial()
        # What each request of this run waited for: those here, and the last ones that have ended.
        self.waits = Waits(kept=ENDED_KEPT, most=INTERVALS_KEPT)
        # Told of every step, in order; they may not raise.
        self.observers: list[Callable[[Transition], None]] = []
        self._seq = 0
        self._ended = False
        # The models that only `*` covers and that somebody asked for, in that order.
        self._met: dict[str, tuple[str, str]] = {}
        self._meeting = asyncio.Lock()
        # None ends the loop, after all that came before it; a future is only told its turn.
        self._inbox: asyncio.Queue[
            tuple[MakeEvent, Stepped | None] | asyncio.Future[None] | None
        ] = asyncio.Queue()
        configured = settings.event_log.dir
        self._event_log = EventLog(
            log_dir or (Path(configured) if configured else default_dir()),
            settings.event_log,
            self.run,
            version("mgpu"),
            lambda: (encode_config(self.state.config), encode_state(self.state)),
        )

        self.footprints = Footprints(self._event_log.directory, lambda: self.state)

    # ------------------------------------------------------------------------ start, stop, reload

    async def start(self) -> None:
        """Begin, with what the last run remembered; raises EventLogError where the log can't be
        written.
        """
        self._event_log.open()
        memory = recall(self._event_log.directory, self._planner)
        self._seq = memory.seq
        if memory.state is not None:
            self.state = carried_over(memory.state, self.state.config, self._clock.now())
        self._event_log.begin(self._seq + 1)
        self.footprints.recall()
        self._session = open_session()
        self._control = control_session()
        self._services = Services(self._control, self._look_at, self._used_mib)
        self._watch = Watch(self._services, self._clock, self.post, self.footprints)
        self._executor = Executor(
            self._services, self._watch, self._session, self._clock, self.post
        )
        self._services.configure(self.settings)
        await self._watch.configure(self.settings)
        self._watch.follow(self.state.consumers)
        self._loop = asyncio.create_task(self._run())
        await self.apply(lambda at: Started(at=at, run=self.run))

    async def stop(self) -> None:
        """Refuse what waits, give what is served its time, then end everything."""
        with contextlib.suppress(BrokerError):
            await self.apply(lambda at: Shutdown(at=at))
        await self._executor.finish_serving(self.settings.scheduler.shutdown_grace_s)
        await self._watch.close()
        await self.footprints.save(now=True)
        await self._executor.close()
        self._ended = True
        self._inbox.put_nowait(None)
        await self._loop
        await self._services.close()
        await self._session.close()
        await self._control.close()
        await self._event_log.close()

    async def reload(self, settings: Settings) -> None:
        """Let a checked new configuration take over; nothing resident or admitted is lost.

        `listen` and `event_log` take a restart.
        """
        self._met.clear()
        await self._take_over(settings)

    async def meet(self, server: str, model: str) -> str:
        """Give a model that only `*` covers a unit of its own, and the unit's name.

        Raises `overloaded` where so many others were met, and all of them are in use, and
        `bad_request` for what can be no name of a model.
        """
        if not is_model_name(model):
            message = "a model's name has no spaces and at most 200 characters"
            raise BrokerError(code="bad_request", message=message, consumer=server)
        name = unit_of(server, model)
        async with self._meeting:
            if name not in self.units:
                settings = self._room_for_a_model(server)
                await self._take_over(with_model(settings, server, model))
                self._met[name] = server, model
                await self._looked_at(name)
        return name

    def has_met(self, server: str, model: str) -> bool:
        """Say whether a model is known only because somebody asked for it."""
        return unit_of(server, model) in self._met

    def _room_for_a_model(self, server: str) -> Settings:
        if len(self._met) < MOST_MET:
            return self.settings
        for name in self._met:
            believed = self.state.consumers[name]
            unused = name not in self.state.waiting and name not in self.state.serving
            if unused and believed.residency is Residency.ABSENT:
                return without_model(self.settings, *self._met.pop(name))
        raise BrokerError(
            code="overloaded",
            message=f"{MOST_MET} models are in use that the configuration does not name",
            consumer=server,
            retryable=True,
        )

    async def _looked_at(self, name: str) -> None:
        """Wait for the first look at a unit, or until it should have come: what is assumed of a
        unit before that may be that it is loaded.
        """
        looked = asyncio.Event()

        def observe(transition: Transition) -> None:
            believed = transition.state.consumers.get(name)
            if believed is None or believed.last_probe is not None:
                looked.set()

        self.observers.append(observe)
        try:
            # A look that was under way did not include it.
            async with asyncio.timeout(2 * self.settings.probe.timeout_s):
                await looked.wait()
        except TimeoutError:
            pass
        finally:
            self.observers.remove(observe)

    async def _take_over(self, settings: Settings) -> None:
        config = core_config(settings)
        self._services.configure(settings)
        self.settings, self.units = settings, units(settings)
        await self.apply(lambda at: Reconfigured(at=at, config=config))
        await self._watch.configure(settings)

    # ------------------------------------------------------------------------------------- jobs

    def submit(self, job: Job) -> None:
        """Take over the job; `job.done` is set when its client has been answered.

        Raises `shutting_down` when the broker has ended.
        """
        if self._ended:
            raise SHUTTING_DOWN
        wait_us = None if job.max_wait_s is None else int(job.max_wait_s * SECOND_US)
        self._executor.add(job)
        self.post(
            lambda at: Request(
                at=at,
                request=job.request,
                consumer=job.consumer,
                kind=job.kind,
                priority=job.priority,
                deadline=None if wait_us is None else at + wait_us,
            )
        )

    def relay(self, job: Job) -> None:
        """Take over a job that needs no GPU: it is served at once, without the scheduler."""
        self._executor.relay(job)

    def leave(self, request: str) -> None:
        """The client has gone: out of the queue, or as `on_client_gone` says while it is served."""
        job = self._executor.get(request)
        if job is not None and not job.done.is_set():
            job.gone.set()
            # One that is relayed, or refused already, is none of the scheduler's.
            if job.granted is not None or not job.decided:
                self.post(lambda at: Cancel(at=at, request=request))

    def cancel(self, request: str) -> bool:
        """An operator ends the request, its client gets `cancelled`; False: there is none.

        A load that an operator asked for is a request too, without a client. Where the client has
        its answer already, the job that the service still works at is cancelled.
        """
        job = self._executor.get(request)
        if job is None and request not in self.state.requests:
            return False
        if job is not None:
            job.revoked.set()
        self.post(lambda at: Cancel(at=at, request=request))
        return True

    @property
    def lost_events(self) -> int:
        """How many events the log could not take."""
        return self._event_log.lost

    @property
    def live(self) -> Live:
        """The last lines of the event log, and those to come."""
        return self._event_log.live

    @property
    def log_dir(self) -> Path:
        return self._event_log.directory

    async def holders(self) -> Holders | None:
        """Say who held the memory of the cards not long ago; None: nobody looked yet."""
        return await self._watch.holders()

    async def models_of(self, server: str) -> list[str]:
        """Name the models that a server lists; none where it does not answer."""
        return await self._services.listed_models(server, self.settings.probe.timeout_s)

    async def _used_mib(self, cards: Collection[int]) -> int | None:
        return await self._watch.used_mib(cards)

    def _look_at(self, consumer: str) -> None:
        self._watch.probe(consumer)

    # --------------------------------------------------------------------------------- the loop

    def post(self, make: MakeEvent) -> None:
        """Hand in an event; it is made with the time at which it is taken."""
        self._inbox.put_nowait((make, None))

    async def apply(self, make: MakeEvent) -> Transition:
        """Hand in an event and wait for its step.

        Raises `scheduler_error` if there is none, and `shutting_down` when the broker has ended.
        """
        if self._ended:
            raise SHUTTING_DOWN
        stepped: Stepped = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait((make, stepped))
        return await stepped

    async def takes_events(self) -> bool:
        """Wait for a turn in the inbox, as an event does; False: the scheduler has failed."""
        turn = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait(turn)
        await turn
        return not self.failed.is_set()

    async def _run(self) -> None:
        while (entry := await self._inbox.get()) is not None:
            if isinstance(entry, asyncio.Future):
                if not entry.done():  # who waited may have given up
                    entry.set_result(None)
                continue
            make, stepped = entry
            transition = self._advance(make)
            if stepped is None or stepped.done():
                continue
            if transition is None:
                stepped.set_exception(_out_of_order())
            else:
                stepped.set_result(transition)

    def _advance(self, make: MakeEvent) -> Transition | None:
        """Take one event. A defect of the scheduler ends its work, never the loop."""
        if not self.failed.is_set():
            try:
                return self._step(make(max(self._clock.now(), self.state.at)))
            except Exception:  # noqa: BLE001 - whatever it is, what is served goes on
                _log.critical("a defect of the scheduler after event %d", self._seq, exc_info=True)
                self.failed.set()
        for request in self._executor.waiting():
            self._executor.refuse(request, _out_of_order())
        return None

    def _step(self, event: Event) -> Transition:
        before = self.state
        transition = self._scheduler.step(before, event)
        self._seq += 1
        self.state = transition.state
        record = Record(
            seq=self._seq,
            at=transition.state.at,
            event=encode_event(event),
            effects=[encode_effect(effect) for effect in transition.effects],
            notes=[encode_note(note) for note in transition.notes],
        )
        self._event_log.append(record.seq, record.at, record.event, record.effects, record.notes)
        self.waits.see(record)
        self.footprints.see(event, before, transition.state)
        for note in transition.notes:
            if note.type not in ROUTINE:
                _decisions.info("%s", _line(note))
        others = self.state.consumers.keys() != before.consumers.keys()
        if others:  # the effects may be to probe the new ones
            self._watch.follow(self.state.consumers)
        for effect in transition.effects:
            self._executor.carry_out(effect)
        if isinstance(event, Cancel):
            self._executor.cancel(event.request)
        if others:
            self._executor.forget_all_but(self.state.consumers)
        for observe in self.observers:
            observe(transition)
        return transition


def _line(note: Note) -> str:
    texts = (
        f"{key}={','.join(value) if isinstance(value, tuple) else value}"
        for key, value in note.told.items()
        if key != "type"
    )
    return " ".join([note.type, *texts])


def _out_of_order() -> BrokerError:
    return BrokerError(
        code="scheduler_error", message="the scheduler failed, see the log of the broker"
    )

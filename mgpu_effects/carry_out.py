"""The scheduler's effects, carried out: each in a task of its own, and each comes back as an event.

A task's end, however it ends, makes its event. So every `Serve`, `StartUnload` and `StartLoad` has
exactly one completion, and every job exactly one answer.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any, TypeAlias, TypeVar

from aiohttp import ClientSession
from attrs import evolve

from mgpu_core import effects as fx
from mgpu_core.events import Event, Outcome, ServeDone, SwapDone, Tick, UnloadDone
from mgpu_effects.clock import Clock
from mgpu_effects.errors import SHUTTING_DOWN, BrokerError, of_reject
from mgpu_effects.following import JobId, find_job
from mgpu_effects.jobs import AnswerCopy, Job, Kept, NoBody
from mgpu_effects.proxy import serve
from mgpu_effects.services import Services
from mgpu_effects.settings import ConsumerSettings
from mgpu_effects.tunnel import Tunnels
from mgpu_effects.watch import Watch

Post: TypeAlias = Callable[[Callable[[int], Event]], None]
T = TypeVar("T")

# How long a client may take to read a short answer of ours.
ANSWER_S = 10

# What a client that waits is told of a job that made nothing for it.
UNDONE: Mapping[Outcome, tuple[str, str]] = {
    "ok": ("upstream_disconnected", "did its job, and does not say where the result is"),
    "upstream_error": ("upstream_disconnected", "could not do its job; its own history says why"),
    "timeout": ("upstream_timeout", "did not finish its job in time"),
    "disconnected": ("cancelled", "gave its job up: it was cancelled"),
}

_log = logging.getLogger(__name__)


class Executor:
    """Holds the jobs and the tasks that work on them.

    `session` is for the clients' work; `post` takes a maker of events, stamped when it is taken.
    """

    def __init__(
        self, services: Services, watch: Watch, session: ClientSession, clock: Clock, post: Post
    ) -> None:
        self._services = services
        self._watch = watch
        self._session = session
        self._tunnels = Tunnels(session)
        self._clock = clock
        self._post = post
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._serving: dict[str, asyncio.Task[Outcome]] = {}
        # Why a job that is served is being ended, where neither its client nor its service did it.
        self._ending: dict[str, BrokerError] = {}
        self._loads: dict[str, asyncio.Task[str | None]] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._handlers: Mapping[type, Callable[[Any], None]] = {
            fx.Serve: self._serve,
            fx.Reject: self._reject,
            fx.StartUnload: self._start_unload,
            fx.StartLoad: self._start_load,
            fx.SampleGpu: lambda _effect: watch.sample(),
            fx.Probe: lambda effect: watch.probe(effect.consumer),
            fx.WakeAt: lambda effect: self._wake_at(effect.time),
        }

    def carry_out(self, effect: fx.Effect) -> None:
        """Begin with it; never raises."""
        self._handlers[type(effect)](effect)

    def forget_all_but(self, names: Collection[str]) -> None:
        """Let go of the services of other consumers: the scheduler knows them no more."""

        def ended(task: asyncio.Task[None]) -> None:
            self._code(task, "ending the drivers of removed consumers")

        self._supervise(self._services.forget_all_but(names), ended)

    # ------------------------------------------------------------------------------- jobs

    def add(self, job: Job) -> None:
        job.submitted = self._clock.now()
        self._jobs[job.request] = job

    def get(self, request: str) -> Job | None:
        """Give a job that is not over."""
        return self._jobs.get(request)

    def waiting(self) -> list[str]:
        """Name the jobs that nothing was decided on yet."""
        return [name for name, job in self._jobs.items() if not job.decided]

    def refuse(self, request: str, error: BrokerError) -> None:
        """Answer a job that waits; nothing if there is none (any more)."""
        job = self._jobs.get(request)
        if job is not None and not job.decided:
            job.decided = True
            self._supervise(self._answer(job, error), lambda _task: self._finish(job))

    def relay(self, job: Job) -> None:
        """Serve it without asking the scheduler."""
        self.add(job)
        self._begin(job, lambda _outcome: None)

    def cancel(self, request: str) -> None:
        """Let a job go that an operator, or its own client, wants no more."""
        job = self._jobs.get(request)
        if job is None:
            return
        error = _error("cancelled", "an operator cancelled it", job.consumer)
        if not job.decided:
            self.refuse(request, error)
            return
        # For a client that has gone the proxy sees to it, for one that was answered who follows it.
        # Who is to follow needs the whole answer, as it names what an operator wants to end.
        drained = job.gone.is_set() and (job.copy is not None or not job.revoked.is_set())
        if drained or job.done.is_set():
            return
        keeps_on = job.waits or self._services[job.consumer].on_client_gone != "close"
        if job.copy is not None and keeps_on:
            self._supervise(self._let_go(job, error), lambda _task: None)
        else:
            self._end(request, error)

    async def _let_go(self, job: Job, error: BrokerError) -> None:
        """Give the client the error, and read on: the answer names what is to be cancelled."""
        await self._answer(job, error)
        job.gone.set()

    def _end(self, request: str, error: BrokerError) -> None:
        """Close the call of a job that is being served, and give its client the error."""
        if request in self._serving and request not in self._ending:
            self._ending[request] = error
            self._serving[request].cancel()

    async def finish_serving(self, within_s: float) -> None:
        """Wait for what is served; what is not over by then is ended.

        A tunnel that is no work has no end of its own to wait for.
        """
        for request in self._serving:
            job = self._jobs[request]
            if job.socket is not None and job.granted is None:
                self._end(request, SHUTTING_DOWN)
        if self._serving:
            await asyncio.wait(self._serving.values(), timeout=within_s)
        for request in self._serving:
            self._end(request, SHUTTING_DOWN)
        if self._serving:
            await asyncio.wait(self._serving.values())

    async def close(self) -> None:
        """End whatever is under way and wait until it has ended."""
        await self.finish_serving(0)
        self._set_alarm(None)
        for load in self._loads.values():
            load.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=ANSWER_S)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # ----------------------------------------------------------------------------- effects

    def _serve(self, effect: fx.Serve) -> None:
        def done(outcome: Outcome) -> None:
            self._post(lambda at: ServeDone(at=at, request=effect.request, outcome=outcome))

        job = self._jobs.get(effect.request)
        if job is None:
            done("disconnected")
            return
        job.granted = self._clock.now()
        if self._services[job.consumer].job is not None:
            job.copy = AnswerCopy()
        self._begin(job, done)

    def _begin(self, job: Job, done: Callable[[Outcome], None]) -> None:
        job.decided = True

        def ended(task: asyncio.Task[Outcome]) -> None:
            del self._serving[job.request]
            error = self._ending.pop(job.request, None)
            if task.cancelled() and error is not None:  # before it began, so nobody was told
                self._supervise(self._answer(job, error), lambda _task: self._finish(job))
            else:
                self._finish(job)
            done("upstream_error" if _broke(task) else task.result())

        work = self._work(job, self._services[job.consumer])
        self._serving[job.request] = self._supervise(work, ended)

    async def _work(self, job: Job, consumer: ConsumerSettings) -> Outcome:
        """Serve the client, then follow the job that its request became at the service."""
        kept = Kept() if job.waits and consumer.job is not None else None
        try:
            outcome = await self._proxy(evolve(job, responder=kept) if kept else job, consumer)
        except asyncio.CancelledError:
            # Its end is our doing, and this task's last work is to say so.
            await self._answer(job, self._ending[job.request])
            return "disconnected"
        identity = find_job(job, consumer)
        if identity is None:
            if kept is not None:
                await self._send(job, kept.pass_on(job.responder))
            return outcome
        if kept is None:
            self._release(job)
        try:
            outcome = await self._follow(job, consumer, identity)
            if kept is not None and not job.gone.is_set():
                await self._give_result(job, consumer, identity, outcome)
        except asyncio.CancelledError:
            await self._answer(job, self._ending[job.request])
            return "disconnected"  # the broker ends, the service works on
        return outcome

    async def _follow(self, job: Job, consumer: ConsumerSettings, identity: JobId) -> Outcome:
        """Wait until the job is over; where that is asked for, it ends with its client."""
        if consumer.on_client_gone == "job":
            job.gone.call = job.revoked.set
            if job.gone.is_set():
                job.revoked.set()
        try:
            return await self._services.follow(consumer, job, identity)
        finally:
            job.gone.call = None

    async def _give_result(
        self, job: Job, consumer: ConsumerSettings, identity: JobId, outcome: Outcome
    ) -> None:
        """Give a client that has waited what its job has made, or say why there is nothing."""
        path = None
        if outcome == "ok":
            path = await self._services.result_path(consumer, identity)
        if path is None:
            code, what = UNDONE[outcome]
            await self._answer(job, _error(code, f"{consumer.name} {what}", consumer.name))
            return
        result = evolve(job, method="GET", path=path, headers=(), body=NoBody(), copy=None)
        await self._proxy(result, consumer)

    async def _send(self, job: Job, sending: Coroutine[Any, Any, None]) -> None:
        """Let the client take a short answer, unless it has gone."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                await sending

    async def _proxy(self, job: Job, consumer: ConsumerSettings) -> Outcome:
        if job.gone.is_set():
            return "disconnected"
        try:
            if job.socket is not None:
                return await self._tunnels.serve(job, job.socket, consumer)
            return await serve(job, self._session, consumer)
        except BrokerError as error:
            await self._answer(job, error)
            return "upstream_error"
        except Exception:  # noqa: BLE001 - whatever it is, it is an event
            await self._answer(job, self._defect(f"serving request {job.request}", job.consumer))
            return "upstream_error"

    def _reject(self, effect: fx.Reject) -> None:
        self.refuse(effect.request, of_reject(effect))

    def _start_unload(self, effect: fx.StartUnload) -> None:
        def ended(task: asyncio.Task[str | None]) -> None:
            error = self._code(task, f"unloading {effect.consumer}")
            self._post(
                lambda at: UnloadDone(
                    at=at, consumer=effect.consumer, epoch=effect.epoch, error=error
                )
            )

        self._end_load(effect.consumer)
        self._supervise(self._services.unload(effect.consumer, effect.how), ended)

    def _start_load(self, effect: fx.StartLoad) -> None:
        began = self._clock.now()

        def ended(task: asyncio.Task[str | None]) -> None:
            if self._loads.get(effect.consumer) is task:
                del self._loads[effect.consumer]
            error = self._code(task, f"loading {effect.consumer}")
            self._account_load(effect.consumer, began)
            self._post(
                lambda at: SwapDone(
                    at=at, consumer=effect.consumer, epoch=effect.epoch, error=error
                )
            )

        self._end_load(effect.consumer)
        task = self._supervise(self._services.load(effect.consumer), ended)
        self._loads[effect.consumer] = task

    def _end_load(self, consumer: str) -> None:
        """End a load that was given up, or that a forced unload ends: the order after it waits."""
        if consumer in self._loads:
            self._loads[consumer].cancel()

    def _account_load(self, consumer: str, began: int) -> None:
        now = self._clock.now()
        for job in self._jobs.values():
            if job.consumer == consumer and not job.decided:
                job.loading_us += now - max(began, job.submitted)

    def _wake_at(self, time: int) -> None:
        def ring() -> None:
            # A timer may ring a little early, and the scheduler does not ask twice.
            if self._clock.now() < time:
                self._wake_at(time)
            else:
                self._post(lambda at: Tick(at=at))

        delay_s = (time - self._clock.now()) / 1_000_000
        self._set_alarm(asyncio.get_running_loop().call_later(delay_s, ring))

    def _set_alarm(self, alarm: asyncio.TimerHandle | None) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = alarm

    # -------------------------------------------------------------------------- supervision

    def _supervise(
        self, work: Coroutine[Any, Any, T], ended: Callable[[asyncio.Task[T]], None]
    ) -> asyncio.Task[T]:
        """Do the work in a task of its own and tell of its end, however it came about."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(ended)
        return task

    def _code(self, task: asyncio.Task[T], what: str) -> T | str:
        if task.cancelled():
            return "cancelled"
        if task.exception() is not None:
            _log.error("a defect while %s", what, exc_info=task.exception())
            return "internal_error"
        return task.result()

    async def _answer(self, job: Job, error: BrokerError) -> None:
        """Tell the client, unless it has gone or takes no answer."""
        if job.gone.is_set():
            return
        try:
            async with asyncio.timeout(ANSWER_S):
                await job.responder.fail(error)
        except OSError:
            pass  # a client that reads nothing learns nothing
        except Exception:  # noqa: BLE001 - whatever it is, the job is over
            self._defect(f"answering request {job.request}", job.consumer)

    def _finish(self, job: Job) -> None:
        self._jobs.pop(job.request, None)
        self._release(job)

    def _release(self, job: Job) -> None:
        """Let its client go, which has all that it will get; a second time it changes nothing."""
        job.body.close()
        job.done.set()

    def _defect(self, what: str, consumer: str) -> BrokerError:
        """Log the exception in flight under an id, and give what the client is told of it."""
        defect = secrets.token_hex(4)
        _log.exception("defect %s while %s", defect, what)
        return _error("internal_error", f"a defect of the broker, in its log as {defect}", consumer)


def _broke(task: asyncio.Task[Any]) -> bool:
    if task.cancelled():
        return True
    if task.exception() is not None:
        _log.error("a defect while serving", exc_info=task.exception())
        return True
    return False


def _error(
    code: str, message: str, consumer: str | None = None, *, retryable: bool = False
) -> BrokerError:
    return BrokerError(code=code, message=message, consumer=consumer, retryable=retryable)

"""Work that goes on after its answer: a job that a service took, followed until it is over.

The client has its answer by then; what is followed is only still *served*, so that its slot and
its memory stay taken until the service itself says that they are not.
"""

import asyncio
import contextlib
import json
import logging
from typing import TypeAlias

from aiohttp import ClientSession
from attrs import define, field

from mgpu_core.events import Outcome
from mgpu_effects.calls import CallError
from mgpu_effects.expressions import ExpressionError, holds, value_of
from mgpu_effects.jobs import Job
from mgpu_effects.settings import ConsumerSettings, JobSettings, Question, Step
from mgpu_effects.steps import json_of, run_steps, with_value

JobId: TypeAlias = str | int | float

_log = logging.getLogger(__name__)


def find_job(job: Job, consumer: ConsumerSettings) -> JobId | None:
    """Give the service's own id of the work that it answered with 2xx; None where there is none."""
    copy = job.copy
    if copy is None or consumer.job is None or not 200 <= copy.status < 300:
        return None
    try:
        found = value_of(consumer.job.id, json.loads(copy.body))
    except (ValueError, RecursionError, ExpressionError):
        found = None
    if isinstance(found, str | int | float) and not isinstance(found, bool):
        return found
    message = "%s answered request %s without the id of a job (job.id): it counts as over"
    _log.warning(message, job.consumer, job.request)
    return None


async def follow(
    session: ClientSession, consumer: ConsumerSettings, job: Job, identity: JobId
) -> Outcome:
    """Return when the job is over at the service, or was given up after `timeout_s`.

    Each time that `job.revoked` is set the cancel steps are sent, and it is followed on: what is
    cancelled may end much later, or not at all. Stopped itself, it leaves the job alone.
    """
    assert consumer.job is not None, "where there is nothing to ask there is no id either"
    return await _Following(session, consumer, consumer.job, job, identity).run()


async def result_path(
    session: ClientSession, consumer: ConsumerSettings, identity: JobId
) -> str | None:
    """Give the path of what the job has made; None where the service does not say."""
    result = consumer.job.result if consumer.job else None
    if result is None:
        return None
    asked = with_value(Step(path=result.ask, method="GET"), "id", text_of(identity))
    place = with_value(Step(path=result.path, method="GET"), "id", text_of(identity))
    try:
        answer = await json_of(session, consumer, asked)
        values = {
            name: value_of(expression, answer, {"id": identity})
            for name, expression in result.values.items()
        }
    except (CallError, ExpressionError) as error:
        _log.warning("%s does not say where the result of its job is (%s)", consumer.name, error)
        return None
    for name, value in values.items():
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            _log.warning("%s says no %s of the result of its job", consumer.name, name)
            return None
        place = with_value(place, name, text_of(value))
    return place.path


def text_of(identity: JobId) -> str:
    if not isinstance(identity, str):
        return json.dumps(identity)
    return identity.encode(errors="replace").decode()


@define
class _Following:
    session: ClientSession
    consumer: ConsumerSettings
    settings: JobSettings
    job: Job
    identity: JobId
    cancelled: bool = False
    warned: set[str] = field(factory=set)

    async def run(self) -> Outcome:
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                return await self._to_the_end()
        except TimeoutError:
            self._warn(f"is not over after {self.settings.timeout_s:g} s: it is given up")
            await self._cancel()
            return "timeout"

    async def _to_the_end(self) -> Outcome:
        try:
            while not await self._is_over():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.settings.poll_s):
                        await self.job.revoked.wait()
                if self.job.revoked.is_set():
                    self.job.revoked.clear()
                    self.cancelled = True
                    await self._cancel()
            return await self._found()
        except CallError as error:
            self._warn(f"is over, for its service has died ({error.code})")
            return "upstream_error"

    async def _is_over(self) -> bool:
        for question in self.settings.over:
            if not await self._ask(question):
                return False
        return True

    async def _found(self) -> Outcome:
        question = self.settings.failed
        if question is None:
            return "disconnected" if self.cancelled else "ok"
        if await self._ask(question) is False:
            return "ok"
        return "disconnected" if self.cancelled else "upstream_error"

    async def _ask(self, question: Question) -> bool | None:
        """Give the answer, None where there is none; raises CallError if nobody is there."""
        step = with_value(question, "id", text_of(self.identity))
        try:
            answer = await json_of(self.session, self.consumer, step)
            return holds(question.when, answer, {"id": self.identity})
        except CallError as error:
            if error.code == "refused":
                raise
            why = error.code
        except ExpressionError as error:
            why = str(error)
        self._warn(f"cannot be asked for: {question.path} gives {why}")
        return None

    async def _cancel(self) -> None:
        steps = [with_value(step, "id", text_of(self.identity)) for step in self.settings.cancel]
        error = await run_steps(self.session, self.consumer, steps)
        if error is not None:
            self._warn(f"could not be cancelled ({error})")

    def _warn(self, what: str) -> None:
        """Say it once: the next round would say it again."""
        if what not in self.warned:
            self.warned.add(what)
            _log.warning(
                "the job of request %s at %s %s", self.job.request, self.consumer.name, what
            )

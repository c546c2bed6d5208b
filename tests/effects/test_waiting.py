"""Time limits without a timer for what is there at once."""

import asyncio

import pytest

from mgpu_effects.waiting import Begun, within


async def test_what_is_there_at_once_never_reaches_the_loop():
    queue: asyncio.Queue[str] = asyncio.Queue()
    queue.put_nowait("here")
    turns = []
    asyncio.get_running_loop().call_soon(turns.append, "the loop turned")

    assert await within(5, queue.get()) == "here"
    assert turns == []


async def test_what_comes_later_is_awaited():
    queue: asyncio.Queue[str] = asyncio.Queue()
    asyncio.get_running_loop().call_soon(queue.put_nowait, "later")

    begun = Begun(queue.get())

    assert not begun.over
    assert await begun == "later"
    assert begun.over


async def test_work_that_waits_many_times_goes_on_each_time():
    async def counting():
        for _ in range(3):
            await asyncio.sleep(0)
            await asyncio.to_thread(int)
        return 2

    assert await within(5, counting()) == 2


async def test_what_comes_too_late_is_cancelled_and_may_clean_up():
    cleaned = asyncio.Event()

    async def endless():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    with pytest.raises(TimeoutError):
        await within(0.01, endless())
    assert cleaned.is_set()


async def test_work_may_survive_what_is_thrown_into_it():
    async def stubborn():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "went on"

    task = asyncio.create_task(within(None, stubborn()))
    await asyncio.sleep(0)
    task.cancel()

    assert await task == "went on"


@pytest.mark.parametrize("turns", [0, 1])
async def test_a_failure_is_the_callers(turns):
    async def failing():
        for _ in range(turns):
            await asyncio.sleep(0)
        raise LookupError("no such thing")

    with pytest.raises(LookupError, match="no such thing"):
        await within(5, failing())


async def test_the_task_that_began_it_is_the_one_it_runs_in():
    async def here():
        await asyncio.sleep(0)
        return asyncio.current_task()

    assert await within(5, here()) is asyncio.current_task()

"""The demo itself: the same arrivals to the same services, with the broker and without it."""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
from attrs import define, evolve, field, frozen
from rich.table import Table

from mgpu_effects.config_file import load_settings
from mgpu_effects.settings import Settings
from mgpu_http.demo.clients import Route, client_session, routes, send
from mgpu_http.demo.host import DemoError, Place, World, world, write_config
from mgpu_http.demo.report import (
    CRASHES,
    GAVE_UP,
    OK,
    OUT_OF_MEMORY,
    Half,
    Happening,
    Outcome,
    Tally,
    comparison,
    tally,
)
from mgpu_http.demo.screen import (
    DESKTOP,
    HAPPENING_ROWS,
    Score,
    ServiceView,
    Snapshot,
    Waiting,
    why_words,
)
from mgpu_http.demo.traffic import Arrival, arrivals

REFRESH_S = 0.125
STATUS_TIMEOUT_S = 2.0
HEALTHY_S = 20.0
INTERRUPTED = "interrupted"
JOURNAL = "journal.jsonl"

Watch: TypeAlias = Callable[[Snapshot], None]


@define(eq=False)
class Journal:
    """What the services wrote down, read on from where the last look ended."""

    path: Path
    happenings: list[Happening] = field(init=False, factory=list)
    _read: int = field(init=False, default=0)

    def look(self) -> list[Happening]:
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._read)
            *lines, _unfinished = file.read().split(b"\n")
            self._read += sum(len(line) + 1 for line in lines)
            self.happenings += [Happening(**json.loads(line)) for line in lines]
        return self.happenings


@define(eq=False)
class Book:
    """Who came in one half, and how it ended for them."""

    journal: Journal
    services: Mapping[str, str]  # who does which kind of work
    open: Counter[str] = field(init=False, factory=Counter)  # by service
    outcomes: list[Outcome] = field(init=False, factory=list)

    def outcomes_of(self, service: str) -> list[Outcome]:
        return [one for one in self.outcomes if self.services[one.kind] == service]

    def crashes_of(self, service: str) -> int:
        happenings = self.journal.happenings
        return sum(one.service == service and one.what in CRASHES for one in happenings)

    def score(self) -> Score:
        ends = Counter(one.outcome for one in self.outcomes)
        happened = Counter(one.what for one in self.journal.happenings)
        return Score(
            sent=len(self.outcomes) + self.open.total(),
            ok=ends[OK],
            gave_up=ends[GAVE_UP],
            failed=len(self.outcomes) - ends[OK] - ends[GAVE_UP],
            out_of_memory=happened[OUT_OF_MEMORY],
            loads=happened["load"],
        )

    def tally(self) -> Tally:
        """Without what was written since the last look: a service that ends unloads as well."""
        return tally(self.outcomes, self.journal.happenings)


@frozen(kw_only=True)
class Scene:
    """One half while it is played; `begin` in monotonic seconds."""

    half: Half
    settings: Settings
    world: World
    session: aiohttp.ClientSession
    begin: float
    books: Mapping[Half, Book]

    async def play(self, coming: Sequence[Arrival], seconds: float, watch: Watch) -> None:
        """Return when everybody who came has an answer, or has left."""
        ways = routes(self.settings, through_broker=self.half is Half.WITH)
        showing = asyncio.create_task(self._show(seconds, watch))
        try:
            async with asyncio.TaskGroup() as clients:
                for arrival in coming:
                    clients.create_task(self._come(arrival, ways[arrival.kind]))
        finally:
            self.books[self.half].journal.look()
            showing.cancel()
            await asyncio.wait((showing,))
        if not showing.cancelled():
            showing.result()  # it ended by itself: raises why

    async def _come(self, arrival: Arrival, route: Route) -> None:
        await asyncio.sleep(self.begin + arrival.at_s - time.monotonic())
        book = self.books[self.half]
        book.open[route.service] += 1
        outcome = Outcome(name=arrival.name, kind=arrival.kind, outcome=INTERRUPTED, waited_s=0)
        try:
            outcome = await send(self.session, arrival, route)
        finally:
            book.open[route.service] -= 1
            book.outcomes.append(outcome)

    async def _show(self, seconds: float, watch: Watch) -> None:
        while True:
            told = await status(self.session, self.settings) if self.half is Half.WITH else None
            watch(self._snapshot(seconds, told))
            await asyncio.sleep(REFRESH_S)

    def _snapshot(self, seconds: float, told: Mapping[str, Any] | None) -> Snapshot:
        """`told` is the broker's status, where there is one."""
        book = self.books[self.half]
        happenings = book.journal.look()[-HAPPENING_ROWS:]
        card = json.loads((self.world.directory / "card.json").read_bytes())
        gpu, held = card["gpus"][0], card["held"]
        return Snapshot(
            half=self.half,
            elapsed_s=time.monotonic() - self.begin,
            seconds=seconds,
            total_mib=gpu["total_mib"],
            held={DESKTOP: gpu["used_mib"] - sum(held.values()), **held},
            services=[
                self._service(name, held.get(name, 0), told and told["consumers"][name])
                for name in self.settings.consumers
            ],
            queue=_queue(told) if told else (),
            happenings=[evolve(one, at=one.at - self.begin) for one in happenings],
            scores={half: book.score() for half, book in self.books.items()},
        )

    def _service(self, name: str, held_mib: int, told: Mapping[str, Any] | None) -> ServiceView:
        """Show what the broker believes, or, without one, what can be seen from outside."""
        book = self.books[self.half]
        ends = Counter(one.outcome == OK for one in book.outcomes_of(name))
        if told is not None:
            state, running, waiting = told["residency"], told["active"], told["waiting"]
        else:
            loaded = "resident" if held_mib else "absent"
            up = name in self.world.services and self.world.services[name].running
            state, running, waiting = loaded if up else "down", book.open[name], None
        return ServiceView(
            name=name,
            state=state,
            held_mib=held_mib,
            running=running,
            waiting=waiting,
            ok=ends[True],
            not_ok=ends[False],
            crashes=book.crashes_of(name),
        )


@define(eq=False)
class Demo:
    """One run. The books fill while it goes on, so that an interrupted one can be told of too;
    there is none of a half that was not begun.
    """

    place: Place
    seconds: float
    seed: int
    watch: Watch
    books: dict[Half, Book] = field(init=False, factory=dict)

    def tallies(self) -> dict[Half, Tally]:
        return {half: self._book(half).tally() for half in Half}

    def comparison(self) -> Table:
        return comparison(
            {half: (tally, self._book(half).outcomes) for half, tally in self.tallies().items()}
        )

    def _book(self, half: Half) -> Book:
        return self.books.get(half) or Book(Journal(self.place.half(half) / JOURNAL), {})

    async def run(self) -> None:
        """Raises DemoError where it can't go on."""
        write_config(self.place, self.seed)
        settings = load_settings(self.place.config)
        coming = arrivals(self.seed, self.seconds)
        for half in Half:
            self.books[half] = Book(Journal(self.place.half(half) / JOURNAL), settings.routing)
            async with (
                world(self.place, settings, half, self.seed) as here,
                client_session() as session,
            ):
                if half is Half.WITH:
                    await _until_probed(session, settings)
                scene = Scene(
                    half=half,
                    settings=settings,
                    world=here,
                    session=session,
                    begin=time.monotonic(),
                    books=self.books,
                )
                await _unless_broken(scene.play(coming, self.seconds, self.watch), here)


def _queue(told: Mapping[str, Any]) -> list[Waiting]:
    return [
        Waiting(
            service=request["consumer"],
            waited_s=request["waited_ms"] / 1000,
            why=why_words(request["why"], request["consumer"]),
        )
        for request in told["requests"]
        if request["state"] != "serving"
    ]


async def _unless_broken(played: Coroutine[Any, Any, None], here: World) -> None:
    """Raises DemoError as soon as the card or the broker has ended."""
    playing = asyncio.create_task(played)
    try:
        await asyncio.wait((playing, here.broken), return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not playing.done():
            playing.cancel()
            await asyncio.wait((playing,))
    if here.broken.done():
        raise DemoError(here.broken.result())
    playing.result()


async def _until_probed(session: aiohttp.ClientSession, settings: Settings) -> None:
    """Wait until the broker has seen every service that runs already. Raises DemoError."""
    deadline = time.monotonic() + HEALTHY_S
    running = [name for name, one in settings.consumers.items() if one.driver is None]
    while time.monotonic() < deadline:
        told = await status(session, settings)
        if told and all(told["consumers"][name]["healthy"] for name in running):
            return
        await asyncio.sleep(REFRESH_S)
    raise DemoError("the broker does not see the services: its log may say why")


async def status(session: aiohttp.ClientSession, settings: Settings) -> dict[str, Any] | None:
    """None where the broker is too busy to say."""
    try:
        async with (
            asyncio.timeout(STATUS_TIMEOUT_S),
            session.get(f"http://{settings.listen[0]}/v1/status") as answer,
        ):
            return dict(await answer.json())
    except (TimeoutError, aiohttp.ClientError):
        return None

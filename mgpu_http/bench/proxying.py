"""What the broker adds to a request, beside two servers that schedule nothing."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles

from attrs import field, frozen

from mgpu_http.bench.load import Round, post, send
from mgpu_http.bench.servers import Target
from mgpu_http.bench.upstream import BIG_BYTES

CLIENTS = (1, 16, 64)
PROMPT = b'{"model": "any", "messages": [{"role": "user", "content": "How warm is it outside?"}]}'
MIB = 1 << 20


@frozen
class Measured:
    """What so many clients saw of one server, over all rounds."""

    target: str
    clients: int
    rounds: Sequence[Round]
    _latencies_s: tuple[float, ...] = field(init=False)

    def __attrs_post_init__(self) -> None:
        every = sorted(s for one in self.rounds for s in one.latencies_s)
        object.__setattr__(self, "_latencies_s", tuple(every))

    @property
    def per_s(self) -> float:
        """Answers per second: the median of the rounds."""
        return median(len(one.latencies_s) / one.took_s for one in self.rounds)

    @property
    def p50_ms(self) -> float:
        return median(self._latencies_s) * 1e3

    @property
    def p99_ms(self) -> float:
        return quantiles(self._latencies_s, n=100)[98] * 1e3


async def measure(
    targets: Mapping[str, Target], path: str, *, requests: int, rounds: int
) -> list[Measured]:
    """Ask all targets in turn, round by round: what disturbs the machine disturbs all of them."""
    measured = []
    for clients in CLIENTS:
        seen: dict[str, list[Round]] = {name: [] for name in targets}
        for number in range(rounds + 1):
            for name, target in targets.items():
                asked = post(target.path(path), PROMPT)
                one = await send(target.port, asked, clients=clients, requests=requests)
                if number:  # the first one warms up
                    seen[name].append(one)
        measured += [Measured(name, clients, tuple(seen[name])) for name in targets]
    return measured


@frozen
class Passage:
    """How a big body went through a server: its memory before and at the most, and how fast."""

    target: str
    way: str
    before_mib: float
    peak_mib: float
    mib_per_s: float


async def pass_big_bodies(targets: Mapping[str, Target]) -> list[Passage]:
    """Send 1 GiB through each server, and have 1 GiB sent."""
    ways = {"upload": bytes(BIG_BYTES), "download": PROMPT}
    passages = []
    for way, body in ways.items():
        for target in targets.values():
            _forget_peak(target.pid)
            before_mib = _memory_mib(target.pid, "VmRSS")
            request = post(target.path(f"/{way}"), body)
            one = await send(target.port, request, clients=1, requests=1)
            peak_mib = _memory_mib(target.pid, "VmHWM")
            speed = BIG_BYTES / MIB / one.took_s
            passages.append(Passage(target.name, way, before_mib, peak_mib, speed))
    return passages


def _forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _memory_mib(pid: int, what: str) -> float:
    return next(_values(Path(f"/proc/{pid}/status").read_text(), what)) / 1024


def _values(status: str, what: str) -> Iterator[int]:
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == what:
            yield int(value.split()[0])

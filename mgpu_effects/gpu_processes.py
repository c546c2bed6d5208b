"""Whose the processes are that hold memory on the cards.

A process belongs to a consumer if it, or one that it descends from, carries the mark of the
consumer's process driver, runs in the consumer's control group (a systemd unit's, a container's),
or listens on the consumer's port. What may not be looked at (other users' processes, other
namespaces) is not known, and nothing is concluded from it.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from attrs import field, frozen

from mgpu_core.events import GpuReading
from mgpu_effects.drivers.group import MARK
from mgpu_effects.gpu import GpuProcess

PROC = Path("/proc")
_LISTENING = "0A"  # the state of a socket in /proc/net/tcp
_MOST_ANCESTORS = 64
# They hold the sockets of those whom they start on demand, and everybody descends from them.
_MANAGERS = frozenset({"systemd", "init"})


# -------------------------------------------------------------------------------- what /proc says


@frozen(kw_only=True)
class Process:
    """What may be seen of one process. `sockets` are the inodes of those that it has open."""

    pid: int
    parent: int
    name: str
    mark: str | None = None
    cgroups: frozenset[str] = frozenset()
    sockets: frozenset[int] = frozenset()


def lineage(pid: int, proc: Path = PROC) -> tuple[Process, ...]:
    """Give the process and those that it descends from, up to the broker or a service manager.

    Empty: it has ended, or is not to be seen from here.
    """
    found: list[Process] = []
    while pid > 1 and pid != os.getpid() and len(found) < _MOST_ANCESTORS:
        process = _process(pid, proc)
        if process is None or process.name in _MANAGERS:
            break
        found.append(process)
        pid = process.parent
    return tuple(found)


def listeners(proc: Path = PROC) -> Mapping[int, frozenset[int]]:
    """Give the inodes of the TCP sockets that listen, by port."""
    by_port: dict[int, set[int]] = {}
    for table in ("tcp", "tcp6"):
        for line in _text(proc / "net" / table).splitlines()[1:]:
            local, _remote, state, *_, inode = line.split()[1:10]
            if state == _LISTENING:
                by_port.setdefault(int(local.rpartition(":")[2], 16), set()).add(int(inode))
    return {port: frozenset(inodes) for port, inodes in by_port.items()}


def _process(pid: int, proc: Path) -> Process | None:
    here = proc / str(pid)
    head, _, tail = _text(here / "stat").rpartition(")")
    if not head:
        return None
    return Process(
        pid=pid,
        parent=int(tail.split()[1]),
        name=head.partition("(")[2],
        mark=_mark(here),
        cgroups=frozenset(
            part for line in _text(here / "cgroup").splitlines() for part in line.split("/")[1:]
        ),
        sockets=frozenset(_sockets(here / "fd")),
    )


def _mark(here: Path) -> str | None:
    prefix = f"{MARK}="
    for variable in _text(here / "environ").split("\0"):
        if variable.startswith(prefix):
            return variable.removeprefix(prefix)
    return None


def _sockets(folder: Path) -> Iterator[int]:
    try:
        for entry in os.scandir(folder):
            match = re.fullmatch(r"socket:\[(\d+)\]", _link(entry.path))
            if match:
                yield int(match[1])
    except OSError:
        return  # another user's


def _link(path: str) -> str:
    try:
        return os.readlink(path)  # noqa: PTH115 - no file is meant
    except OSError:
        return ""  # closed meanwhile


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# --------------------------------------------------------------------------------------- whose it is


@frozen(kw_only=True)
class Owner:
    """How the processes of a consumer are known: by what there is of these.

    A control group goes by the name of a systemd unit, or by a container's id.
    """

    consumer: str
    mark: str | None = None
    cgroup: str | None = None
    port: int | None = None

    @property
    def certain(self) -> bool:
        """Say whether none of its processes can be missed.

        Who listens on a port may be a proxy in front of the process that holds the memory.
        """
        return self.mark is not None or self.cgroup is not None

    def owns(self, line: Iterable[Process], listening: Mapping[int, frozenset[int]]) -> bool:
        """Say whether a process of this lineage is the consumer's."""
        sockets = listening.get(self.port, frozenset()) if self.port is not None else frozenset()
        return any(
            (self.mark is not None and one.mark == self.mark)
            or (self.cgroup is not None and any(_is(part, self.cgroup) for part in one.cgroups))
            or not one.sockets.isdisjoint(sockets)
            for one in line
        )


def _is(part: str, cgroup: str) -> bool:
    """Compare a part of a control group's path; engines wrap a container's id into a scope."""
    return part == cgroup or part.endswith(f"-{cgroup}.scope")


@frozen(kw_only=True)
class Holding:
    """What one process holds on one card. `name` is None where it is not to be seen from here."""

    index: int
    pid: int
    name: str | None
    mib: int | None
    owners: frozenset[str] = frozenset()


@frozen(kw_only=True)
class Holders:
    """Who held the memory of the cards at some time after `taken`; `error` why nobody can tell."""

    taken: int
    used_mib: Mapping[int, int] = field(factory=dict)  # by card
    holdings: tuple[Holding, ...] = ()
    certain: frozenset[str] = frozenset()  # the consumers of whose processes none can be missed
    error: str | None = None

    def held_mib(self, consumer: str, cards: Iterable[int]) -> int | None:
        """What its processes hold on these cards; None where that can't be told."""
        mine = [each.mib for each in self._on(cards) if consumer in each.owners]
        return None if None in mine else sum(mib for mib in mine if mib is not None)

    def hidden_mib(self, consumer: str, cards: Iterable[int]) -> int:
        """What else of these cards is in use and might be the consumer's, as far as can be told."""
        known = sum(
            each.mib or 0
            for each in self._on(cards)
            if each.owners or (consumer in self.certain and each.name is not None)
        )
        return sum(self.used_mib.get(card, 0) for card in cards) - known

    def foreign(self, card: int) -> tuple[Holding, ...]:
        """Give what belongs to no consumer, the most first."""
        strangers = (each for each in self._on((card,)) if not each.owners)
        return tuple(sorted(strangers, key=lambda each: (-(each.mib or 0), each.pid)))

    def _on(self, cards: Iterable[int]) -> Iterator[Holding]:
        cards = frozenset(cards)
        return (each for each in self.holdings if each.index in cards)


def attribute(
    taken: int,
    readings: Iterable[GpuReading],
    processes: Iterable[GpuProcess],
    owners: Iterable[Owner],
    proc: Path = PROC,
) -> Holders:
    """Find out whose the processes are. It reads files, and may block."""
    listening, owners = listeners(proc), tuple(owners)
    holdings = []
    for process in processes:
        line = lineage(process.pid, proc)
        holding = Holding(
            index=process.index,
            pid=process.pid,
            name=line[0].name if line else None,
            mib=process.mib,
            owners=frozenset(each.consumer for each in owners if each.owns(line, listening)),
        )
        holdings.append(holding)
    return Holders(
        taken=taken,
        used_mib={reading.index: reading.used_mib for reading in readings},
        holdings=tuple(holdings),
        certain=frozenset(owner.consumer for owner in owners if owner.certain),
    )

"""What the kernel says of the processes of this host, as far as we may look: files under /proc.

All of this reads files, and may block.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from attrs import frozen

from mgpu_effects.drivers.group import MARK

PROC = Path("/proc")
_LISTENING = "0A"  # the state of a socket in /proc/net/tcp
_MOST_ANCESTORS = 64
# They hold the sockets of those whom they start on demand, and everybody descends from them.
_MANAGERS = frozenset({"systemd", "init"})


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


def listening(port: int, proc: Path = PROC) -> tuple[Process, ...]:
    """Give the processes that listen on a TCP port, those that we may look at."""
    inodes = listeners(proc).get(port, frozenset())
    every = (_process(int(entry.name), proc) for entry in proc.glob("[0-9]*") if inodes)
    return tuple(
        one
        for one in every
        if one and one.name not in _MANAGERS and not one.sockets.isdisjoint(inodes)
    )


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

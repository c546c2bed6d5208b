"""Who runs what listens on this host: a unit of systemd, a container, or nobody that can be told.

It only looks: `ss` tells the control group of a socket, whosever it is, /proc that of our own
processes (of all, for root), and docker and podman which container has a port.
"""

import asyncio
import contextlib
import os
import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Literal, TypeAlias

from attrs import frozen

from mgpu_effects.blocking import Blocking
from mgpu_effects.commands import run_command
from mgpu_effects.proc import listening

Engine: TypeAlias = Literal["docker", "podman"]
ENGINES: tuple[Engine, ...] = ("docker", "podman")
_TIMEOUT_S = 5.0
_HERE = re.compile(r"(?:127\.[0-9.]+|0\.0\.0\.0|\*|\[::1?\]|\[::ffff:127\.[0-9.]+\])(?:%\w+)?")
_PUBLISHED = re.compile(r":(\d+)(?:-(\d+))?->")
_CONTAINER = re.compile(r"(?:docker-|libpod-(?:payload-)?)?([0-9a-f]{64})(?:\.scope)?")
_MANAGER = re.compile(r"user@(\d+)\.service")
# What runs on behalf of somebody else: to stop it would stop far more than one service.
_NO_SERVICE = re.compile(
    r"(?:docker|containerd|podman[a-z-]*|sshd?|crond?|app-.*|vte-.*)(?:@.*)?\.service"
)


@frozen(kw_only=True)
class RunBy:
    """`unit` or `container` is None where it is not such a one; `cgroup` knows its processes."""

    unit: str | None = None
    user: bool = False  # a unit of the user's own manager
    container: str | None = None
    engine: Engine = "docker"
    cgroup: str | None = None


@frozen(kw_only=True)
class Container:
    """One that runs, with the ports of this host that are its."""

    engine: Engine
    id: str
    name: str
    ports: frozenset[int]


async def run_by(ports: Collection[int]) -> Mapping[int, RunBy]:
    """Find out who runs what listens on each of these ports of the loopback."""
    proc = Blocking("proc", _TIMEOUT_S)
    sockets, of_engines = await asyncio.gather(
        _sockets(), asyncio.gather(*map(_containers, ENGINES))
    )
    containers = [each for found in of_engines for each in found]
    told = {}
    for port in ports:
        parts = sockets.get(port, frozenset())
        if not any(map(_names_somebody, parts)):
            with contextlib.suppress(TimeoutError):
                parts = await proc.run(partial(_own_parts, port))
        told[port] = _told(port, parts, containers)
    return told


def _told(port: int, parts: frozenset[str], containers: Collection[Container]) -> RunBy:
    """A unit comes first: one that keeps a container would start it again behind our back."""
    managers = {int(match[1]) for part in parts if (match := _MANAGER.fullmatch(part))}
    units = [part for part in parts if _is_unit(part)]
    if len(units) == 1 and managers <= {os.getuid()}:
        return RunBy(unit=units[0], user=bool(managers), cgroup=units[0])
    ids = {match[1] for part in parts if (match := _CONTAINER.fullmatch(part))}
    for one in containers:
        if port in one.ports or one.id in ids:
            return RunBy(container=one.name, engine=one.engine, cgroup=one.id)
    return RunBy()


def _names_somebody(part: str) -> bool:
    return _is_unit(part) or _CONTAINER.fullmatch(part) is not None


def _is_unit(part: str) -> bool:
    """Say whether a part of a control group's path is a unit that runs a service."""
    others = _MANAGER.fullmatch(part) or _NO_SERVICE.fullmatch(part)
    return part.endswith(".service") and not others


def _own_parts(port: int) -> frozenset[str]:
    return frozenset(part for process in listening(port) for part in process.cgroups)


async def _sockets() -> Mapping[int, frozenset[str]]:
    """Give the parts of the control group's path of who made each socket that listens here."""
    found: dict[int, frozenset[str]] = {}
    for line in await _lines("ss", "-Hltn", "--cgroup"):
        words = line.split()
        group = next((word for word in words if word.startswith("cgroup:/")), None)
        if group is None or len(words) < 4:
            continue
        host, _, port = words[3].rpartition(":")
        if _HERE.fullmatch(host) and port.isdecimal():
            found[int(port)] = frozenset(group.removeprefix("cgroup:").split("/"))
    return found


async def _containers(engine: Engine) -> list[Container]:
    found = []
    for line in await _lines(
        engine, "ps", "--no-trunc", "--format", "{{.ID}}\t{{.Names}}\t{{.Ports}}"
    ):
        identity, _, rest = line.partition("\t")
        names, _, ports = rest.partition("\t")
        published = {
            port
            for first, last in _PUBLISHED.findall(ports)
            for port in range(int(first), int(last or first) + 1)
        }
        if names:
            name = names.split(",")[0]
            found.append(
                Container(engine=engine, id=identity, name=name, ports=frozenset(published))
            )
    return found


async def _lines(*command: str) -> list[str]:
    """Give what a command prints, nothing where it can't be asked."""
    try:
        output = await run_command(*command, timeout_s=_TIMEOUT_S)
    except OSError:  # TimeoutError is one of its kinds
        return []
    return output.stdout.splitlines() if output.returncode == 0 else []

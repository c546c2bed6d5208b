"""A broker in front of real services, each under a path of one upstream of its own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mgpu_core.events import Unload
from mgpu_core.replay import Record
from mgpu_core.state import Residency
from mgpu_effects.broker import Broker
from mgpu_effects.clock import Clock
from mgpu_effects.event_log import read
from mgpu_effects.jobs import Job
from mgpu_effects.settings import (
    ConsumerSettings,
    GpuSettings,
    ProbeSettings,
    SchedulerSettings,
    Settings,
    Step,
)
from tests.support.clients import Client, make_job
from tests.support.upstream import Upstream, eventually

MIB = 6_000


def service(upstream: Upstream, name: str, **more: Any) -> ConsumerSettings:
    """A service that is told to load and to unload, under a path of its own."""
    fields = {
        "vram_resident_mib": MIB,
        "load": (Step(path="/load"),),
        "unload": (Step(path="/unload"),),
        **more,
    }
    return ConsumerSettings(name=name, url=f"{upstream.url}/{name}", **fields)


def settings_of(*consumers: ConsumerSettings, sampler: str = "none", **scheduler: Any) -> Settings:
    """One card that holds one service of `MIB` at a time."""
    return Settings(
        gpus=(GpuSettings(total_mib=8_000, sampler=sampler, poll_interval_s=0.1),),  # type: ignore[arg-type]
        probe=ProbeSettings(interval_s=0.1, timeout_s=2, failures=2),
        scheduler=SchedulerSettings(
            **{"settle_timeout_s": 0.5, "shutdown_grace_s": 5, **scheduler}
        ),
        consumers={consumer.name: consumer for consumer in consumers},
    )


@asynccontextmanager
async def running(
    settings: Settings, log_dir: Path, clock: Clock | None = None
) -> AsyncIterator[Broker]:
    broker = Broker(settings, log_dir=log_dir, clock=clock)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


async def only_resident(broker: Broker, name: str) -> None:
    """Have the others unloaded: at the start all such services count as resident."""
    others = tuple(other for other in broker.state.consumers if other != name)
    await broker.apply(lambda at: Unload(at=at, consumers=others))
    await eventually(lambda: all(residency(broker, other) == "absent" for other in others))


def residency(broker: Broker, name: str) -> Residency:
    return broker.state.consumers[name].residency


def submit(broker: Broker, consumer: str, path: str = "/work", **more: Any) -> tuple[Job, Client]:
    job, client = make_job(path, consumer=consumer, **more)
    broker.submit(job)
    return job, client


async def over(job: Job, within_s: float = 15) -> None:
    await asyncio.wait_for(job.done.wait(), within_s)


def told(client: Client) -> str:
    """Give the code of the one error that the client got, and nothing else."""
    assert client.calls == ["fail"]
    assert client.error is not None
    return client.error.code


def paths(upstream: Upstream) -> list[str]:
    """Name the calls in order, without the probes."""
    targets: Any = upstream.stats()["targets"]
    return [target.split(" ")[1].split("?")[0] for target in targets if "/health" not in target]


def lines(log_dir: Path) -> list[dict[str, Any]]:
    """Read what was logged, without the headers."""
    return [item._asdict() for item in read(log_dir) if isinstance(item, Record)]


def logged(log_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [line["event"] for line in lines(log_dir) if line["event"]["type"] == kind]

"""How the server behind a consumer is started and stopped."""

from collections.abc import Callable

import aiohttp

from mgpu_effects.calls import CallError, check_health
from mgpu_effects.drivers.container import ContainerDriver
from mgpu_effects.drivers.driver import Driver
from mgpu_effects.drivers.process import ProcessDriver
from mgpu_effects.drivers.systemd import SystemdDriver
from mgpu_effects.settings import ConsumerSettings

__all__ = [
    "ContainerDriver",
    "Driver",
    "ProcessDriver",
    "SystemdDriver",
    "make_driver",
    "mark_of",
]

_READY_TIMEOUT_S = 1.0


def make_driver(
    consumer: ConsumerSettings,
    session: aiohttp.ClientSession,
    on_exit: Callable[[], None] | None = None,
) -> Driver | None:
    """Make the consumer's driver; None where the broker can't start it.

    `on_exit` is called when a process ended without having been told to.
    """

    async def answers() -> bool:
        try:
            await check_health(session, consumer, _READY_TIMEOUT_S)
        except CallError:
            return False
        return True

    name, driver = consumer.name, consumer.driver
    if driver is None:
        return None
    if driver.process is not None:
        return ProcessDriver(name, driver.process, answers, on_exit, mark=mark_of(consumer))
    if driver.systemd is not None:
        return SystemdDriver(name, driver.systemd.unit, answers, user=driver.systemd.user)
    assert driver.container is not None
    return ContainerDriver(name, driver.container, answers)


def mark_of(consumer: ConsumerSettings) -> str:
    """Give what the processes of its process driver carry in their environment."""
    return f"{consumer.name} {consumer.url}"

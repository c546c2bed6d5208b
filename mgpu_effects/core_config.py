"""What the scheduler decides by, taken from the user's settings: `core_config`."""

from collections.abc import Mapping

from mgpu_core.config import SECOND_US, Config, Consumer, Driver, Gpu, config_of
from mgpu_effects.settings import ConsumerSettings, Settings
from mgpu_effects.units import units


def core_config(settings: Settings) -> Config:
    """Make the core's configuration: MiB, microseconds and counts, nothing that could be secret."""
    scheduler, probe = settings.scheduler, settings.probe
    all_units = units(settings)
    return config_of(
        *(_consumer(unit, all_units) for unit in all_units.values()),
        gpus=_gpus(settings),
        eviction=scheduler.eviction,
        overtake_bound=scheduler.overtake_bound,
        max_evictions=scheduler.max_evictions,
        when_unfit=scheduler.when_unfit,
        overlap_loads=scheduler.overlap_loads,
        queue_timeout_us=_us(scheduler.queue_timeout_s),
        load_timeout_us=_us(scheduler.load_timeout_s),
        unload_timeout_us=_us(scheduler.unload_timeout_s),
        settle_timeout_us=_us(scheduler.settle_timeout_s),
        restore_after_us=_us_or_none(scheduler.restore_after_s),
        poll_interval_us=_us(settings.poll_interval_s),
        probe_interval_us=_us(probe.interval_s),
        probe_failures=probe.failures,
    )


def _gpus(settings: Settings) -> tuple[Gpu, ...]:
    return tuple(
        Gpu(
            index=index,
            total_mib=gpu.total_mib,
            reserved_mib=gpu.reserved_mib,
            cushion_mib=gpu.cushion_mib,
            max_parallel=gpu.max_parallel,
        )
        for index, gpu in settings.gpu_by_index.items()
    )


def _consumer(consumer: ConsumerSettings, all_units: Mapping[str, ConsumerSettings]) -> Consumer:
    return Consumer(
        name=consumer.name,
        server=consumer.server,
        server_concurrency=consumer.unit.concurrency if consumer.unit else None,
        vram_mib=consumer.resident_mib_by_gpu,
        vram_load_mib=consumer.vram_load_mib,
        vram_residue_mib=consumer.vram_residue_mib,
        vram_auto=consumer.vram_resident_mib == "auto",
        vram_managed=consumer.vram_managed,
        gpu_slot=consumer.gpu_slot,
        load_route=bool(consumer.load),
        unload_route=bool(consumer.unload),
        driver=_driver(consumer),
        can_coexist_with=_neighbours(consumer, all_units),
        priority=consumer.priority,
        max_concurrency=consumer.max_concurrency,
        max_pending=consumer.max_pending,
        pinned=consumer.pinned,
        preload=consumer.preload,
        idle_unload_us=_us_or_none(consumer.idle_unload_s),
    )


def _neighbours(
    consumer: ConsumerSettings, all_units: Mapping[str, ConsumerSettings]
) -> tuple[str, ...]:
    """Who names a consumer names all of its models."""
    named = {*consumer.can_coexist_with}
    found = (name for name, unit in all_units.items() if named & {name, unit.server})
    return tuple(sorted(name for name in found if name != consumer.name))


def _driver(consumer: ConsumerSettings) -> Driver:
    if consumer.driver is None:
        return "none"
    if consumer.driver.process is not None:
        return "process"
    return "systemd" if consumer.driver.systemd is not None else "container"


def _us(seconds: float) -> int:
    return round(seconds * SECOND_US)


def _us_or_none(seconds: float | None) -> int | None:
    return None if seconds is None else _us(seconds)

"""What no key can know by itself: names that must exist, and values that contradict each other."""

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from attrs import asdict, frozen

from mgpu_effects import presets
from mgpu_effects.gpu_processes import local_port
from mgpu_effects.reading import Path, Reader, dotted
from mgpu_effects.settings import (
    KILLED_S,
    ConsumerSettings,
    GpuSettings,
    ModelSettings,
    ResidencySettings,
    SchedulerSettings,
    Settings,
    Step,
    gpu_numbers,
)
from mgpu_effects.steps import with_value
from mgpu_effects.units import ANY, names_of, units
from mgpu_effects.values import HOST, PORT

URL_ADDRESS = re.compile(rf"(https?)://({HOST})(?::({PORT}))?")
SCHEME_PORTS = {"http": 80, "https": 443}


@frozen
class Finding:
    """Something wrong at `path`, concluded from what stands there and at the paths `given`.

    With `unless_default` it is wrong only where the file has something at `path`.
    """

    path: Path
    message: str
    given: tuple[Path, ...] = ()
    unless_default: bool = False


Findings: TypeAlias = Iterator[Finding]


def check(settings: Settings, reader: Reader) -> None:
    """Note what is wrong with settings that were read.

    Nothing is concluded from what could not be read: what it was meant to be is not known.
    """
    findings = [
        (_as_written(finding.path, reader), finding) for one in CHECKS for finding in one(settings)
    ]
    sound = [
        (path, finding)
        for path, finding in findings
        if all(reader.sound(each) for each in (path, *finding.given))
        and (reader.given(path) or not finding.unless_default)
    ]
    for path, finding in sound:
        reader.note(_nearest(path, reader), finding.message)


def _as_written(path: Path, reader: Reader) -> Path:
    """Give the path of the shorter form where the file has that."""
    if path[:2] == ("gpus", 0) and reader.given(("gpu",)):
        return ("gpu", *path[2:])
    without_list = tuple(part for part in path if part != 0)
    return without_list if reader.given(without_list) and not reader.given(path) else path


def _nearest(path: Path, reader: Reader) -> Path:
    """Give the nearest thing that the file has."""
    while not reader.given(path):
        path = path[:-1]
    return path


# ------------------------------------------------------------------------------ the broker itself


def _check_listen(settings: Settings) -> Findings:
    yield from _check_twice(settings.listen, ("listen",))
    may = settings.auth.keys or settings.auth.open
    for place, address in enumerate(settings.listen):
        host, _ = _host_port(address)
        path = ("listen", place)
        if _is_no_address(host):
            yield Finding(path, f"{host} is no IP address")
        elif not _is_loopback(host) and not may:
            text = f"{host} is not loopback: it needs auth.keys, or auth: open to let anybody in"
            yield Finding(path, text, (("auth",),))


def _check_fronts(settings: Settings) -> Findings:
    taken = dict.fromkeys(settings.listen, "listen")
    for name, addresses in settings.fronts.items():
        path = ("consumers", name, "front")
        for address in addresses:
            owner = taken.setdefault(address, dotted(path))
            if owner != dotted(path):
                yield Finding(path, f"{address} is taken already, by {owner}", (("listen",),))


def _check_auth(settings: Settings) -> Findings:
    yield from _check_twice([key.name for key in settings.auth.keys], ("auth", "keys"), "name")


def _check_routing(settings: Settings) -> Findings:
    for kind, name in settings.routing.items():
        path = ("routing", kind)
        if name not in settings.consumers:
            yield _no_consumer(settings, name, path)
        elif kind not in settings.consumers[name].paths:
            paths = ("consumers", name, "paths")
            yield Finding(path, f"{name} has no paths.{kind}", (paths,))
    proxy = settings.audio_proxy
    if proxy is not None and proxy not in settings.consumers:
        yield _no_consumer(settings, proxy, ("audio_proxy",))


# ------------------------------------------------------------------------------------------ cards


def _check_gpus(settings: Settings) -> Findings:
    gpus = settings.gpus
    numbers = gpu_numbers(gpus)
    yield from _check_twice([gpu.uuid for gpu in gpus], ("gpus",), "uuid")
    for place, gpu in enumerate(gpus):
        path = ("gpus", place)
        if len(gpus) > 1 and gpu.index is None and gpu.uuid is None:
            yield Finding(path, "one of several GPUs needs an index or a uuid")
        if numbers[place] in numbers[:place]:
            text = f"there is a GPU {numbers[place]} already; without an index its place counts"
            yield Finding((*path, "index"), text)
        if gpu.sampler != gpus[0].sampler:
            text = f"one sampler reads all GPUs, and gpus[0] says {gpus[0].sampler}"
            yield Finding((*path, "sampler"), text)
        if gpu.total_mib is not None and _usable_mib(gpu, gpu.total_mib) <= 0:
            text = f"nothing is left after reserved_mib {gpu.reserved_mib} and cushion_mib "
            yield Finding((*path, "total_mib"), text + str(gpu.cushion_mib))


def _check_fit(settings: Settings) -> Findings:
    """A need that no eviction can meet is a mistake in the file, not a state of the card."""
    for here, consumer in _units(settings):
        for index, resident_mib in consumer.resident_mib_by_gpu.items():
            gpu = settings.gpu_by_index.get(index)
            need_mib = max(resident_mib, consumer.vram_load_mib)
            if gpu is None or gpu.total_mib is None or consumer.vram_managed:
                continue
            usable_mib = _usable_mib(gpu, gpu.total_mib)
            if need_mib > max(usable_mib, 0):
                declared = "vram_resident_mib" if isinstance(consumer.gpu, int) else "gpu"
                key = "vram_load_mib" if need_mib > resident_mib else declared
                text = f"{need_mib} MiB can never fit: GPU {index} has {gpu.total_mib} MiB less "
                text += f"{gpu.reserved_mib} reserved and a cushion of {gpu.cushion_mib}"
                yield Finding((*here, key), text, (("gpus",), ("gpu",), (*here, "gpu")))


def _usable_mib(gpu: GpuSettings, total_mib: int) -> int:
    return total_mib - gpu.reserved_mib - gpu.cushion_mib


# -------------------------------------------------------------------------------------- consumers


def _check_consumers(settings: Settings) -> Findings:
    for name, consumer in settings.consumers.items():
        yield from _check_url(settings, consumer, ("consumers", name, "url"))
        yield from _check_limits(settings.scheduler, consumer, ("consumers", name))
    for here, unit in _units(settings):
        yield from _check_neighbours(settings, unit, (*here, "can_coexist_with"))
        yield from _check_memory(settings, unit, here)
        yield from _check_effect(unit, here)
        yield from _check_looking(settings, unit, here)


def _units(settings: Settings) -> Iterator[tuple[Path, ConsumerSettings]]:
    """Give whatever is loaded by itself, and where it stands."""
    for unit in units(settings).values():
        here: Path = ("consumers", unit.server)
        yield (*here, "models", unit.unit.model) if unit.unit else here, unit


def _check_models(settings: Settings) -> Findings:
    """A model's name leads to one consumer, and there to one model."""
    owners: dict[str, Path] = {}
    for consumer in settings.consumers.values():
        here = ("consumers", consumer.name)
        for path, name in _model_names(consumer, (*here, "models")):
            owner = owners.setdefault(name, path)
            if owner != path:
                yield Finding(path, f"{name} is a name at {dotted(owner)} already")
        if isinstance(consumer.models, Mapping):
            yield from _check_own_models(consumer, consumer.models, here)
        elif "models" not in _required(consumer):
            for path in _places_of_model(consumer):
                text = "{model} stands for one of `models`, and that is no mapping here"
                yield Finding((*here, *path), text, ((*here, "models"),))


def _model_names(consumer: ConsumerSettings, here: Path) -> Iterator[tuple[Path, str]]:
    if not isinstance(consumer.models, Mapping):
        yield from (((*here, place), name) for place, name in enumerate(consumer.models))
        return
    for model, settings in consumer.models.items():
        if model != ANY:
            yield from (((*here, model), name) for name in names_of(model, settings))


def _check_own_models(
    consumer: ConsumerSettings, models: Mapping[str, ModelSettings], here: Path
) -> Findings:
    if consumer.vram_managed:
        text = "with vram_managed it loads its models as it likes"
        yield Finding((*here, "models"), text, ((*here, "vram_managed"),))
    for key in ("load", "unload"):
        if getattr(consumer, key) and (key,) not in _places_of_model(consumer):
            text = "it must say which of its models: put {model} where the name belongs"
            yield Finding((*here, key), text, ((*here, "models"),))
    if ANY in models and (models[ANY].upstream or models[ANY].aliases):
        text = "it stands for the models that nobody named: it has no name itself"
        yield Finding((*here, "models", ANY), text)


def _check_presets(settings: Settings) -> Findings:
    for consumer in settings.consumers.values():
        here = ("consumers", consumer.name)
        for key, example in _required(consumer).items():
            value = getattr(consumer, key)
            if not value or (key == "models" and not isinstance(value, Mapping)):
                text = f"{consumer.preset} needs {key} beside it, as `{key}: {example}`"
                yield Finding((*here, "preset"), text, ((*here, key),))


def _required(consumer: ConsumerSettings) -> Mapping[str, str]:
    """Give the keys that its preset must have beside it, each with an example."""
    return presets.preset(consumer.preset).requires if consumer.preset else {}


def _places_of_model(consumer: ConsumerSettings) -> Iterator[Path]:
    """Give where {model} stands."""
    for key in ("load", "unload"):
        if any(map(_names_a_model, getattr(consumer, key))):
            yield (key,)
    for key in ("residency", "busy"):
        question = getattr(consumer, key)
        parts = {} if isinstance(question, str | None) else asdict(question)
        yield from ((key, part) for part, value in parts.items() if "{model}" in (value or ""))


def _names_a_model(step: Step) -> bool:
    return with_value(step, "model", "a") != with_value(step, "model", "b")


def _check_neighbours(settings: Settings, consumer: ConsumerSettings, path: Path) -> Findings:
    yield from _check_twice(consumer.can_coexist_with, path)
    for place, name in enumerate(consumer.can_coexist_with):
        if name == consumer.name:
            yield Finding((*path, place), "names the consumer itself")
        elif name not in settings.consumers and name not in units(settings):
            yield _no_consumer(settings, name, (*path, place))


def _check_url(settings: Settings, consumer: ConsumerSettings, path: Path) -> Findings:
    match = URL_ADDRESS.match(consumer.url)
    if match is None:
        return
    host, port = match[2], int(match[3] or SCHEME_PORTS[match[1]])
    if _is_no_address(host):
        yield Finding(path, f"{host} is no IP address")
    fronts = [address for addresses in settings.fronts.values() for address in addresses]
    for address in (*settings.listen, *fronts):
        own_host, own_port = _host_port(address)
        own_ip = _ip(own_host)
        local = _is_loopback(own_host) or (own_ip is not None and own_ip.is_unspecified)
        same = own_host == host or (local and _is_loopback(host))
        if port == own_port and same:
            yield Finding(path, "is the broker's own address", (("listen",),))


def _check_memory(settings: Settings, consumer: ConsumerSettings, here: Path) -> Findings:
    if consumer.gpu == "none":
        for key in ("vram_resident_mib", "vram_load_mib", "vram_residue_mib", "vram_managed"):
            if getattr(consumer, key):
                yield Finding((*here, key), "with gpu: none it takes no GPU memory")
        return
    by_gpu = consumer.resident_mib_by_gpu
    known = ", ".join(map(str, sorted(settings.gpu_by_index)))
    for index in by_gpu:
        if index not in settings.gpu_by_index:
            text = f"there is no GPU {index}; there are: {known}"
            yield Finding((*here, "gpu"), text, (("gpus",), ("gpu",)))
    if not isinstance(consumer.gpu, int) and consumer.vram_resident_mib != 0:
        yield Finding((*here, "vram_resident_mib"), "gpu says already how much it takes on each")
    if any(0 < mib < consumer.vram_residue_mib for mib in by_gpu.values()):
        text = "more would stay after an unload than it takes while resident"
        yield Finding((*here, "vram_residue_mib"), text)


def _check_limits(scheduler: SchedulerSettings, consumer: ConsumerSettings, here: Path) -> Findings:
    """A limit inside a load or unload must not be longer than that may take as a whole."""
    driver = consumer.driver
    kind = "process" if driver and driver.process else "container"
    runs = driver and (driver.process or driver.container)
    load = [((*here, "load", at, "timeout_s"), s.timeout_s) for at, s in enumerate(consumer.load)]
    unload = [
        ((*here, "unload", at, "timeout_s"), s.timeout_s) for at, s in enumerate(consumer.unload)
    ]
    if runs:
        load.append(((*here, "driver", kind, "ready_s"), runs.ready_s))
    if consumer.unload_again_s is not None:
        unload.append(((*here, "unload_again_s"), consumer.unload_again_s))
    for parts, key in ((load, "load_timeout_s"), (unload, "unload_timeout_s")):
        limit_s = getattr(scheduler, key)
        for path, part_s in parts:
            if part_s > limit_s:
                text = f"{part_s:g} s, but scheduler.{key} ends it after {limit_s:g} s"
                yield Finding(path, text, (("scheduler", key),), unless_default=True)
    grace_s = runs.grace_s if runs else None
    if grace_s is not None and grace_s + KILLED_S > scheduler.unload_timeout_s:
        text = f"{grace_s:g} s and {KILLED_S:g} s for SIGKILL are more than "
        text += f"scheduler.unload_timeout_s, {scheduler.unload_timeout_s:g} s"
        path = (*here, "driver", kind, "grace_s")
        yield Finding(path, text, (("scheduler", "unload_timeout_s"),))


def _check_effect(consumer: ConsumerSettings, here: Path) -> Findings:
    """What is asked for must be possible."""
    driver = consumer.driver or consumer.systemd_unit
    ways = (*here, "driver"), (*here, "systemd_unit")
    if consumer.preload and not (consumer.load or driver):
        text = "nothing can load it: there is no load and no driver"
        yield Finding((*here, "preload"), text, ((*here, "load"), *ways))
    if consumer.unload_again_s is not None and not consumer.unload:
        text = "nothing is told to unload: there is no unload"
        yield Finding((*here, "unload_again_s"), text, ((*here, "unload"),))
    if consumer.job is not None and not consumer.paths:
        yield Finding((*here, "job"), "it has no paths: no work to follow", ((*here, "paths"),))
    if consumer.idle_unload_s is None:
        return
    path = (*here, "idle_unload_s")
    for key in ("pinned", "vram_managed"):
        if getattr(consumer, key):
            yield Finding(path, f"with {key} it is never unloaded", ((*here, key),))
    if not (consumer.unload or driver):
        text = "nothing can unload it: there is no unload and no driver"
        yield Finding(path, text, ((*here, "unload"), *ways))


def _check_looking(settings: Settings, consumer: ConsumerSettings, here: Path) -> Findings:
    """It must be possible to see what is to be seen."""
    residency, path = consumer.residency, (*here, "residency")
    if residency != "assumed" and consumer.vram_managed:
        text = "with vram_managed it is never tracked"
        yield Finding(path, text, ((*here, "vram_managed"),))
    if isinstance(residency, ResidencySettings) and residency.mib is None:
        text = "there is no mib that it could be the unit of"
        yield Finding((*path, "unit"), text, unless_default=True)
    if isinstance(residency, ResidencySettings) and residency.mib and consumer.gpu == "none":
        yield Finding((*path, "mib"), "with gpu: none it takes no GPU memory", ((*here, "gpu"),))
    if residency == "nvml":
        yield from _check_nvml(settings, consumer, here)


def _check_nvml(settings: Settings, consumer: ConsumerSettings, here: Path) -> Findings:
    path = (*here, "residency")
    if consumer.gpu == "none":
        yield Finding(path, "with gpu: none it takes no GPU memory", ((*here, "gpu"),))
    if settings.gpus[0].sampler == "none":
        yield Finding(path, "nobody reads the GPUs: sampler is none", (("gpus",), ("gpu",)))
    elif not (consumer.driver or consumer.systemd_unit or local_port(consumer.url)):
        text = "its processes cannot be found: url is not on the loopback of this host, and there "
        ways = ((*here, "url"), (*here, "driver"), (*here, "systemd_unit"))
        yield Finding(path, text + "is no driver", ways)


def _check_drivers(settings: Settings) -> Findings:
    """What one consumer's driver stops must not be another's."""
    owners: dict[tuple[str, str, object], str] = {}
    for consumer in settings.consumers.values():
        here = ("consumers", consumer.name)
        driver, short = consumer.driver, consumer.systemd_unit
        other = driver and (driver.systemd is None or driver.systemd.unit != short)
        if short and other:
            text = "driver names another way to start and stop it"
            yield Finding((*here, "systemd_unit"), text, ((*here, "driver"),))
        unit = _stopped_by_driver(consumer)
        owner = consumer.name if unit is None else owners.setdefault(unit, consumer.name)
        if unit and owner != consumer.name:
            text = f"{unit[1]} is the {unit[0]} of {owner} too: stopping one would stop both"
            yield Finding((*here, "driver" if driver else "systemd_unit"), text)


def _stopped_by_driver(consumer: ConsumerSettings) -> tuple[str, str, object] | None:
    """Give what its driver stops, where that has a name on this host: its kind, name and place."""
    driver = consumer.driver
    if driver and driver.systemd:
        return "unit", driver.systemd.unit, driver.systemd.user
    if driver and driver.container:
        return "container", driver.container.name, driver.container.engine
    return ("unit", consumer.systemd_unit, False) if consumer.systemd_unit else None


# ---------------------------------------------------------------------------------------- helpers


def _check_twice(values: Sequence[object], path: Path, key: str | None = None) -> Findings:
    """Find what a list names twice, None apart."""
    for place, value in enumerate(values):
        if value is not None and value in values[:place]:
            where = (*path, place) if key is None else (*path, place, key)
            yield Finding(where, f"{value} is given twice")


def _no_consumer(settings: Settings, name: str, path: Path) -> Finding:
    near = difflib.get_close_matches(name, settings.consumers, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    names = ", ".join(settings.consumers) or "none"
    text = f"there is no consumer {name}{hint}; there are: {names}"
    return Finding(path, text, (("consumers", name),))


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _is_no_address(host: str) -> bool:
    """Say whether it looks like an IP address and is none."""
    return re.fullmatch(r"\[.*\]|[0-9.]+", host) is not None and _ip(host) is None


def _is_loopback(host: str) -> bool:
    ip = _ip(host)
    return host == "localhost" if ip is None else ip.is_loopback


CHECKS: tuple[Callable[[Settings], Findings], ...] = (
    _check_listen,
    _check_fronts,
    _check_auth,
    _check_routing,
    _check_gpus,
    _check_fit,
    _check_consumers,
    _check_models,
    _check_presets,
    _check_drivers,
)

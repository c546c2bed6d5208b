"""The user's file, read and checked: `load_settings`."""

import os
from collections.abc import Mapping
from pathlib import Path

from attrs import evolve

from mgpu_effects.config_checks import check
from mgpu_effects.reading import ConfigError, Reader
from mgpu_effects.settings import (
    ConsumerSettings,
    DriverSettings,
    Settings,
    SystemdSettings,
)

__all__ = ["ConfigError", "ConfigErrors", "load_settings"]


class ConfigErrors(Exception):  # noqa: N818 - it is a collection of them
    """All that is wrong with a file, in the order of its lines."""

    def __init__(self, errors: tuple[ConfigError, ...]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = errors


def load_settings(path: str | Path, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read and check the file. Raises `ConfigErrors` with everything that is wrong."""
    reader = Reader(str(path), environ)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reader.note((), f"cannot be read: {error}")
        raise ConfigErrors(tuple(reader.errors)) from error
    settings = reader.read(text, Settings)
    if settings is not None:
        check(settings, reader)
    if reader.errors or settings is None:
        raise ConfigErrors(tuple(sorted(reader.errors)))
    consumers = {name: _with_driver(one) for name, one in settings.consumers.items()}
    return evolve(settings, consumers=consumers)


def _with_driver(consumer: ConsumerSettings) -> ConsumerSettings:
    """Spell out what `systemd_unit` is short for."""
    if consumer.systemd_unit is None or consumer.driver is not None:
        return consumer
    driver = DriverSettings(systemd=SystemdSettings(unit=consumer.systemd_unit))
    return evolve(consumer, driver=driver)

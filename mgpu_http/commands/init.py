"""`mgpu init`: a first configuration, from what listens, runs and holds memory on this host."""

import asyncio
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attrs import asdict

from mgpu_effects import presets
from mgpu_effects.config_file import ConfigErrors, load_settings
from mgpu_effects.discovery import HOST, Host, Service, known_ports, look
from mgpu_effects.first_config import first_config, runs
from mgpu_http.commands.output import DONE, FAILED, USAGE, CommandError, document, message, result
from mgpu_http.commands.output import table as table_of

HEAD = ("consumer", "preset", "version", "address", "runs as", "models", "holds MiB")


def init(arguments: Namespace) -> int:
    file = Path(arguments.config)
    if file.exists() and not (arguments.force or arguments.dry_run):
        text = (
            f"{file} is there already, and is left as it is: --dry-run shows what would be in it,"
        )
        raise CommandError(f"{text} --force replaces it, `mgpu init FILE` writes another", USAGE)
    asked = ports(arguments.ports)
    host = asyncio.run(look(asked))
    text = _checked(first_config(host, arguments.listen))
    written = bool(host.services) and not arguments.dry_run
    if written:
        _write(file, text)
    if arguments.json:
        document({"file": str(file) if written else None, "config": text, **_found(host)})
    elif arguments.dry_run:
        result(text.rstrip("\n"))
    elif host.services:
        result(_table(host))
    _tell(host, arguments.listen, asked)
    if written:
        message(f"\n{file} is written. Next:")
        message(f"  mgpu check {file}\n  mgpu serve --config {file}")
    return DONE if host.services else FAILED


def _checked(text: str) -> str:
    """Give it back if the broker could run with it. Raises CommandError with what is wrong."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "consumers.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            load_settings(file)
        except ConfigErrors as errors:
            raise CommandError(f"what was found makes no configuration:\n{errors}") from errors
    return text


def _write(file: Path, text: str) -> None:
    """Put it there as a whole: what was there stays until then."""
    new = file.with_name(f"{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        new.replace(file)
    except OSError as error:
        raise CommandError(f"{file} can't be written: {error.strerror}") from error


def _tell(host: Host, listen: str, ports: Iterable[int]) -> None:
    for stranger in host.strangers:
        message(f"port {stranger.port}: {stranger.what}")
    port = listen.rpartition(":")[2]
    if port.isdecimal() and int(port) in host.listening:
        message(f"port {port}, where the broker is to listen, is in use: --listen ADDRESS:PORT")
    if not host.services:
        asked = ", ".join(map(str, ports))
        message(f"mgpu: no service that is known answers on {HOST}, asked at {asked}")
        message(
            "start it, or say where it is with --ports; `mgpu presets` lists those that are known"
        )


# ------------------------------------------------------------------------------------ what is said


def _table(host: Host) -> str:
    return table_of(HEAD, [_row(each) for each in host.services])


def _row(service: Service) -> tuple[object, ...]:
    return (
        service.name,
        service.preset.name,
        service.version,
        service.url,
        runs(service).removeprefix("runs ").removeprefix("as ") or None,
        len(service.models) or None,
        sum(service.held_mib.values()) or None,
    )


def _found(host: Host) -> dict[str, Any]:
    services = [
        {
            "name": each.name,
            "preset": each.preset.name,
            "url": each.url,
            "version": each.version,
            "models": [asdict(model) for model in each.models],
            "run_by": asdict(each.run_by),
            "held_mib": each.held_mib,
            "problems": each.problems,
        }
        for each in host.services
    ]
    return {
        "services": services,
        "others": [asdict(each) for each in host.strangers],
        "cards": [asdict(each) for each in host.cards],
        "gpu_error": host.gpu_error,
    }


# ------------------------------------------------------------------------------------------- ports


def ports(text: str) -> Mapping[int, tuple[str, ...]]:
    """Read `known,9000,mvoice:9766`: where to ask, and which preset is expected there."""
    found: dict[int, tuple[str, ...]] = {}
    for word in text.split(","):
        if word == "known":
            found |= known_ports()
            continue
        name, colon, number = word.rpartition(":")
        if not number.isdecimal() or not 0 < int(number) < 65536:
            raise CommandError(f"--ports: {word!r} is no port, PRESET:PORT or known", USAGE)
        if colon and name not in presets.names():
            text = f"--ports: there is no preset {name!r}; `mgpu presets` lists them"
            raise CommandError(text, USAGE)
        found[int(number)] = (*found.get(int(number), ()), *([name] if colon else []))
    return found

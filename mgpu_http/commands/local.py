"""The commands that need no running broker: serve, check, key add."""

import asyncio
import logging
from argparse import Namespace
from pathlib import Path

from attrs import asdict

from mgpu_effects.config_file import ConfigError, ConfigErrors, load_settings
from mgpu_effects.event_log import EventLogError
from mgpu_http.auth import hash_key, new_key
from mgpu_http.commands.output import DONE, FAILED, USAGE, CommandError, document, message, result
from mgpu_http.server import serve as run_server


def serve(arguments: Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        return asyncio.run(run_server(Path(arguments.config)))
    except ConfigErrors as errors:
        raise CommandError(str(errors), USAGE) from errors
    except EventLogError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(error.strerror or str(error)) from error


def check(arguments: Namespace) -> int:
    if not Path(arguments.config).is_file():
        raise CommandError(f"there is no file {arguments.config}", USAGE)
    errors: tuple[ConfigError, ...] = ()
    try:
        settings = load_settings(arguments.config)
    except ConfigErrors as found:
        errors = found.errors
    if arguments.json:
        document({"ok": not errors, "errors": [asdict(error) for error in errors]})
    elif errors:
        for error in errors:
            message(str(error))
    else:
        result(f"{arguments.config}: in order, {len(settings.consumers)} consumers")
    return FAILED if errors else DONE


def key_add(arguments: Namespace) -> int:
    """Make a key; it is shown once, and only its hash goes into the configuration."""
    key = new_key()
    entry = {"name": arguments.name, "hash": hash_key(key), "admin": arguments.admin}
    if arguments.json:
        document({"key": key, "entry": entry})
        return DONE
    result(key)
    message("Shown only this once. Add this under `auth:` to `keys:` in the configuration:")
    admin = ", admin: true" if arguments.admin else ""
    message(f"  - {{name: {arguments.name}, hash: {entry['hash']}{admin}}}")
    return DONE

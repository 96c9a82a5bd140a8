"""What the commands share: log lines a person can read, reports, and how an error reaches a person."""

import contextlib
import glob
import json
import logging as standard_logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import app, logging
from etils import epath

from pop3d_jax.user_cache import user_cache

# Libraries whose informational lines say nothing to the person at the terminal; their warnings still come through.
_TALKATIVE = ("orbax", "grain", "tensorflow_datasets", "jax", "flax")


class _OwnLines(standard_logging.Filter):
    def filter(self, record: standard_logging.LogRecord) -> bool:
        if not any(f"/{library}/" in record.pathname for library in _TALKATIVE):
            return True
        # Orbax warns of a folder that was opened for reading on purpose.
        return record.levelno >= standard_logging.WARNING and "directory is read only" not in record.getMessage()


def run(main: Callable[[list[str]], Any]) -> None:
    """`absl.app.run` with log lines that start with the time of day and leave out other libraries' chatter.

    What is no flag ends the process with status 1: `--text a red car` would else ask for "a".
    """

    def with_own_log(arguments: list[str]) -> Any:
        handler = logging.get_absl_handler()
        handler.addFilter(_OwnLines())
        handler.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        if arguments[1:]:
            sys.stderr.write(f"error: not a flag: {' '.join(arguments[1:])}; a value that holds spaces needs quotes\n")
            sys.exit(1)
        _choose_platform()
        _keep_compiled_programs()
        return main(arguments)

    app.run(with_own_log)


def _choose_platform() -> None:
    """The CPU where there is no accelerator: JAX would look for one, and complain where libtpu is installed."""
    accelerators = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
    if not os.environ.get("JAX_PLATFORMS") and not any(glob.glob(pattern) for pattern in accelerators):
        jax.config.update("jax_platforms", "cpu")


def _keep_compiled_programs() -> None:
    """Compiled programs are kept from one command to the next, unless JAX_COMPILATION_CACHE_DIR names a place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.fspath(user_cache("compiled")))


@contextlib.contextmanager
def stop_with_message(*expected: type[Exception]) -> Iterator[None]:
    """Ends the process with status 1 and the error's own words, without a traceback, for errors of these types."""
    try:
        yield
    except expected as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


def write_report(report: dict[str, Any], out: str | None) -> None:
    """Writes a report as JSON where `out` names a file; what has no value (NaN) becomes null, as JSON has it."""
    if not out:
        return
    path = epath.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_without_nan(report), indent=2, allow_nan=False))
    logging.info("numbers: %s", path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

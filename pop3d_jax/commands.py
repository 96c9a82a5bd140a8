"""What the commands share: log lines a person can read, and how an expected error reaches them."""

import contextlib
import logging as standard_logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, logging

# Libraries whose informational lines say nothing to the person at the terminal; their warnings still come through.
_TALKATIVE = ("orbax", "grain", "tensorflow_datasets", "jax", "flax")


class _OwnLines(standard_logging.Filter):
    def filter(self, record: standard_logging.LogRecord) -> bool:
        if not any(f"/{library}/" in record.pathname for library in _TALKATIVE):
            return True
        # Orbax warns of a folder that was opened for reading on purpose.
        return record.levelno >= standard_logging.WARNING and "directory is read only" not in record.getMessage()


def run(main: Callable[[list[str]], Any]) -> None:
    """`absl.app.run` with log lines that start with the time of day and leave out other libraries' chatter."""

    def with_own_log(arguments: list[str]) -> Any:
        handler = logging.get_absl_handler()
        handler.addFilter(_OwnLines())
        handler.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        return main(arguments)

    app.run(with_own_log)


@contextlib.contextmanager
def stop_with_message(*expected: type[Exception]) -> Iterator[None]:
    """Ends the process with status 1 and the error's own words, without a traceback, for errors of these types."""
    try:
        yield
    except expected as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)

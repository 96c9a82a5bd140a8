"""Progress of long work: a bar on a terminal, one plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from absl import logging
from tqdm import tqdm

Item = TypeVar("Item")

# Plain lines go to log files and CI consoles: rare enough not to drown them.
_SECONDS_BETWEEN_LINES = 10.0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def progress(items: Iterable[Item], total: int, description: str) -> Iterator[Item]:
    """Yields the items and tells how far the work is.

    Args:
      items: what is worked through; an item counts as done when the next one is asked for.
      total: how many items there are.
      description: a few words that name the work.

    Yields:
      The items, unchanged and in order.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=description, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES and done < total:
            last = now
            left = (now - start) / done * (total - done)
            logging.info("%s: %d of %d, %s left", description, done, total, _duration(left))
    logging.info("%s: %d of %d done in %s", description, done, total, _duration(time.monotonic() - start))

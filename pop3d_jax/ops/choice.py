"""What `implementation="auto"` takes: the implementation that was measured to be the fastest at the nearest shape, if
it was clearly faster than the operation's default.

The measurements are `times.json`, written by

    python -m benchmarks.deformable_attention --write_table
    python -m benchmarks.deformable_conv --write_table

for the platform they run on; rows of other platforms stay. Only measured times are in it (forward and backward pass
together): a platform without rows gets the default. `reference` is never taken: it is there to test the others against
and may need far more memory.
"""

import functools
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import jax

TABLE = Path(str(resources.files("pop3d_jax.ops") / "times.json"))

# So many times faster than the default another implementation must have been: times of two runs differ a little.
_CLEARLY = 1.2


def platform() -> str:
    """ "cpu", "gpu" or "tpu": where the program being traced will run, by its mesh; else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def fastest(operation: str, default: str, sizes: dict[str, int]) -> str:
    """The implementation with the shortest time in the row whose sizes are nearest, by ratios.

    Args:
        operation: function of this package.
        default: where nothing was measured, or nothing was clearly faster.
        sizes: by the names that the operation's rows have.
    """
    here = platform()
    rows = [row for row in _rows() if row["operation"] == operation and row["platform"] == here]
    if not rows:
        return default

    def distance(row: dict[str, Any]) -> float:
        return sum(abs(math.log(max(row["sizes"][name], 1) / max(size, 1))) for name, size in sizes.items())

    seconds = {name: time for name, time in min(rows, key=distance)["seconds"].items() if name != "reference"}
    best = min(seconds, key=seconds.get, default=default)
    return best if default not in seconds or seconds[best] * _CLEARLY < seconds[default] else default


def write_rows(operation: str, measured: list[dict[str, Any]]) -> None:
    """Replaces the rows of an operation on this platform; those of other operations and platforms stay.

    Raises:
        ValueError: a row without times.
    """
    empty = [row for row in measured if not row["seconds"]]
    if empty:
        raise ValueError(f"nothing was measured of {operation} at {empty}: the table stays as it is")
    here = platform()
    kept = [row for row in _rows() if row["operation"] != operation or row["platform"] != here]
    new = [{"operation": operation, "platform": here, **row} for row in measured]
    rows = sorted(kept + new, key=lambda row: (row["operation"], row["platform"]))
    TABLE.write_text('{"rows": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n")
    _rows.cache_clear()
    print(f"written: {TABLE}")


@functools.cache
def _rows() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text())["rows"] if TABLE.exists() else []

"""What each implementation of the deformable convolution costs: time here, and a TPU's memory by its compiler.

    python -m benchmarks.deformable_conv                      time and temporaries on this machine
    python -m benchmarks.deformable_conv --topology v5e:2x2   one chip, compiled and not run (needs libtpu)
    python -m benchmarks.deformable_conv --write_table        also what implementation="auto" chooses from

The shapes are those of the published backbone's stages 3 and 4 (one image of 928 x 1600 pixels) and of the demo's.
Forward, and forward with backward, in turns; medians of --repeats rounds; ratios to `taps` of the same run are what to
quote. FLOPs and bytes: as in benchmarks/deformable_attention.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import COLUMNS, absent_chip, compare
from benchmarks.report import Table
from pop3d_jax.ops import choice
from pop3d_jax.ops.deformable_conv import deformable_conv2d

# Name: images, height, width, channels in and out.
SHAPES = {
    "stage 3": (1, 58, 100, 256),
    "stage 4": (1, 29, 50, 512),
    "demo: stage 3": (6, 10, 16, 64),
    "demo: stage 4": (6, 5, 8, 128),
}
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the maps and kernels")
_REPEATS = flags.DEFINE_integer("repeats", 7, "timed rounds", lower_bound=1)
_TOPOLOGY = flags.DEFINE_string("topology", None, "compile for this TPU instead of running here")
_WRITE_TABLE = flags.DEFINE_bool("write_table", False, "write the shortest times to the table that `auto` reads")
_JSON = flags.DEFINE_string("json", None, "folder of the table as JSON")


def functions(implementation: str) -> dict[str, Any]:
    """The forward pass, and forward with backward."""

    def forward(*arguments: jax.Array) -> jax.Array:
        return deformable_conv2d(*arguments, padding=1, implementation=implementation)

    def loss(*arguments: jax.Array) -> jax.Array:
        return (forward(*arguments).astype(jnp.float32) ** 2).sum()

    return {"forward": forward, "forward and backward": jax.grad(loss, (0, 1, 2, 3))}


def arguments_of(shape: tuple[int, int, int, int], dtype: str) -> tuple[jax.Array, ...]:
    """Maps, offsets of a cell or two as a trained network's, masks and kernels."""
    images, height, width, channels = shape
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(images, height, width, channels)), dtype),
        jnp.asarray(rng.normal(size=(images, height, width, 9, 2)), jnp.float32),
        jnp.asarray(rng.uniform(size=(images, height, width, 9)), dtype),
        jnp.asarray(rng.normal(size=(3, 3, channels, channels)) / np.sqrt(9 * channels), dtype),
    )


def main(_: list[str]) -> None:
    if _WRITE_TABLE.value and (_TOPOLOGY.value or _DTYPE.value != "float32"):
        raise app.UsageError("--write_table measures here, in float32: leave out --topology and --dtype")
    place = absent_chip(_TOPOLOGY.value) if _TOPOLOGY.value else None
    suffix = "_" + _TOPOLOGY.value.replace(":", "_") if _TOPOLOGY.value else ""
    table = Table("deformable_conv" + suffix, COLUMNS, dtype=_DTYPE.value)
    rows = []
    for name, shape in SHAPES.items():
        arguments = arguments_of(shape, _DTYPE.value)
        times = compare(table, name, functions, ("reference", "taps", "matmul"), arguments, _REPEATS.value, place)
        sizes = {"cells": shape[1] * shape[2], "channels": shape[3]}
        rows.append({"shape": name, "sizes": sizes, "seconds": times})
    table.write(_JSON.value)
    if _WRITE_TABLE.value:
        choice.write_rows("deformable_conv2d", rows)


if __name__ == "__main__":
    app.run(main)

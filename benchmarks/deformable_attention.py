"""What each implementation of deformable attention costs: time here, and a TPU's memory by its compiler.

    python -m benchmarks.deformable_attention                      time and temporaries on this machine
    python -m benchmarks.deformable_attention --topology v5e:2x2   one chip, compiled and not run (needs libtpu)
    python -m benchmarks.deformable_attention --write_table        also what implementation="auto" chooses from

The shapes are those that the published network's loops have (images of 928 x 1600 pixels, 8 heads of 32 channels): one
step of the image attention over tokens of plane zh or wz, one over tokens of plane hw, and the self-attention of plane
hw; then the demo's. Forward, and forward with backward. The implementations run in turns, medians of --repeats rounds;
ratios to `gather` of the same run are what to quote. FLOPs and bytes are counted in the traced program, every turn of a
loop (pop3d_jax/traced_cost.py); elementwise work, which makes the coefficients of `matmul`, is not in them.
"""

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import COLUMNS, absent_chip, compare
from benchmarks.report import Table
from pop3d_jax.ops import choice
from pop3d_jax.ops.deformable_attention import Implementation, deformable_attention

_LEVELS = ((116, 200), (58, 100), (29, 50), (15, 25))
_DEMO_LEVELS = ((20, 32), (10, 16), (5, 8), (3, 4))
# Name: queries, levels, samples of a query and head in each level, channels of a head, heads.
SHAPES = {
    "images from zh and wz": (100, _LEVELS, 64, 32, 8),
    "images from hw": (1024, _LEVELS, 8, 32, 8),
    "hw itself": (10000, ((100, 100),), 8, 32, 8),
    "demo: images from zh and wz": (50, _DEMO_LEVELS, 8, 24, 2),
    "demo: images from hw": (313, _DEMO_LEVELS, 4, 24, 2),
    "demo: hw itself": (2500, ((50, 50),), 8, 24, 2),
}
_SHAPES = flags.DEFINE_multi_enum("shapes", list(SHAPES), list(SHAPES), "given once for each; --write_table takes all")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the values")
_REPEATS = flags.DEFINE_integer("repeats", 7, "timed rounds", lower_bound=1)
_TOPOLOGY = flags.DEFINE_string("topology", None, "compile for this TPU instead of running here")
_ONLY = flags.DEFINE_multi_enum(
    "only", None, get_args(Implementation), "given once for each; by default all that are compiled on the platform"
)
_WRITE_TABLE = flags.DEFINE_bool("write_table", False, "write the shortest times to the table that `auto` reads")
_JSON = flags.DEFINE_string("json", None, "folder of the table as JSON")


def functions(implementation: str, shapes: tuple) -> dict[str, Any]:
    """The forward pass, and forward with backward."""

    def forward(values: jax.Array, locations: jax.Array, weights: jax.Array) -> jax.Array:
        return deformable_attention(values, shapes, locations, weights, implementation=implementation)

    def loss(*arguments: jax.Array) -> jax.Array:
        return (forward(*arguments).astype(jnp.float32) ** 2).sum()

    return {"forward": forward, "forward and backward": jax.grad(loss, (0, 1, 2))}


def arguments_of(shape: tuple, dtype: str) -> tuple[jax.Array, ...]:
    """Values, and samples around an anchor, as the network's are."""
    queries, levels, points, channels, heads = shape
    rng = np.random.default_rng(0)
    sampled = (queries, heads, len(levels), points)
    anchors = rng.uniform(0, 1, (queries, 1, 1, 1, 2))
    return (
        jnp.asarray(rng.normal(size=(sum(h * w for h, w in levels), heads, channels)), dtype),
        jnp.asarray(anchors + rng.normal(0, 0.03, (*sampled, 2)), jnp.float32),
        jnp.asarray(rng.uniform(0, 1, sampled) / (len(levels) * points), jnp.float32),
    )


def main(_: list[str]) -> None:
    if _WRITE_TABLE.value and (_TOPOLOGY.value or _ONLY.value or _DTYPE.value != "float32"):
        raise app.UsageError(
            "--write_table measures all implementations here, in float32: leave out --topology, --only and --dtype"
        )
    place = absent_chip(_TOPOLOGY.value) if _TOPOLOGY.value else None
    # Elsewhere the kernel is interpreted: its time says nothing.
    with_kernel = place is not None or jax.default_backend() == "tpu"
    implementations = _ONLY.value or [name for name in get_args(Implementation) if with_kernel or name != "pallas"]
    suffix = "_" + _TOPOLOGY.value.replace(":", "_") if _TOPOLOGY.value else ""
    table = Table("deformable_attention" + suffix, COLUMNS, dtype=_DTYPE.value)
    rows = []
    for name in SHAPES if _WRITE_TABLE.value else _SHAPES.value:
        queries, levels, points, _, heads = SHAPES[name]
        passes = functools.partial(functions, shapes=levels)
        arguments = arguments_of(SHAPES[name], _DTYPE.value)
        times = compare(table, name, passes, implementations, arguments, _REPEATS.value, place)
        texels = sum(h * w for h, w in levels)
        sizes = {"queries": queries, "texels": texels, "samples": heads * len(levels) * points}
        rows.append({"shape": name, "sizes": sizes, "seconds": times})
    table.write(_JSON.value)
    if _WRITE_TABLE.value:
        choice.write_rows("deformable_attention", rows)


if __name__ == "__main__":
    app.run(main)

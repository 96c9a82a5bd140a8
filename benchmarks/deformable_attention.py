"""What each implementation of deformable attention costs: time here, and a TPU's memory and bytes by its compiler.

    python -m benchmarks.deformable_attention                      time and temporaries on this machine
    python -m benchmarks.deformable_attention --topology v5e:2x2   one chip, compiled and not run (needs libtpu)

The published network's image attention: one camera, four levels of 928 x 1600 pixels, 8 heads of 32 channels, and one
step of its loop over tokens (1,024 tokens of plane zh or wz with 64 samples a level). Forward, and forward with
backward. Ratios to `gather` of the same run are what to quote; medians of --repeats runs.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from pop3d_jax.ops.deformable_attention import Implementation, deformable_attention

_LEVELS = ((116, 200), (58, 100), (29, 50), (15, 25))
_TOKENS = flags.DEFINE_integer("tokens", 1024, "queries")
_POINTS = flags.DEFINE_integer("points", 64, "samples of a query in each level")
_HEADS = flags.DEFINE_integer("heads", 8, "heads")
_CHANNELS = flags.DEFINE_integer("channels", 32, "channels of a head")
_SCALE = flags.DEFINE_integer("scale", 1, "divides the sizes of the levels")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "of the values")
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs")
_TOPOLOGY = flags.DEFINE_string("topology", None, "compile for this TPU instead of running here")
_ONLY = flags.DEFINE_list("only", None, "implementations to measure; all by default")
_JSON = flags.DEFINE_string("json", None, "also write the rows to this file")


def functions(implementation: str, shapes: tuple) -> dict[str, Any]:
    """The jitted forward pass, and forward with backward."""

    def forward(values: jax.Array, locations: jax.Array, weights: jax.Array) -> jax.Array:
        return deformable_attention(values, shapes, locations, weights, implementation=implementation)

    def loss(*arguments: jax.Array) -> jax.Array:
        return (forward(*arguments).astype(jnp.float32) ** 2).sum()

    return {"forward": jax.jit(forward), "forward and backward": jax.jit(jax.grad(loss, (0, 1, 2)))}


def main(_: list[str]) -> None:
    shapes = tuple((max(h // _SCALE.value, 1), max(w // _SCALE.value, 1)) for h, w in _LEVELS)
    tokens = sum(h * w for h, w in shapes)
    queries = (_TOKENS.value, _HEADS.value, len(shapes), _POINTS.value)
    rng = np.random.default_rng(0)
    shaped = (
        jax.ShapeDtypeStruct((tokens, _HEADS.value, _CHANNELS.value), _DTYPE.value),
        jax.ShapeDtypeStruct((*queries, 2), jnp.float32),
        jax.ShapeDtypeStruct(queries, jnp.float32),
    )
    if _TOPOLOGY.value:
        from configs.pop3d_nuscenes import get_config
        from pop3d_jax.compile_report import topology_mesh
        from pop3d_jax.sharding import replicated

        jax.config.update("jax_platforms", "cpu")
        place = replicated(topology_mesh(_TOPOLOGY.value, get_config()))
        arguments = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shaped)
    else:
        arguments = (
            jnp.asarray(rng.normal(size=shaped[0].shape), _DTYPE.value),
            # Around an anchor, as the network samples.
            jnp.asarray(
                rng.uniform(0, 1, (_TOKENS.value, 1, 1, 1, 2)) + rng.normal(0, 0.03, shaped[1].shape), "float32"
            ),
            jnp.asarray(rng.uniform(0, 1, queries), jnp.float32),
        )
    rows = []
    for implementation in _ONLY.value or get_args(Implementation):
        for name, function in functions(implementation, shapes).items():
            start = time.monotonic()
            row = {"implementation": implementation, "pass": name, "where": _TOPOLOGY.value or jax.default_backend()}
            try:
                compiled = function.lower(*arguments).compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                rows.append(row | {"refused": "does not fit into the chip's memory"})
                print(f"{implementation:<12}{name:<22} does not fit into the chip's memory", flush=True)
                continue
            memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
            row |= {
                "compile_seconds": time.monotonic() - start,
                "temporary_bytes": memory.temp_size_in_bytes,
                "flops": cost.get("flops"),
                "bytes_accessed": cost.get("bytes accessed"),
            }
            text = f"temporaries {row['temporary_bytes'] / 1e6:>9.1f} MB"
            if _TOPOLOGY.value:
                text += f"  {row['flops'] / 1e9:>9.1f} GFLOP  {row['bytes_accessed'] / 1e9:>8.2f} GB accessed"
            else:
                jax.block_until_ready(compiled(*arguments))
                seconds = []
                for _ in range(_REPEATS.value):
                    start = time.monotonic()
                    jax.block_until_ready(compiled(*arguments))
                    seconds.append(time.monotonic() - start)
                row["seconds"] = statistics.median(seconds)
                text += f"  median {row['seconds'] * 1e3:>9.1f} ms"
            rows.append(row)
            print(f"{implementation:<12}{name:<22} {text}", flush=True)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)

"""Time and peak memory of the published network's forward pass, or of a training step's gradient.

    python -m benchmarks.model_memory          six images of 928 x 1600, 34,688 points, 512-d voxel features
    python -m benchmarks.model_memory --gradient --remat all --height 224 --width 416

`benchmarks/whole_system.py` sets it beside the official network. Weights and images are random, the
offsets of the deformable convolutions drawn as wide as a trained network's, and the cameras stand as on the real
car (five of 70 degrees, one of 110 to the back): what a camera sees decides how much the encoder has to do.
"""

import json
import resource
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks.rig import camera_rig
from pop3d_jax.models.pop3d import Pop3D, Pop3DConfig

_HEIGHT = flags.DEFINE_integer("height", 928, "height of the padded images, a multiple of 32")
_WIDTH = flags.DEFINE_integer("width", 1600, "width of the padded images, a multiple of 32")
_POINTS = flags.DEFINE_integer("points", 34688, "points, for occupancy and for features")
_BATCH = flags.DEFINE_integer("batch", 1, "key frames")
_REPEATS = flags.DEFINE_integer("repeats", 2, "timed runs; the median counts")
_GRADIENT = flags.DEFINE_bool("gradient", False, "forward and backward of a loss, without voxel features")
_REMAT = flags.DEFINE_string("remat", "encoder", "what the backward pass computes again, as config.model.remat")
_DTYPE = flags.DEFINE_enum("compute_dtype", "float32", ["float32", "bfloat16"], "type of the computation")
_JSON = flags.DEFINE_string("json", None, "also write the figures to this file")


def peak_gigabytes() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(_: list[str]) -> None:
    config = Pop3DConfig(remat=_REMAT.value, compute_dtype=_DTYPE.value)
    abstract = nnx.eval_shape(lambda: Pop3D(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "'scale'" in name or "'var'" in name:
            return jnp.ones(leaf.shape)
        if len(leaf.shape) < 2:
            return jnp.asarray(rng.uniform(-1.0, 1.0, leaf.shape), jnp.float32)
        spread = 1.0 / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(rng.uniform(-spread, spread, leaf.shape), jnp.float32)

    state = jax.tree_util.tree_map_with_path(draw, state)
    rig = camera_rig(_HEIGHT.value, _WIDTH.value)
    images = 60.0 * rng.standard_normal((_BATCH.value, len(rig), _HEIGHT.value, _WIDTH.value, 3), np.float32)
    images = jnp.asarray(images)
    lidar_to_image = jnp.asarray(np.broadcast_to(rig, (_BATCH.value, *rig.shape)))
    points = jnp.asarray(rng.uniform(0, config.grid_size, (_BATCH.value, _POINTS.value, 3)), jnp.float32)

    def forward(state, images, lidar_to_image, points):
        return nnx.merge(graph, state)(images, lidar_to_image, points, points, voxel_features=not _GRADIENT.value)

    def loss(*inputs):
        output = forward(*inputs)
        return (output.occupancy_logits**2).mean() + (output.point_features**2).mean()

    inputs = (state, images, lidar_to_image, points)
    before = peak_gigabytes()
    start = time.perf_counter()
    compiled = jax.jit(jax.grad(loss) if _GRADIENT.value else forward).lower(*inputs).compile()
    compile_seconds = time.perf_counter() - start
    compile_peak = peak_gigabytes()
    seconds = []
    for _ in range(_REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - start)
    what = "forward and backward" if _GRADIENT.value else "forward"
    print(f"{what}, {_BATCH.value} x {len(rig)} images of {_HEIGHT.value} x {_WIDTH.value}, {_DTYPE.value}")
    print(f"compilation {compile_seconds:.1f} s, runs {', '.join(f'{s:.1f}' for s in seconds)} s")
    report = {
        "compile_seconds": compile_seconds,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "peak_gigabytes": peak_gigabytes(),
    }
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(report) + "\n")
    print(f"XLA's buffers {compiled.memory_analysis().temp_size_in_bytes / 2**30:.2f} GB")
    print(f"peak memory {peak_gigabytes():.2f} GB (before {before:.2f}, after compilation {compile_peak:.2f})")


if __name__ == "__main__":
    app.run(main)

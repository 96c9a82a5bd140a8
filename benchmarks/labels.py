"""Time of the labels of one key frame: the jitted functions of the training step against straightforward NumPy.

    python -m benchmarks.labels [--points 34688] [--repeats 10] [--json docs/results]

The NumPy version is what a person would write from the official code: vectorised, float64, all ray samples at
once. Both are checked to be equal before they are timed, and both run in one process, one after the other.
Points are drawn like a 32-beam sweep: beams that meet the ground or a wall.
"""

import jax
import numpy as np
from absl import app, flags

from benchmarks.drawn_sweep import sweep
from benchmarks.measure import medians_in_turns
from benchmarks.report import Table
from pop3d_jax import labels
from pop3d_jax.nuscenes import EMPTY, IGNORE, UNLABELLED
from pop3d_jax.voxels import RAY_SAMPLES, Volume

_POINTS = flags.DEFINE_integer("points", 34688, "lidar points of the key frame")
_REPEATS = flags.DEFINE_integer("repeats", 10, "runs of each; the median is reported")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the drawn sweep")
_JSON = flags.DEFINE_string("json", None, "folder of labels.json")


def numpy_labels(points: np.ndarray, classes: np.ndarray, volume: Volume) -> dict[str, np.ndarray]:
    """The same grids in vectorised NumPy, the official float64 arithmetic."""
    lower, upper = np.array(volume.minimum), np.array(volume.maximum)
    interval = (upper - lower) / np.array(volume.grid_size)

    def voxels(xyz):
        cells = np.floor((np.clip(xyz, lower, upper - 1e-3) - lower) / interval).astype(np.int64)
        return np.ravel_multi_index(tuple(np.moveaxis(cells, -1, 0)), volume.grid_size)

    def majority(flat, point_classes, fill):
        keys, counts = np.unique(flat * 256 + point_classes, return_counts=True)
        order = np.lexsort((keys % 256, -counts, keys // 256))
        winners = keys[order][np.unique(keys[order] // 256, return_index=True)[1]]
        fill[winners // 256] = winners % 256
        return fill

    flat = voxels(points)
    inside = ((points > lower) & (points < upper)).all(-1)
    occupancy = np.zeros(volume.num_voxels, np.uint8)
    occupancy[flat] = 1
    crossed = np.zeros(volume.num_voxels, bool)
    crossed[voxels(np.linspace(0, 1, RAY_SAMPLES)[:, None, None] * points[inside])] = True
    semantic_majority = majority(flat, classes, np.full(volume.num_voxels, EMPTY, np.uint8))
    visible_classes = np.where(classes == UNLABELLED, IGNORE, classes)[inside]
    fill = np.where(crossed, EMPTY, IGNORE).astype(np.uint8)
    semantic_rays = majority(flat[inside], visible_classes, fill)
    occupancy_rays = np.where(crossed, 0, IGNORE).astype(np.uint8)
    occupancy_rays[flat[inside]] = 1
    known = (semantic_rays != IGNORE) | (semantic_majority == UNLABELLED)
    occupancy_eval = np.where(semantic_rays == EMPTY, 0, np.where(known, 1, IGNORE)).astype(np.uint8)
    grids = {
        "occupancy_tpvformer": occupancy,
        "semantic_majority": semantic_majority,
        "semantic_rays": semantic_rays,
        "occupancy_rays": occupancy_rays,
        "occupancy_eval": occupancy_eval,
    }
    return {name: grid.reshape(volume.grid_size) for name, grid in grids.items()}


def numpy_training_label(points: np.ndarray, volume: Volume) -> np.ndarray:
    """Occupancy of the training target alone, in NumPy."""
    lower, upper = np.array(volume.minimum), np.array(volume.maximum)
    interval = (upper - lower) / np.array(volume.grid_size)
    cells = np.floor((np.clip(points, lower, upper - 1e-3) - lower) / interval).astype(np.int64)
    occupancy = np.zeros(volume.grid_size, np.uint8)
    occupancy[tuple(cells.T)] = 1
    return occupancy


def main(_):
    volume = Volume()
    points, classes = sweep(_POINTS.value, _SEED.value)

    @jax.jit
    def all_labels(points, classes, mask):
        grids = labels.evaluation_labels(points, classes, mask, volume)
        return grids | {"occupancy_tpvformer": labels.occupancy_tpvformer(points, mask, volume)}

    training_label = jax.jit(lambda points, mask: labels.occupancy_tpvformer(points, mask, volume))
    on_device = jax.device_put((points, classes, np.ones(len(points), bool)))
    device_points, _, device_mask = on_device

    expected = numpy_labels(points, classes, volume)
    for name, grid in all_labels(*on_device).items():
        if not np.array_equal(grid, expected[name]):
            raise AssertionError(f"{name} differs from the NumPy version; its time would mean nothing")

    table = Table("labels", ["labels of one key frame", "jitted", "NumPy", "NumPy / jitted"])
    for name, ours, plain in (
        (
            "training target",
            lambda: training_label(device_points, device_mask),
            lambda: numpy_training_label(points, volume),
        ),
        ("all evaluation grids", lambda: all_labels(*on_device), lambda: numpy_labels(points, classes, volume)),
    ):
        jitted, numpy = medians_in_turns([(ours, ()), (plain, ())], _REPEATS.value)
        table.add(name, f"{1e3 * jitted:.2f} ms", f"{1e3 * numpy:.2f} ms", f"{numpy / jitted:.1f}")
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)

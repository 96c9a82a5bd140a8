"""Time and memory of RayIoU: rays of a key frame through ground truth and prediction, and counting them.

    python -m benchmarks.ray_casting [--rounds 7] [--json docs/results]

Eight origins of 14,040 rays. The street is drawn: flat ground, boxes of all classes, a prediction one voxel off. In the
empty grid every ray walks on to the border, which is the most that it can; the prediction is empty as well.
"""

import statistics

import numpy as np
from absl import app, flags

from benchmarks.measure import peak_mebibytes, timed
from benchmarks.report import Table
from pop3d_jax.occ3d.grid import FREE, OCC3D_VOLUME
from pop3d_jax.occ3d.ray_iou import count_rays
from pop3d_jax.occ3d.rays import ray_directions

_ROUNDS = flags.DEFINE_integer("rounds", 7, "runs of each; the median is reported")
_JSON = flags.DEFINE_string("json", None, "folder of ray_casting.json")

_COLUMNS = ["grids", "seconds a key frame", "rays a second", "peak memory beside the program's own"]
_ROAD, _BOXES = 11, 150


def street(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ground truth and prediction."""
    rng = np.random.default_rng(seed)
    truth = np.full(OCC3D_VOLUME.grid_size, FREE, np.uint8)
    truth[:, :, :3] = _ROAD
    for _ in range(_BOXES):
        x, y = rng.integers(0, 200, 2)
        # The street itself is free.
        if abs(y - 100) > 12:
            length, width, height = rng.integers((2, 2, 2), (12, 12, 13))
            truth[x : x + length, y : y + width, 3 : 3 + height] = rng.integers(0, FREE)
    return truth, np.roll(truth, (1, 1), (0, 1))


def main(_: list[str]) -> None:
    table = Table("ray_casting", _COLUMNS)
    origins = np.stack([np.linspace(-31.0, 32.0, 8), np.zeros(8), np.full(8, 1.84)], -1)
    empty = np.full(OCC3D_VOLUME.grid_size, FREE, np.uint8)
    rays = 2 * len(origins) * len(ray_directions())
    own = peak_mebibytes()

    def add(name: str, seconds: float) -> None:
        table.add(name, f"{seconds:.2f}", f"{rays / seconds:,.0f}", f"{peak_mebibytes() - own:.0f} MiB")

    drawn, nothing = (*street(0), origins, OCC3D_VOLUME), (empty, empty, origins, OCC3D_VOLUME)
    add("street, the first with its compilation", timed(count_rays, drawn))
    for name, arguments in (("street", drawn), ("empty", nothing)):
        add(name, statistics.median(timed(count_rays, arguments) for _ in range(_ROUNDS.value)))
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)

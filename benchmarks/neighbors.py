"""Time of a cloud's nearest neighbours: SciPy's k-d tree in a worker against the search over all pairs in the step.

    python -m benchmarks.neighbors [--clouds 5000,20000] [--neighbors 16] [--rounds 5] [--json docs/results]

Points are drawn like a sweep, thinned to one a voxel as the pipeline does. Both are checked to name the same neighbours
before they are timed, in turns.
"""

import jax
import numpy as np
from absl import app, flags

from benchmarks.drawn_sweep import sweep
from benchmarks.measure import compiled_for, medians_in_turns
from benchmarks.report import Table
from pop3d_jax.data.neighbors import nearest_neighbors
from pop3d_jax.data.point_clouds import nearest, thin

_CLOUDS = flags.DEFINE_list("clouds", ["5000", "20000"], "points of each cloud")
_NEIGHBORS = flags.DEFINE_integer("neighbors", 16, "neighbours of each point, itself apart")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "runs of each; the median is reported")
_JSON = flags.DEFINE_string("json", None, "folder of neighbors.json")


def cloud(count: int) -> np.ndarray:
    """A drawn sweep of this many points after thinning, those nearest to the lidar."""
    drawn, _ = sweep(3 * count, seed=0)
    kept = drawn[thin(drawn, 0.1)]
    if len(kept) < count:
        raise ValueError(f"the drawn sweep leaves {len(kept)} points of {count}")
    return kept[nearest(kept, np.zeros(3), count)]


def main(_: list[str]) -> None:
    count = _NEIGHBORS.value
    table = Table("neighbors", ["points", "k-d tree", "all pairs", "all pairs / k-d tree", "temporaries of all pairs"])
    for points in map(int, _CLOUDS.value):
        xyz, mask = cloud(points), np.ones(points, bool)

        def tree(xyz, mask):
            return nearest_neighbors(xyz, mask, count, implementation="kd_tree")

        def pairs(xyz, mask):
            return nearest_neighbors(xyz, mask, count, implementation="all_pairs")

        program, on_device = compiled_for(pairs, (xyz, mask)), jax.device_put((xyz, mask))
        if not np.array_equal(program(*on_device), tree(xyz, mask)):
            raise AssertionError("the two searches name other neighbours; their times would mean nothing")
        in_tree, in_pairs = medians_in_turns([(tree, (xyz, mask)), (program, on_device)], _ROUNDS.value)
        memory = program.memory_analysis().temp_size_in_bytes
        table.add(
            f"{points:,}",
            f"{1e3 * in_tree:.0f} ms",
            f"{1e3 * in_pairs:.0f} ms",
            f"{in_pairs / in_tree:.0f}",
            f"{memory / 1e6:.0f} MB",
        )
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)

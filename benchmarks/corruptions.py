"""Time of each corruption of a sweep, on one core.

    python -m benchmarks.corruptions [--points 34688] [--repeats 10] [--json docs/results]

The sweep is drawn like that of a 32-beam lidar; half of its ground is road, the rest of it has any class.
"""

import numpy as np
from absl import app, flags

from benchmarks.drawn_sweep import labelled_sweep
from benchmarks.measure import medians_in_turns
from benchmarks.report import Table
from pop3d_jax.corruptions import CORRUPTIONS, NUSCENES_SENSOR, SEVERITIES, corrupt

_SEVERITY_NAMES = ("light", "moderate", "heavy")

_POINTS = flags.DEFINE_integer("points", 34688, "lidar points of the sweep")
_REPEATS = flags.DEFINE_integer("repeats", 10, "runs of each; the median is reported")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the drawn sweep")
_JSON = flags.DEFINE_string("json", None, "folder of corruptions.json")


def main(_):
    points, labels = labelled_sweep(_POINTS.value, _SEED.value)
    table = Table(
        "corruptions", ["corruption", *_SEVERITY_NAMES, "points left", "points put elsewhere"], points=len(points)
    )
    for name in CORRUPTIONS:

        def run(severity, name=name):
            return corrupt(name, severity, points, labels, np.random.default_rng(_SEED.value), NUSCENES_SENSOR)

        seconds = medians_in_turns([(run, (severity,)) for severity in SEVERITIES], _REPEATS.value)
        found = [run(severity)[1] for severity in SEVERITIES]
        left = ", ".join(f"{len(labels_left) / len(points):.1%}" for labels_left in found)
        moved = ", ".join(f"{np.mean(labels_left == NUSCENES_SENSOR.unlabelled):.1%}" for labels_left in found)
        table.add(name, *(f"{1e3 * taken:.1f} ms" for taken in seconds), left, moved)
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)

"""Seconds of one core per key frame of the synthetic world, by image scale and by sensor.

    python -m benchmarks.synthetic_world --image_scale 0.25 --scenes 4

Processor time, so that other work on the machine does not count; the files are not written.
"""

import time

import numpy as np
from absl import app, flags

from data_prep.world import lidar, rig
from data_prep.world.render import sensor_pose, sun_map, take_picture
from data_prep.world.scene import draw_scene
from data_prep.world.solids import Solids

_SCENES = flags.DEFINE_integer("scenes", 4, "Scenes to time, one key frame each.", lower_bound=1)
_IMAGE_SCALE = flags.DEFINE_float("image_scale", 0.25, "Size of the images as a share of 1600 x 900.", 0.02, 1.0)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    seconds = {"layout of the scene": [], "shadows": [], "six cameras": [], "lidar": []}
    shape = rig.image_size(_IMAGE_SCALE.value)
    for seed in range(_SCENES.value):
        marks = [time.process_time()]
        scene = draw_scene(np.random.default_rng(seed), 2)
        solids = Solids(scene)
        marks.append(time.process_time())
        shadows = sun_map(scene, solids, 0.0)
        marks.append(time.process_time())
        for sensor in rig.CAMERA_SENSORS:
            at = sensor.delay * 1e-6
            pose = sensor_pose(scene, at, sensor.to_ego())
            take_picture(scene, solids, shadows, at, pose, sensor.intrinsics(_IMAGE_SCALE.value), shape)
        marks.append(time.process_time())
        pose = sensor_pose(scene, 0.0, rig.LIDAR_SENSOR.to_ego())
        lidar.take_sweep(scene, solids, 0.0, pose, np.random.default_rng(seed))
        marks.append(time.process_time())
        for name, spent in zip(seconds, np.diff(marks), strict=True):
            seconds[name].append(spent)
    print(f"{_SCENES.value} scenes, images {shape[1]} x {shape[0]}, seconds of one core (mean, worst)")
    for name, values in seconds.items():
        print(f"{name:24s} {np.mean(values):6.2f} {np.max(values):6.2f}")
    whole = np.sum([values for name, values in seconds.items() if not name.startswith("layout")], axis=0)
    print(f"{'a key frame':24s} {whole.mean():6.2f} {whole.max():6.2f}")


if __name__ == "__main__":
    app.run(main)

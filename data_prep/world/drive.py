"""A scene that is driven through at ten key frames a second, as KITTI and PandaSet record: what their layouts share."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from data_prep.world.lidar import Lidar, Sweep, take_sweep
from data_prep.world.recorded_scene import SceneTask
from data_prep.world.render import Picture, SunMap, sensor_pose, sun_map, take_picture
from data_prep.world.rig import Sensor, image_size
from data_prep.world.scene import Scene, draw_scene
from data_prep.world.solids import Solids

KEYFRAME_SECONDS = 0.1
# `draw_scene` counts in key frames half a second apart.
_FRAMES_OF_SCENE = 5


class Drive:
    """One scene while it is being recorded; everything drawn depends on the task alone.

    Attributes:
      task: what is recorded.
    """

    def __init__(self, task: SceneTask):
        self.task = task
        layout = np.random.default_rng([task.seed, task.index, 0])
        self._scene: Scene = draw_scene(layout, -(-(task.keyframes - 1) // _FRAMES_OF_SCENE) + 1)
        self._solids = Solids(self._scene)

    def camera_noise(self) -> np.random.Generator:
        """Draws how this car's cameras are mounted."""
        return np.random.default_rng([self.task.seed, self.task.index, 3])

    def key_frames(self) -> Iterator[tuple[int, float, np.random.Generator, SunMap | None]]:
        """Number, time in seconds, source of noise, and shadows of every key frame."""
        for number in range(self.task.keyframes):
            time = number * KEYFRAME_SECONDS
            rng = np.random.default_rng([self.task.seed, self.task.index, 2, number])
            yield number, time, rng, sun_map(self._scene, self._solids, time)

    def pose(self, time: float, to_ego: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
        """Pose in the world of something mounted on the car."""
        return sensor_pose(self._scene, time, to_ego)

    def sweep(self, time: float, sensor: Sensor, rng: np.random.Generator, lidar: Lidar) -> Sweep:
        """What a lidar measures at a time in seconds."""
        return take_sweep(self._scene, self._solids, time, self.pose(time, sensor.to_ego()), rng, lidar)

    def picture(self, time: float, to_ego: Float[np.ndarray, "4 4"], camera: Sensor, shadows: SunMap | None) -> Picture:
        """What a camera sees at a time in seconds; `to_ego` is where it is mounted, `camera` gives its lens."""
        scale = self.task.image_scale
        shape = image_size(scale, camera.full_hw)
        pose = self.pose(time, to_ego)
        return take_picture(self._scene, self._solids, shadows, time, pose, camera.intrinsics(scale), shape)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file and the folders above it."""
    write_file(path, (json.dumps(content) + "\n").encode())

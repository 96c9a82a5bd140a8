"""A scene as nuScenes' rig drives through it: when each sensor fires, from where, and what the lidar measures.

What is recorded and what is known of the truth (`data_prep.dense_labels`) both come from here.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from data_prep.world.lidar import HDL_32E, Lidar, Sweep, take_sweep
from data_prep.world.render import sensor_pose
from data_prep.world.rig import KEYFRAME_MICROSECONDS, LIDAR_SENSOR, Sensor, mounted_cameras
from data_prep.world.scene import Scene, draw_scene
from data_prep.world.solids import Solids

_FIRST_TIMESTAMP = 1_590_000_000_000_000


@dataclass(frozen=True)
class SceneTask:
    """What a worker needs to record a scene."""

    root: Path
    seed: int
    index: int
    name: str
    split: str
    keyframes: int
    image_scale: float
    camera_jitter: float = 0.0


@dataclass(frozen=True)
class RecordedKeyFrame:
    """One key frame.

    Attributes:
      timestamp: of the lidar, microseconds; `camera_timestamps` in the order of `RecordedScene.cameras`.
      time: of the lidar, seconds since the scene began.
      lidar_to_world: pose of the lidar, metres.
      sweep: what it measured.
    """

    timestamp: int
    time: float
    lidar_to_world: Float[np.ndarray, "4 4"]
    sweep: Sweep
    camera_timestamps: tuple[int, ...]


class RecordedScene:
    """One scene and the drive through it; depends on nothing but the task.

    Attributes:
      task: what is recorded.
      scene, solids: the world.
      cameras: as this car has them mounted.
      shift: where the scene lies on the map, metres: real recordings are hundreds of metres from the map's origin.
    """

    def __init__(self, task: SceneTask, lidar: Lidar = HDL_32E):
        self.task = task
        layout, offsets = (np.random.default_rng([task.seed, task.index, part]) for part in (0, 1))
        self.scene: Scene = draw_scene(layout, task.keyframes)
        self.solids = Solids(self.scene)
        self.cameras: tuple[Sensor, ...] = mounted_cameras(
            task.camera_jitter, np.random.default_rng([task.seed, task.index, 3])
        )
        self.shift = np.array([*offsets.uniform(300, 1900, 2), 0.0])
        self._start = _FIRST_TIMESTAMP + task.index * 100_000_000
        self._lidar = lidar

    def seconds(self, timestamp: int) -> float:
        """Seconds since the scene began of a timestamp in microseconds."""
        return (timestamp - self._start) * 1e-6

    def key_frame(self, number: int) -> RecordedKeyFrame:
        """The key frame of a number from 0."""
        rng = np.random.default_rng([self.task.seed, self.task.index, 2, number])
        timestamp = self._start + number * KEYFRAME_MICROSECONDS + int(rng.integers(-300, 301))
        time = self.seconds(timestamp)
        lidar_to_world = sensor_pose(self.scene, time, LIDAR_SENSOR.to_ego())
        sweep = take_sweep(self.scene, self.solids, time, lidar_to_world, rng, self._lidar)
        cameras = tuple(timestamp + camera.delay + int(rng.integers(-1500, 1501)) for camera in self.cameras)
        return RecordedKeyFrame(timestamp, time, lidar_to_world, sweep, cameras)

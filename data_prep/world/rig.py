"""The sensor rigs: where cameras and lidars sit on the car, and when they fire.

Provenance of the nuScenes-like rig: nominal values of the nuScenes rig (Caesar et al., CVPR 2020), rounded to 1 cm, 0.1
degree and 5 pixels. They are facts of the hardware as any rig of that make has them, not a copy of a calibration file.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pop3d_jax.geometry import quaternion_to_rotation, rotation_to_quaternion

FULL_WIDTH, FULL_HEIGHT = 1600, 900

# 20 sweeps a second; every tenth sweep is a key frame, as in nuScenes.
SWEEP_MICROSECONDS = 50_000
KEYFRAME_MICROSECONDS = 500_000


@dataclass(frozen=True)
class Sensor:
    """One sensor of the rig.

    `translation` in metres and `yaw`, `pitch`, `roll` in degrees (rotations about z, then y, then x) place it in
    the ego frame (x forward, y left, z up). `focal` and `centre` are in pixels of an image of `full_hw`
    (height, width), None for a lidar. `delay` is how many microseconds after the lidar's time stamp it fires
    (negative: before).
    """

    channel: str
    translation: tuple[float, float, float]
    yaw: float
    pitch: float
    roll: float
    focal: float | None
    centre: tuple[float, float] | None
    delay: int
    full_hw: tuple[int, int] = (FULL_HEIGHT, FULL_WIDTH)

    def rotation(self) -> Float[np.ndarray, "3 3"]:
        """Rotation from the sensor's frame to the ego frame."""
        half = np.radians([self.yaw, self.pitch, self.roll]) / 2
        (cy, cp, cr), (sy, sp, sr) = np.cos(half), np.sin(half)
        return quaternion_to_rotation(
            np.array(
                [
                    cy * cp * cr + sy * sp * sr,
                    cy * cp * sr - sy * sp * cr,
                    cy * sp * cr + sy * cp * sr,
                    sy * cp * cr - cy * sp * sr,
                ]
            )
        )

    def quaternion(self) -> Float[np.ndarray, "4"]:
        """The rotation as a unit quaternion (w, x, y, z), as `calibrated_sensor.json` holds it."""
        return rotation_to_quaternion(self.rotation())

    def to_ego(self) -> Float[np.ndarray, "4 4"]:
        """Transform from the sensor's frame to the ego frame, metres."""
        transform = np.eye(4)
        transform[:3, :3] = self.rotation()
        transform[:3, 3] = self.translation
        return transform

    def intrinsics(self, image_scale: float) -> Float[np.ndarray, "3 3"]:
        """Camera matrix in pixels of the scaled image; pixel centres lie at whole numbers."""
        height, width = image_size(image_scale, self.full_hw)
        along_u, along_v = width / self.full_hw[1], height / self.full_hw[0]
        return np.array(
            [
                [self.focal * along_u, 0.0, self.centre[0] * along_u],
                [0.0, self.focal * along_v, self.centre[1] * along_v],
                [0.0, 0.0, 1.0],
            ]
        )


LIDAR_SENSOR = Sensor("LIDAR_TOP", (0.94, 0.0, 1.84), -89.9, 0.3, -1.4, None, None, 0)

# In the order in which the rotating lidar sweeps past them, which is also the order of nuScenes' tables.
CAMERA_SENSORS = (
    Sensor("CAM_FRONT", (1.70, 0.02, 1.51), -89.7, 0.0, -90.3, 1265.0, (815.0, 490.0), -35_000),
    Sensor("CAM_FRONT_RIGHT", (1.55, -0.49, 1.50), -146.4, 0.5, -90.8, 1260.0, (810.0, 495.0), -28_000),
    Sensor("CAM_BACK_RIGHT", (1.01, -0.48, 1.56), 159.2, 0.6, -90.9, 1260.0, (805.0, 500.0), -20_000),
    Sensor("CAM_BACK", (0.03, 0.0, 1.58), 89.9, 0.2, -89.0, 810.0, (830.0, 480.0), -10_000),
    Sensor("CAM_BACK_LEFT", (1.04, 0.48, 1.59), 18.6, -0.2, -90.9, 1255.0, (790.0, 495.0), -1_000),
    Sensor("CAM_FRONT_LEFT", (1.52, 0.49, 1.51), -34.8, 0.1, -89.9, 1275.0, (825.0, 480.0), -43_000),
)


def mounted_cameras(
    jitter: float, rng: np.random.Generator, cameras: tuple[Sensor, ...] = CAMERA_SENSORS
) -> tuple[Sensor, ...]:
    """The cameras as one car has them: each turned by normal errors of `jitter` degrees in yaw, pitch and roll."""
    turns = rng.normal(0.0, jitter, (len(cameras), 3))
    return tuple(
        dataclasses.replace(camera, yaw=camera.yaw + yaw, pitch=camera.pitch + pitch, roll=camera.roll + roll)
        for camera, (yaw, pitch, roll) in zip(cameras, turns.tolist(), strict=True)
    )


def image_size(image_scale: float, full_hw: tuple[int, int] = (FULL_HEIGHT, FULL_WIDTH)) -> tuple[int, int]:
    """(height, width) in pixels of the images at a scale of the full size, which is (900, 1600) in nuScenes."""
    return round(full_hw[0] * image_scale), round(full_hw[1] * image_scale)

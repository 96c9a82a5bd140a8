"""Key frames for tests of the lidar pipeline: a cloud of noise around a rig of two cameras, no files needed."""

import dataclasses
import io

import numpy as np
from PIL import Image

from pop3d_jax.data.records import KeyFrame
from pop3d_jax.lidar_datasets import NUSCENES, LidarDataset

IMAGE_HW = (30, 50)

# Labels 0..4 of which 0 and 3 are not scored; the lidar stands 1 m above where the network has it.
DATASET = dataclasses.replace(
    NUSCENES,
    name="noise",
    cameras=("front", "back"),
    class_names=("road", "car", "tree"),
    raw_to_class=np.array([255, 2, 0, 255, 1], np.uint8),
    intensity_mean=10.0,
    intensity_std=5.0,
    z_shift=-1.0,
)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def noise_frame(seed: int, *, points: int = 400, dataset: LidarDataset = DATASET) -> KeyFrame:
    """A cloud in a box of 20 x 20 x 4 m, and one camera to each side along y."""
    rng = np.random.default_rng(seed)
    count = len(dataset.cameras)
    forward = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    turns = [np.diag([sign, sign, 1.0, 1.0]) for sign in (1.0, -1.0)]
    xyz = rng.uniform((-10, -10, -2), (10, 10, 2), (points, 3))
    columns = np.column_stack([xyz, rng.uniform(0, 30, points), np.zeros(points)])
    return KeyFrame(
        images=[png(rng.integers(0, 256, (*IMAGE_HW, 3), np.uint8)) for _ in range(count)],
        intrinsics=np.repeat(np.array([[[20.0, 0, 25], [0, 20.0, 15], [0, 0, 1]]]), count, 0),
        lidar_to_camera=np.stack([forward @ turns[number % 2] for number in range(count)]),
        points=columns.astype(np.float32),
        lidarseg=rng.integers(0, len(dataset.raw_to_class), points).astype(np.uint8),
        lidar_to_ego=np.eye(4),
        ego_to_global=np.eye(4),
        sample_token=f"sample{seed}",
        scene_token="scene",
        scene_name="scene",
        lidar_token=f"lidar{seed}",
        lidar_file=f"lidar{seed}.bin",
        camera_tokens=[f"{camera}{seed}" for camera in dataset.cameras],
        camera_files=[f"{camera}{seed}.png" for camera in dataset.cameras],
        camera_timestamps=np.zeros(count, np.int64),
        timestamp=seed,
    )

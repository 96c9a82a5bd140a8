"""Records one scene of the world in SemanticKITTI's layout: one sequence, 64 beams, the left colour camera.

Nominal values of KITTI's car (Geiger et al., CVPR 2012), rounded: the lidar 1.73 m above the ground, the grey camera
0.27 m before it, the colour camera 6 cm to its left.
"""

import io

import numpy as np
from jaxtyping import Float
from PIL import Image

from data_prep.world import views
from data_prep.world.drive import Drive, write_file
from data_prep.world.label_maps import SEMANTIC_KITTI_IDS
from data_prep.world.lidar import HDL_64E
from data_prep.world.recorded_scene import SceneTask
from data_prep.world.rig import Sensor, mounted_cameras
from pop3d_jax.geometry import invert_rigid

LIDAR = Sensor("velodyne", (0.80, 0.0, 1.73), 0.2, 0.3, -0.2, None, None, 0)
# The left grey camera, whose rectified frame the calibration is stated in.
GREY_CAMERA = Sensor("image_0", (1.07, 0.0, 1.65), -90.1, 0.2, -90.4, 721.5, (609.6, 172.9), 0, (375, 1242))
# From the grey camera's frame to the colour camera's, metres: the last column of P2 is K times this.
COLOUR_SHIFT = np.array([0.06, 0.0, 0.003])


def _row(values: Float[np.ndarray, "..."]) -> str:
    return " ".join(f"{value:.12e}" for value in np.ravel(values))


def record_sequence(task: SceneTask) -> None:
    """Writes dataset/sequences/NAME under the task's root; depends on nothing but the task.

    Beside the official files, segmentation/NAME and things/NAME hold the maps that `data_prep.synthetic` describes.
    """
    drive = Drive(task)
    folder = task.root / "dataset" / "sequences" / task.name
    (grey,) = mounted_cameras(task.camera_jitter, drive.camera_noise(), (GREY_CAMERA,))
    colour_to_grey = np.eye(4)
    colour_to_grey[:3, 3] = -COLOUR_SHIFT
    colour_to_ego = grey.to_ego() @ colour_to_grey
    poses, times = [], []
    for number, time, rng, shadows in drive.key_frames():
        stem = f"{number:06d}"
        sweep = drive.sweep(time, LIDAR, rng, HDL_64E)
        write_file(folder / "velodyne" / f"{stem}.bin", sweep.points[:, :4].astype("<f4").tobytes())
        # The upper half numbers instances, as in the data set.
        labels = SEMANTIC_KITTI_IDS[sweep.lidarseg].astype("<u4") | (sweep.number.astype("<u4") & 0xFFFF) << 16
        write_file(folder / "labels" / f"{stem}.label", labels.astype("<u4").tobytes())
        picture = drive.picture(time, colour_to_ego, grey, shadows)
        file = io.BytesIO()
        Image.fromarray(picture.image).save(file, "PNG")
        write_file(folder / "image_2" / f"{stem}.png", file.getvalue())
        views.write_maps(task.root, task.name, stem, picture)
        poses.append(drive.pose(time, grey.to_ego()))
        times.append(time)
    intrinsics = grey.intrinsics(task.image_scale)
    lines = [
        f"P{camera}: {_row(np.column_stack([intrinsics, intrinsics @ shift]))}"
        for camera, shift in enumerate((np.zeros(3), np.zeros(3), COLOUR_SHIFT, COLOUR_SHIFT))
    ]
    to_grey = invert_rigid(grey.to_ego()) @ LIDAR.to_ego()
    write_file(folder / "calib.txt", "\n".join([*lines, f"Tr: {_row(to_grey[:3])}", ""]).encode())
    to_first = invert_rigid(poses[0])
    write_file(folder / "poses.txt", "".join(f"{_row((to_first @ pose)[:3])}\n" for pose in poses).encode())
    write_file(folder / "times.txt", "".join(f"{time:.6e}\n" for time in times).encode())

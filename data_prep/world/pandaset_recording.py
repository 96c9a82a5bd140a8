"""Records one scene of the world in PandaSet's layout: a spinning lidar, one that looks ahead, six cameras.

The front camera's place and lens are those of the devkit's test scene, rounded. The other cameras' angles and lenses
and the places of the lidars are our own.
"""

import gzip
import io
import pickle

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

from data_prep.world import views
from data_prep.world.drive import Drive, write_file, write_json
from data_prep.world.label_maps import PANDASET_IDS
from data_prep.world.lidar import PANDAR_64, PANDAR_GT
from data_prep.world.recorded_scene import SceneTask
from data_prep.world.rig import Sensor, mounted_cameras
from pop3d_jax.geometry import rotation_to_quaternion
from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES

# PandaSet's ego frame in the world's: x right, y forward, a tenth of a metre above the ground.
EGO = Sensor("ego", (0.80, 0.0, 0.10), -90.0, 0.0, 0.0, None, None, 0)
# In the order of the column d.
LIDARS = (
    (Sensor("pandar64", (0.90, 0.0, 1.95), 0.3, 0.2, -0.1, None, None, 0), PANDAR_64),
    (Sensor("pandar_gt", (1.70, 0.0, 1.65), -0.2, 0.4, 0.1, None, None, 0), PANDAR_GT),
)
_HW = (1080, 1920)
CAMERAS = (
    Sensor("front_camera", (1.66, 0.07, 1.90), -90.2, 0.1, -90.2, 1970.0, (970.0, 483.0), -12_000, _HW),
    Sensor("front_right_camera", (1.45, -0.45, 1.88), -145.0, 0.2, -90.3, 930.0, (960.0, 510.0), -7_000, _HW),
    Sensor("front_left_camera", (1.45, 0.45, 1.88), -35.0, -0.2, -90.1, 930.0, (972.0, 508.0), 9_000, _HW),
    Sensor("back_camera", (0.10, 0.0, 1.90), 90.3, 0.1, -90.4, 933.0, (896.0, 507.0), 14_000, _HW),
    Sensor("left_camera", (0.70, 0.55, 1.88), 5.0, 0.0, -90.2, 930.0, (950.0, 520.0), 3_000, _HW),
    Sensor("right_camera", (0.70, -0.55, 1.88), 175.0, 0.1, -90.3, 930.0, (965.0, 500.0), -4_000, _HW),
)
_JPEG_QUALITY = 92
_FIRST_TIMESTAMP = 1_557_539_924.5
# First latitude of a scene decides its split.
_LATITUDE = {"train": 37.776, "val": 37.424}


def _pose_entry(pose: Float[np.ndarray, "4 4"]) -> dict[str, dict[str, float]]:
    return {
        "position": dict(zip("xyz", pose[:3, 3].tolist(), strict=True)),
        "heading": dict(zip("wxyz", rotation_to_quaternion(pose[:3, :3]).tolist(), strict=True)),
    }


def _table(columns: dict[str, Shaped[np.ndarray, " rows"]]) -> bytes:
    """A gzipped pickled table: the same bytes every time, whatever pandas takes for texts otherwise."""
    import pandas

    table = pandas.DataFrame(columns)
    table.columns = pandas.Index(list(columns), dtype=object)
    return gzip.compress(pickle.dumps(table, protocol=4), compresslevel=5, mtime=0)


def record_pandaset_scene(task: SceneTask) -> None:
    """Writes the folder of a scene under the task's root; depends on nothing but the task.

    Beside the official files, segmentation/CAMERA and things/CAMERA hold the maps that `data_prep.synthetic` describes,
    named SCENE_NN.
    """
    drive = Drive(task)
    folder = task.root / task.name
    cameras = mounted_cameras(task.camera_jitter, drive.camera_noise(), CAMERAS)
    start = _FIRST_TIMESTAMP + 100.0 * task.index
    poses = {camera.channel: [] for camera in cameras} | {"lidar": []}
    times = {name: [] for name in poses}
    gps = []
    for number, time, rng, shadows in drive.key_frames():
        _write_sweep(task, drive, number, time, start, rng)
        poses["lidar"].append(_pose_entry(drive.pose(time, EGO.to_ego())))
        times["lidar"].append(start + time)
        gps.append({"lat": _LATITUDE[task.split], "long": -122.0, "height": 3.0, "xvel": 0.0, "yvel": 0.0})
        for camera in cameras:
            fires = time + camera.delay * 1e-6
            picture = drive.picture(fires, camera.to_ego(), camera, shadows)
            file = io.BytesIO()
            Image.fromarray(picture.image).save(file, "JPEG", quality=_JPEG_QUALITY)
            write_file(folder / "camera" / camera.channel / f"{number:02d}.jpg", file.getvalue())
            views.write_maps(task.root, camera.channel, f"{task.name}_{number:02d}", picture)
            poses[camera.channel].append(_pose_entry(drive.pose(fires, camera.to_ego())))
            times[camera.channel].append(start + fires)
    for name in poses:
        place = folder / ("lidar" if name == "lidar" else f"camera/{name}")
        write_json(place / "poses.json", poses[name])
        write_json(place / "timestamps.json", times[name])
    for camera in cameras:
        matrix = camera.intrinsics(task.image_scale)
        lens = {"fx": matrix[0, 0], "fy": matrix[1, 1], "cx": matrix[0, 2], "cy": matrix[1, 2]}
        write_json(folder / "camera" / camera.channel / "intrinsics.json", lens)
    write_json(folder / "meta" / "gps.json", gps)
    classes = {str(index): name for index, name in zip(PANDASET_IDS.tolist(), LIDARSEG_CATEGORIES, strict=True)}
    names = {index: name for index, name in sorted(classes.items(), key=lambda item: int(item[0])) if int(index) > 0}
    write_json(folder / "annotations" / "semseg" / "classes.json", names)


def _write_sweep(
    task: SceneTask, drive: Drive, number: int, time: float, start: float, rng: np.random.Generator
) -> None:
    """The points of both lidars in one table, in the world, and their labels in another."""
    columns, labels = [], []
    for index, (sensor, lidar) in enumerate(LIDARS):
        sweep = drive.sweep(time, sensor, rng, lidar)
        pose = drive.pose(time, sensor.to_ego())
        xyz = sweep.points[:, :3].astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]
        count = len(xyz)
        columns.append(np.column_stack([xyz, sweep.points[:, 3], np.full(count, start + time), np.full(count, index)]))
        labels.append(PANDASET_IDS[sweep.lidarseg])
    points = np.concatenate(columns).T
    table = dict(zip("xyzit", points, strict=False)) | {"d": points[5].astype(np.int64)}
    folder = task.root / task.name
    write_file(folder / "lidar" / f"{number:02d}.pkl.gz", _table(table))
    semseg = _table({"class": np.concatenate(labels).astype(np.int64)})
    write_file(folder / "annotations" / "semseg" / f"{number:02d}.pkl.gz", semseg)

"""PandaSet's official folder to key frames: two data sets, one for each of its lidars.

Layout below the root:

  SCENE/lidar/NN.pkl.gz                    table x, y, z (metres, world), i (0..255), t, d (0 Pandar64, 1 PandarGT)
  SCENE/lidar/poses.json, timestamps.json
  SCENE/camera/CAMERA/NN.jpg, intrinsics.json, poses.json, timestamps.json
  SCENE/annotations/semseg/NN.pkl.gz       table with the column class, one row a point of the sweep
  SCENE/meta/gps.json

Frames, in metres: points are moved from the world to the ego frame of the sweep, that of lidar/poses.json: x right,
y forward, z up, origin near the ground (so say the direction of travel and the front camera in the devkit's test).
It is the record's lidar frame and its ego frame; global is the scene's world. The shift by `z_shift` metres that ScaLR
adds is not applied here. Cameras have poses of their own, so lidar to camera is right for a moving car. They are taken
as pinholes, as ScaLR does: intrinsics.json tells of no distortion.

Source: the data classes of ScaLR, JSON files of the devkit's test scene. Sweeps and labels of PandaSet itself could not
be had while this was written: that they are tables with these columns is what the devkit's documentation and ScaLR say.
"""

import functools
import hashlib
import json
from typing import Any, ClassVar

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float32, Float64, UInt8

from data_prep.key_frame_rows import KeyFrameRow, SceneKeyFrames, SplitKeyFrames, parts
from data_prep.keyframes_builder import KeyframesBuilder
from data_prep.pandas_pickles import PickleError, read_table
from data_prep.sensor_files import check_points, read_named_file, read_whole_image
from data_prep.table_rows import SourceError
from pop3d_jax.data.records import KeyFrame
from pop3d_jax.geometry import invert_rigid, rigid_transform
from pop3d_jax.lidar_datasets import (
    LIDAR_DATASETS,
    PANDAR64,
    PANDASET_CATEGORY_COUNT,
    PANDASET_TRAIN_LATITUDE,
)

# The value of d in the tables of the sweeps.
SENSOR_NUMBERS = {"pandar64": 0, "pandar_gt": 1}
# Scenes with labels in each split of the whole data set.
SCENE_COUNTS = {"train": 49, "val": 27}
_SHARD_KEY_FRAMES = 40
_AGAIN = "copy it again from PandaSet"
_LABELS = "annotations/semseg"


class Pandar64Keyframes(KeyframesBuilder, skip_registration=True):
    """PandaSet's spinning lidar, six images and a sweep a key frame."""

    name = "pandar64_keyframes"
    DESCRIPTION: ClassVar[str] = "Key frames of PandaSet: six images, sweep of the Pandar64, calibration, labels."


class PandarGTKeyframes(KeyframesBuilder, skip_registration=True):
    """PandaSet's forward lidar, the front image and a sweep a key frame."""

    name = "pandar_gt_keyframes"
    DESCRIPTION: ClassVar[str] = "Key frames of PandaSet: the front image, sweep of the PandarGT, calibration, labels."


def _scenes(source: epath.PathLike) -> list[epath.Path]:
    """Folders of the scenes that have point labels, by name."""
    root = epath.Path(source)
    if not root.exists():
        raise SourceError(f"no folder {root} (see --source)")
    found = sorted(path for path in root.iterdir() if (path / _LABELS).exists())
    if not found:
        raise SourceError(f"{root} has no scene with {_LABELS}: --source is the folder of the scenes 001, 002, ...")
    return found


def fingerprint(source: epath.PathLike) -> str:
    """Identity of the poses, times and calibration of all scenes; raises SourceError where there are none."""
    digest = hashlib.sha256()
    for scene in _scenes(source):
        cameras = [f"camera/{name}" for name in PANDAR64.cameras]
        tables = [f"{folder}/{table}.json" for folder in ("lidar", *cameras) for table in ("poses", "timestamps")]
        for table in ("meta/gps.json", *tables, *(f"{camera}/intrinsics.json" for camera in cameras)):
            if (scene / table).exists():
                digest.update(f"{scene.name} {table}\n".encode())
                digest.update((scene / table).read_bytes())
    return digest.hexdigest()


def _json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise SourceError(f"{path} does not exist: {_AGAIN}") from error
    except ValueError as error:
        raise SourceError(f"{path} is damaged ({error}): {_AGAIN}") from error


def _pose(entry: Any, path: epath.Path) -> Float64[np.ndarray, "4 4"]:
    """Sensor to world, of an entry of poses.json."""
    try:
        heading, position = entry["heading"], entry["position"]
        pose = rigid_transform(
            np.array([heading[axis] for axis in "wxyz"], np.float64),
            np.array([position[axis] for axis in "xyz"], float),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path} has an entry that is no pose ({error!r}): {_AGAIN}") from error
    if not np.isfinite(pose).all():
        raise SourceError(f"{path} has a pose that is not finite: {_AGAIN}")
    return pose


def _intrinsics(path: epath.Path) -> Float64[np.ndarray, "3 3"]:
    content = _json(path)
    try:
        fx, fy, cx, cy = (float(content[name]) for name in ("fx", "fy", "cx", "cy"))
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path} does not give fx, fy, cx and cy ({error!r}): {_AGAIN}") from error
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def _latitude(scene: epath.Path) -> float:
    path = scene / "meta" / "gps.json"
    content = _json(path)
    try:
        return float(content[0]["lat"])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise SourceError(f"{path} gives no latitude ({error!r}), which decides the split: {_AGAIN}") from error


def read_split(source: epath.PathLike, split: str, *, dataset: str) -> SplitKeyFrames:
    """Lists the key frames of a split, with calibration and poses.

    Args:
      source: folder of the scenes.
      split: "train" (latitude above 37.6 degrees) or "val".
      dataset: "pandar64" or "pandar_gt".

    Raises:
      SourceError: no scene of the split, or one without sweeps, poses, times or calibration.
    """
    scenes = [scene for scene in _scenes(source) if (_latitude(scene) > PANDASET_TRAIN_LATITUDE) == (split == "train")]
    if not scenes:
        raise SourceError(f"{source} has no scene of split {split}: all lie on the other side of the latitude")
    if len(scenes) != SCENE_COUNTS[split]:
        logging.info("%d scenes of %s; the whole of PandaSet has %d.", len(scenes), split, SCENE_COUNTS[split])
    cameras = LIDAR_DATASETS[dataset].cameras
    rows = [part for scene in scenes for part in parts(_read_scene(scene, cameras), _SHARD_KEY_FRAMES)]
    return SplitKeyFrames(rows, [], True, fingerprint(source))


def _read_scene(folder: epath.Path, cameras: tuple[str, ...]) -> SceneKeyFrames:
    """`key_frames` name files below the parent of `folder`."""
    sensors = {"lidar": folder / "lidar"} | {camera: folder / "camera" / camera for camera in cameras}
    poses, times = {}, {}
    for sensor, place in sensors.items():
        poses[sensor] = [_pose(entry, place / "poses.json") for entry in _json(place / "poses.json")]
        times[sensor] = _microseconds(place / "timestamps.json")
    intrinsics = np.stack([_intrinsics(sensors[camera] / "intrinsics.json") for camera in cameras])
    frames = sorted(path.name.removesuffix(".pkl.gz") for path in sensors["lidar"].glob("*.pkl.gz"))
    if not frames:
        raise SourceError(f"{sensors['lidar']} has no sweeps: {_AGAIN}")
    scene = SceneKeyFrames(folder.name, folder.name, [], [])
    shortest = min(sensors, key=lambda sensor: min(len(poses[sensor]), len(times[sensor])))
    for frame in frames:
        token = f"{folder.name}_{frame}"
        number = int(frame) if frame.isdigit() else len(poses[shortest])
        if number >= min(len(poses[shortest]), len(times[shortest])):
            where = sensors[shortest]
            scene.broken.append((token, f"{where} has no pose or time of frame {frame}: {_AGAIN}"))
            continue
        ego_to_world = poses["lidar"][number]
        scene.key_frames.append(
            KeyFrameRow(
                sample_token=token,
                scene_token=folder.name,
                scene_name=folder.name,
                timestamp=times["lidar"][number],
                lidar_token=f"{token}_lidar",
                lidar_file=f"{folder.name}/lidar/{frame}.pkl.gz",
                label_file=f"{folder.name}/{_LABELS}/{frame}.pkl.gz",
                lidar_to_ego=np.eye(4),
                ego_to_global=ego_to_world,
                camera_tokens=[f"{token}_{camera}" for camera in cameras],
                camera_files=[f"{folder.name}/camera/{camera}/{frame}.jpg" for camera in cameras],
                camera_timestamps=np.array([times[camera][number] for camera in cameras], np.int64),
                image_sizes=[],
                intrinsics=intrinsics,
                lidar_to_camera=np.stack([invert_rigid(poses[camera][number]) @ ego_to_world for camera in cameras]),
            )
        )
    return scene


def _microseconds(path: epath.Path) -> list[int]:
    content = _json(path)
    try:
        return [round(float(seconds) * 1e6) for seconds in content]
    except (TypeError, ValueError) as error:
        raise SourceError(f"{path} is no list of seconds ({error}): {_AGAIN}") from error


def read_key_frame(source: epath.PathLike, row: KeyFrameRow, *, dataset: str) -> KeyFrame:
    """Reads the images, one lidar's part of the sweep and its labels.

    Raises:
      SourceError: a file that is missing, damaged or does not fit the others, pandas not being installed included;
        names file and way out.
    """
    source = epath.Path(source)
    images = [read_whole_image(source, file, _AGAIN) for file in row.camera_files]
    points, chosen = _read_points(source, row, SENSOR_NUMBERS[dataset])
    return row.key_frame(images, points, _read_labels(source, row.label_file, chosen))


read_pandar64 = functools.partial(read_key_frame, dataset="pandar64")
read_pandar_gt = functools.partial(read_key_frame, dataset="pandar_gt")


def _columns(source: epath.Path, file: str, names: tuple[str, ...]) -> Float64[np.ndarray, "rows columns"]:
    data = read_named_file(source, file, _AGAIN)
    try:
        table = read_table(data)
    except (PickleError, ImportError) as error:
        way_out = "" if isinstance(error, ImportError) else f": {_AGAIN}"
        raise SourceError(f"{source / file} {error}{way_out}") from error
    missing = [name for name in names if name not in table.columns]
    if missing:
        found = ", ".join(map(str, table.columns))
        raise SourceError(f"{source / file} has no column {', '.join(missing)} but {found}: {_AGAIN}")
    try:
        return table[list(names)].to_numpy(np.float64)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{source / file} holds something that is no number ({error}): {_AGAIN}") from error


def _read_points(
    source: epath.Path, row: KeyFrameRow, sensor: int
) -> tuple[Float32[np.ndarray, "points 5"], np.ndarray]:
    """One lidar's points in the ego frame, and which rows of the sweep they are."""
    sweep = _columns(source, row.lidar_file, ("x", "y", "z", "i", "d"))
    name = f"lidar file {source / row.lidar_file}"
    check_points(sweep, name)
    chosen = sweep[:, 4] == sensor
    if not chosen.any():
        raise SourceError(f"{name} has no point of lidar d = {sensor}: {_AGAIN}")
    world_to_ego = invert_rigid(row.ego_to_global)
    xyz = sweep[chosen, :3] @ world_to_ego[:3, :3].T + world_to_ego[:3, 3]
    # The files name no beam.
    points = np.column_stack([xyz, sweep[chosen, 3], np.full(len(xyz), -1.0)]).astype(np.float32)
    return points, chosen


def _read_labels(source: epath.Path, file: str, chosen: np.ndarray) -> UInt8[np.ndarray, " points"]:
    labels = _columns(source, file, ("class",))[:, 0]
    name = f"label file {source / file}"
    if len(labels) != len(chosen):
        raise SourceError(f"{name} has {len(labels)} labels for {len(chosen)} points: {_AGAIN}")
    known = (labels >= 0) & (labels < PANDASET_CATEGORY_COUNT) & (labels == np.floor(labels))
    if not known.all():
        listed = ", ".join(f"{label:g}" for label in np.unique(labels[~known])[:8])
        raise SourceError(f"{name} has label {listed}; PandaSet's go from 0 to {PANDASET_CATEGORY_COUNT - 1}: {_AGAIN}")
    return labels[chosen].astype(np.uint8)

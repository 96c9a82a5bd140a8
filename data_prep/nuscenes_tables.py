"""nuScenes' relational tables, joined into key frames.

Only key frames of one split are kept while the tables stream by: the two tables of 2.6 million rows of the
full data set never lie in memory. `ego_pose_token` is followed (the released tables give a pose and its
sensor data the same token; others need not).
"""

import dataclasses

import numpy as np
from etils import epath
from jaxtyping import Float64

from data_prep import splits
from data_prep.key_frame_rows import KeyFrameRow, SceneKeyFrames, SplitKeyFrames
from data_prep.table_rows import SourceError, TableFolder
from pop3d_jax import geometry
from pop3d_jax.nuscenes import CAMERAS, LIDAR, LIDARSEG_CATEGORIES

REQUIRED_TABLES = ("scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "sensor")
# Point labels are a download of their own; v1.0-test has the table without rows.
LABEL_TABLES = ("lidarseg", "category")

_CHANNELS = (LIDAR, *CAMERAS)


@dataclasses.dataclass(frozen=True, slots=True)
class _SensorData:
    token: str
    ego_pose_token: str
    calibrated_sensor_token: str
    timestamp: int
    file: str
    size: tuple[int, int]


def tables_fingerprint(source: epath.PathLike, version: str) -> str:
    """Identity of the tables that a build depends on; raises SourceError where a required one is missing."""
    folder = TableFolder(epath.Path(source), version)
    folder.require(REQUIRED_TABLES)
    return folder.fingerprint(REQUIRED_TABLES + tuple(name for name in LABEL_TABLES if folder.path(name).exists()))


def read_tables(source: epath.PathLike, version: str, split: str) -> SplitKeyFrames:
    """Joins the tables of a nuScenes folder for one split.

    Args:
      source: root of the data set, local or gs://.
      version: folder of the tables, such as "v1.0-mini".
      split: such as "mini_train".

    Raises:
      SourceError: a missing or damaged table, a split that has no scene here, labels without the lidarseg
        categories, rows that contradict each other. What concerns one key frame alone is in `broken` instead.
      SplitError: a split that the version does not have.
    """
    splits.check_split(version, split)
    folder = TableFolder(epath.Path(source), version)
    fingerprint = tables_fingerprint(source, version)

    names, sample_counts = _read_scenes(folder, split)
    samples = _read_samples(folder, sample_counts)
    channels, calibrations = _read_calibrations(folder)
    problems: dict[str, SourceError] = {}
    data = _read_sensor_data(folder, samples, channels, problems)
    poses = _read_poses(folder, {row.ego_pose_token for frame in data.values() for row in frame.values()})
    labels = _read_labels(folder)

    scenes = {name: SceneKeyFrames(name, token, [], []) for token, name in names.items()}
    # By time; the token only makes the order complete.
    for sample, (scene_token, timestamp) in sorted(samples.wanted.items(), key=lambda item: (item[1][1], item[0])):
        scene = scenes[names[scene_token]]
        try:
            if sample in problems:
                raise problems[sample]
            row = _join(folder, sample, scene, timestamp, data.get(sample, {}), calibrations, poses, labels)
        except SourceError as error:
            scene.broken.append((sample, str(error)))
        else:
            scene.key_frames.append(row)
    official = splits.scene_names(split)
    return SplitKeyFrames(
        scenes=[scenes[name] for name in official if name in scenes],
        absent_scenes=[name for name in official if name not in scenes],
        labelled=labels is not None,
        fingerprint=fingerprint,
    )


@dataclasses.dataclass(frozen=True)
class _Samples:
    wanted: dict[str, tuple[str, int]]  # token to scene token and timestamp
    others: frozenset[str]


def _read_scenes(folder: TableFolder, split: str) -> tuple[dict[str, str], dict[str, int | None]]:
    """Names of the wanted scenes by token; number of samples of every scene (None where it is not wanted)."""
    wanted = set(splits.scene_names(split))
    names: dict[str, str] = {}
    counts: dict[str, int | None] = {}
    for row in folder.rows("scene"):
        with folder.fields("scene", row):
            counts[row["token"]] = int(row["nbr_samples"]) if row["name"] in wanted else None
            if row["name"] in wanted:
                if row["name"] in names.values():
                    raise SourceError(f"table scene: row {row['token']} is a second {row['name']}")
                names[row["token"]] = row["name"]
    if not names:
        raise SourceError(f"table scene: {folder.path('scene')} has none of the {len(wanted)} scenes of split {split}")
    return names, counts


def _read_samples(folder: TableFolder, scenes: dict[str, int | None]) -> _Samples:
    """Scenes: token to number of samples, None for a scene of another split."""
    wanted: dict[str, tuple[str, int]] = {}
    others = set()
    counts = dict.fromkeys(scenes, 0)
    for row in folder.rows("sample"):
        with folder.fields("sample", row):
            token, scene = row["token"], row["scene_token"]
            if scene not in scenes:
                raise folder.dangling("sample", token, "scene_token", scene, "scene")
            counts[scene] += 1
            if scenes[scene] is None:
                others.add(token)
            else:
                wanted[token] = (scene, int(row["timestamp"]))
    for scene, expected in scenes.items():
        if expected is not None and counts[scene] != expected:
            raise SourceError(
                f"table sample: {folder.path('sample')} has {counts[scene]} rows of scene {scene}, "
                f"whose nbr_samples in table scene is {expected}"
            )
    return _Samples(wanted, frozenset(others))


@dataclasses.dataclass(frozen=True)
class _Calibration:
    sensor_to_ego: Float64[np.ndarray, "4 4"]
    intrinsics: Float64[np.ndarray, "3 3"] | None


def _read_calibrations(folder: TableFolder) -> tuple[dict[str, str | SourceError], dict[str, _Calibration]]:
    """Channel (or what is wrong with it) and calibration by calibrated_sensor token."""
    sensors = {}
    for row in folder.rows("sensor"):
        with folder.fields("sensor", row):
            sensors[row["token"]] = row["channel"]
    channels: dict[str, str | SourceError] = {}
    calibrations = {}
    for row in folder.rows("calibrated_sensor"):
        with folder.fields("calibrated_sensor", row):
            token, sensor = row["token"], row["sensor_token"]
            if sensor not in sensors:
                channels[token] = folder.dangling("calibrated_sensor", token, "sensor_token", sensor, "sensor")
                continue
            channels[token] = sensors[sensor]
            if sensors[sensor] in _CHANNELS:
                intrinsics = None
                if sensors[sensor] != LIDAR:
                    intrinsics = np.array(row["camera_intrinsic"], np.float64)
                    if intrinsics.shape != (3, 3) or not np.isfinite(intrinsics).all():
                        raise ValueError(f"camera_intrinsic is not 3x3: {row['camera_intrinsic']}")
                calibrations[token] = _Calibration(_transform(row["rotation"], row["translation"]), intrinsics)
    return channels, calibrations


def _read_sensor_data(
    folder: TableFolder,
    samples: _Samples,
    channels: dict[str, str | SourceError],
    problems: dict[str, SourceError],
) -> dict[str, dict[str, _SensorData]]:
    """Rows of the wanted samples by sample token and channel; `problems` receives what is wrong with one."""
    data: dict[str, dict[str, _SensorData]] = {}
    for row in folder.rows("sample_data"):
        with folder.fields("sample_data", row):
            if not row["is_key_frame"]:
                continue
            sample = row["sample_token"]
            if sample not in samples.wanted:
                if sample not in samples.others:
                    raise folder.dangling("sample_data", row["token"], "sample_token", sample, "sample")
                continue
            calibrated = row["calibrated_sensor_token"]
            channel = channels.get(calibrated)
            if channel is None:
                channel = folder.dangling(
                    "sample_data", row["token"], "calibrated_sensor_token", calibrated, "calibrated_sensor"
                )
            if isinstance(channel, SourceError):
                problems.setdefault(sample, channel)
                continue
            if channel not in _CHANNELS:
                continue
            frame = data.setdefault(sample, {})
            if channel in frame:
                twice = SourceError(
                    f"table sample_data: rows {frame[channel].token} and {row['token']} are both key frames "
                    f"of {channel} for sample {sample} ({folder.path('sample_data')})"
                )
                problems.setdefault(sample, twice)
            frame[channel] = _SensorData(
                row["token"],
                row["ego_pose_token"],
                calibrated,
                int(row["timestamp"]),
                row["filename"],
                (int(row["height"]), int(row["width"])),
            )
    return data


def _read_poses(folder: TableFolder, tokens: set[str]) -> dict[str, Float64[np.ndarray, "4 4"] | SourceError]:
    poses = {}
    path = folder.path("ego_pose")
    for row in folder.rows("ego_pose"):
        with folder.fields("ego_pose", row):
            token = row["token"]
            if token in tokens:
                try:
                    poses[token] = _transform(row["rotation"], row["translation"])
                except (TypeError, ValueError) as error:
                    poses[token] = SourceError(f"table ego_pose: row {token} ({path}): {error}")
    return poses


def _read_labels(folder: TableFolder) -> dict[str, str] | None:
    """Label file by lidar sample_data token; None where the data set has no point labels."""
    if not folder.path("lidarseg").exists():
        return None
    files = {}
    for row in folder.rows("lidarseg"):
        with folder.fields("lidarseg", row):
            files[row["sample_data_token"]] = row["filename"]
    if not files:
        return None
    folder.require(("category",))
    for row in folder.rows("category"):
        with folder.fields("category", row):
            index, name = row["index"], row["name"]
            if not 0 <= index < len(LIDARSEG_CATEGORIES) or LIDARSEG_CATEGORIES[index] != name:
                raise ValueError(f"index {index} is {name!r}, which is not the lidarseg category of that index")
    return files


def _join(
    folder: TableFolder,
    sample: str,
    scene: SceneKeyFrames,
    timestamp: int,
    data: dict[str, _SensorData],
    calibrations: dict[str, _Calibration],
    poses: dict[str, Float64[np.ndarray, "4 4"] | SourceError],
    labels: dict[str, str] | None,
) -> KeyFrameRow:
    missing = [channel for channel in _CHANNELS if channel not in data]
    if missing:
        raise SourceError(
            f"table sample_data: no key frame of {', '.join(missing)} for sample {sample} "
            f"({folder.path('sample_data')})"
        )

    def pose(row: _SensorData) -> np.ndarray:
        found = poses.get(row.ego_pose_token)
        if found is None:
            raise folder.dangling("sample_data", row.token, "ego_pose_token", row.ego_pose_token, "ego_pose")
        if isinstance(found, SourceError):
            raise found
        return found

    lidar = data[LIDAR]
    cameras = [data[camera] for camera in CAMERAS]
    if labels is not None and lidar.token not in labels:
        raise SourceError(
            f"table lidarseg: no row for the lidar sample_data {lidar.token} of sample {sample} "
            f"({folder.path('lidarseg')})"
        )
    lidar_to_ego = calibrations[lidar.calibrated_sensor_token].sensor_to_ego
    ego_to_global = pose(lidar)
    calibrated = [calibrations[row.calibrated_sensor_token] for row in cameras]
    lidar_to_camera = [
        geometry.lidar_to_camera(lidar_to_ego, ego_to_global, calibration.sensor_to_ego, pose(row))
        for row, calibration in zip(cameras, calibrated, strict=True)
    ]
    return KeyFrameRow(
        sample_token=sample,
        scene_token=scene.scene_token,
        scene_name=scene.scene_name,
        timestamp=timestamp,
        lidar_token=lidar.token,
        lidar_file=lidar.file,
        label_file=None if labels is None else labels[lidar.token],
        lidar_to_ego=lidar_to_ego,
        ego_to_global=ego_to_global,
        camera_tokens=[row.token for row in cameras],
        camera_files=[row.file for row in cameras],
        camera_timestamps=np.array([row.timestamp for row in cameras], np.int64),
        image_sizes=[row.size for row in cameras],
        intrinsics=np.stack([calibration.intrinsics for calibration in calibrated]),
        lidar_to_camera=np.stack(lidar_to_camera),
    )


def _transform(rotation: list[float], translation: list[float]) -> Float64[np.ndarray, "4 4"]:
    transform = geometry.rigid_transform(np.array(rotation, np.float64), np.array(translation, np.float64))
    if not np.isfinite(transform).all():
        raise ValueError(f"not a pose: translation {translation}")
    return transform

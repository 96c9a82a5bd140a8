"""SemanticKITTI's official folder to key frames: KITTI's odometry benchmark with point labels.

Layout below the root, where `dataset/` may be left out:

  dataset/sequences/XX/velodyne/NNNNNN.bin   float32 x, y, z, remission (0..1)
  dataset/sequences/XX/labels/NNNNNN.label   uint32 a point, the category in the lower 16 bits; not in the test split
  dataset/sequences/XX/image_2/NNNNNN.png    the left colour camera
  dataset/sequences/XX/calib.txt, poses.txt, times.txt

Frames, in metres: lidar x forward, y left, z up. The lidar's own frame is the ego frame. Global is the lidar's frame at
the first sweep of the sequence: poses.txt gives the left grey camera, Tr brings the lidar there. Timestamps count from
the start of the sequence.
"""

import dataclasses
import hashlib
from typing import ClassVar

import numpy as np
from etils import epath
from jaxtyping import Float64, UInt8

from data_prep.key_frame_rows import KeyFrameRow, SceneKeyFrames, SplitKeyFrames, parts
from data_prep.keyframes_builder import KeyframesBuilder
from data_prep.sensor_files import check_points, read_named_file, read_whole_image
from data_prep.table_rows import SourceError
from pop3d_jax.data.records import KeyFrame
from pop3d_jax.lidar_datasets import SEMANTIC_KITTI

SEQUENCES = {
    "train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"),
    "val": ("08",),
    "test": tuple(f"{number:02d}" for number in range(11, 22)),
}
# A sequence has up to 4,661 key frames; a shard of a hundred has about 300 MB.
_SHARD_KEY_FRAMES = 100
_POINT_BYTES = 16
_TABLES = ("calib.txt", "poses.txt", "times.txt")
_WAYS_OUT = {
    "calib.txt": "unpack data_odometry_calib.zip of KITTI's odometry benchmark beside the sweeps",
    "poses.txt": "unpack data_odometry_labels.zip of SemanticKITTI, which holds the poses, beside the sweeps",
    "times.txt": "unpack data_odometry_calib.zip of KITTI's odometry benchmark beside the sweeps",
    "velodyne": "unpack data_odometry_velodyne.zip of KITTI's odometry benchmark",
    "image_2": "unpack data_odometry_color.zip of KITTI's odometry benchmark beside the sweeps",
    "labels": "unpack data_odometry_labels.zip of SemanticKITTI beside the sweeps",
}


class SemanticKittiKeyframes(KeyframesBuilder, skip_registration=True):
    """SemanticKITTI's key frames, one image and a sweep each."""

    name = "semantic_kitti_keyframes"
    DESCRIPTION: ClassVar[str] = "Key frames of SemanticKITTI: the left colour image, lidar sweep, calibration, labels."


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What calib.txt says of the left colour camera.

    Attributes:
      intrinsics: the left 3 x 3 of P2, pixels of the rectified image.
      lidar_to_camera: to the frame of camera 2. P2 = K [I | t] shifts the rectified frame of camera 0, in which Tr
        ends, by t; K times this is P2 times Tr.
      lidar_to_reference: Tr, to the rectified frame of camera 0, which poses.txt speaks of.
    """

    intrinsics: Float64[np.ndarray, "3 3"]
    lidar_to_camera: Float64[np.ndarray, "4 4"]
    lidar_to_reference: Float64[np.ndarray, "4 4"]


def parse_calibration(text: str) -> Calibration:
    """Reads the lines P2 and Tr of a calib.txt.

    Raises:
      ValueError: one of them is missing or no 3 x 4 matrix, or P2 is no camera matrix.
    """
    matrices = {}
    for line in text.splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() in ("P2", "Tr"):
            matrices[name.strip()] = _matrix(numbers)
    missing = [name for name in ("P2", "Tr") if name not in matrices]
    if missing:
        raise ValueError(f"has no line {' and no line '.join(missing)}")
    projection, to_reference = matrices["P2"], np.vstack([matrices["Tr"], (0.0, 0.0, 0.0, 1.0)])
    intrinsics = projection[:, :3]
    if not np.array_equal(intrinsics[2], (0.0, 0.0, 1.0)) or intrinsics[0, 0] <= 0 or intrinsics[1, 1] <= 0:
        raise ValueError(f"P2 is no camera matrix: {projection.tolist()}")
    shift = np.eye(4)
    shift[:3, 3] = np.linalg.solve(intrinsics, projection[:, 3])
    return Calibration(intrinsics, shift @ to_reference, to_reference)


def _matrix(numbers: str) -> Float64[np.ndarray, "3 4"]:
    values = np.array([float(number) for number in numbers.split()])
    if values.size != 12 or not np.isfinite(values).all():
        raise ValueError(f"twelve finite numbers are expected: {numbers.strip()[:80]!r}")
    return values.reshape(3, 4)


def _sequences_folder(source: epath.PathLike) -> epath.Path:
    root = epath.Path(source)
    if not root.exists():
        raise SourceError(f"no folder {root} (see --source)")
    for folder in (root / "dataset" / "sequences", root / "sequences"):
        if folder.exists():
            return folder
    raise SourceError(f"{root} has neither dataset/sequences nor sequences (see --source)")


def fingerprint(source: epath.PathLike) -> str:
    """Identity of the calibration, poses and times of all sequences; raises SourceError where there are none."""
    digest = hashlib.sha256()
    for folder in sorted(_sequences_folder(source).iterdir()):
        for table in _TABLES:
            if (folder / table).exists():
                digest.update(f"{folder.name} {table}\n".encode())
                digest.update((folder / table).read_bytes())
    return digest.hexdigest()


def read_split(source: epath.PathLike, split: str) -> SplitKeyFrames:
    """Lists the key frames of a split, with calibration and poses.

    Where no sequence of the split has a folder of labels, the records have none; otherwise every sweep must have its
    label file.

    Args:
      source: root of the data set.
      split: "train" (sequences 00 to 07, 09, 10), "val" (08) or "test" (11 to 21).

    Raises:
      SourceError: no sequence of the split, or one without sweeps, calibration, poses or times.
    """
    folder = _sequences_folder(source)
    present = [name for name in SEQUENCES[split] if (folder / name).exists()]
    if not present:
        raise SourceError(f"{folder} has none of the sequences {', '.join(SEQUENCES[split])} of split {split}")
    labelled = any((folder / name / "labels").exists() for name in present)
    scenes = [
        part for name in present for part in parts(_read_sequence(source, folder / name, labelled), _SHARD_KEY_FRAMES)
    ]
    absent = [name for name in SEQUENCES[split] if name not in present]
    return SplitKeyFrames(scenes, absent, labelled, fingerprint(source))


def _read_sequence(source: epath.PathLike, folder: epath.Path, labelled: bool) -> SceneKeyFrames:
    texts = {}
    for table in _TABLES:
        if not (folder / table).exists():
            raise SourceError(f"{folder / table} does not exist: {_WAYS_OUT[table]}")
        texts[table] = (folder / table).read_text()
    try:
        calibration = parse_calibration(texts["calib.txt"])
    except ValueError as error:
        raise SourceError(f"{folder / 'calib.txt'} {error}: {_WAYS_OUT['calib.txt']}") from error
    poses = _rows(folder / "poses.txt", texts["poses.txt"], 12).reshape(-1, 3, 4)
    times = _rows(folder / "times.txt", texts["times.txt"], 1)[:, 0]
    frames = sorted(path.stem for path in (folder / "velodyne").glob("*.bin")) if (folder / "velodyne").exists() else []
    if not frames:
        raise SourceError(f"{folder / 'velodyne'} has no sweeps: {_WAYS_OUT['velodyne']}")
    scene = SceneKeyFrames(folder.name, folder.name, [], [])
    below = folder.relative_to(epath.Path(source))
    for frame in frames:
        token = f"{folder.name}_{frame}"
        if not frame.isdigit() or int(frame) >= min(len(poses), len(times)):
            rows = f"poses.txt has {len(poses)} rows and times.txt {len(times)}"
            scene.broken.append(
                (token, f"{folder / 'velodyne' / frame}.bin has no pose or time: {rows}; copy both again")
            )
            continue
        scene.key_frames.append(_row(below, token, frame, labelled, calibration, poses[int(frame)], times[int(frame)]))
    return scene


def _row(
    below: epath.Path,
    token: str,
    frame: str,
    labelled: bool,
    calibration: Calibration,
    pose: Float64[np.ndarray, "3 4"],
    time: float,
) -> KeyFrameRow:
    to_reference = calibration.lidar_to_reference
    reference_to_first = np.vstack([pose, (0.0, 0.0, 0.0, 1.0)])
    timestamp = round(float(time) * 1e6)
    return KeyFrameRow(
        sample_token=token,
        scene_token=below.name,
        scene_name=below.name,
        timestamp=timestamp,
        lidar_token=f"{token}_velodyne",
        lidar_file=str(below / "velodyne" / f"{frame}.bin"),
        label_file=str(below / "labels" / f"{frame}.label") if labelled else None,
        lidar_to_ego=np.eye(4),
        ego_to_global=np.linalg.solve(to_reference, reference_to_first @ to_reference),
        camera_tokens=[f"{token}_image_2"],
        camera_files=[str(below / "image_2" / f"{frame}.png")],
        camera_timestamps=np.array([timestamp], np.int64),
        image_sizes=[],
        intrinsics=calibration.intrinsics[None],
        lidar_to_camera=calibration.lidar_to_camera[None],
    )


def _rows(path: epath.Path, text: str, width: int) -> Float64[np.ndarray, "rows width"]:
    rows = [line.split() for line in text.splitlines() if line.strip()]
    try:
        values = np.array([[float(number) for number in row] for row in rows], np.float64).reshape(len(rows), width)
    except ValueError as error:
        raise SourceError(
            f"{path} is damaged, rows of {width} numbers are expected ({error}): copy it again"
        ) from error
    if not np.isfinite(values).all():
        raise SourceError(f"{path} has numbers that are not finite: copy it again")
    return values


def read_key_frame(source: epath.PathLike, row: KeyFrameRow) -> KeyFrame:
    """Reads image, sweep and labels of a key frame.

    Raises:
      SourceError: a file that is missing, cut off or does not fit the others; names file and way out.
    """
    source = epath.Path(source)
    images = [read_whole_image(source, file, _WAYS_OUT["image_2"]) for file in row.camera_files]
    name = f"lidar file {source / row.lidar_file}"
    data = read_named_file(source, row.lidar_file, _WAYS_OUT["velodyne"])
    if len(data) % _POINT_BYTES:
        raise SourceError(f"{name} has {len(data)} bytes, not a multiple of {_POINT_BYTES}: copy it again")
    sweep = np.frombuffer(data, "<f4").reshape(-1, 4)
    check_points(sweep, name)
    labels = np.zeros(0, np.uint8)
    if row.label_file is not None:
        labels = _read_labels(source, row.label_file, len(sweep))
    # The files name no beam.
    points = np.concatenate([sweep, np.full((len(sweep), 1), -1, np.float32)], axis=1)
    return row.key_frame(images, points, labels)


def _read_labels(source: epath.Path, file: str, count: int) -> UInt8[np.ndarray, " points"]:
    data = read_named_file(source, file, _WAYS_OUT["labels"])
    name = f"label file {source / file}"
    if len(data) != 4 * count:
        raise SourceError(f"{name} has {len(data)} bytes, {4 * count} are expected for {count} points: copy it again")
    # The upper half numbers instances.
    return raw_indices((np.frombuffer(data, "<u4") & 0xFFFF).astype(np.int64), name)


def raw_indices(ids: np.ndarray, name: str) -> UInt8[np.ndarray, " points"]:
    """Positions of label ids in the official list; raises SourceError, which starts with `name`, at an unknown id."""
    official = np.array(SEMANTIC_KITTI.raw_ids)
    position = np.searchsorted(official, ids).clip(max=len(official) - 1)
    unknown = ids[official[position] != ids]
    if len(unknown):
        listed = ", ".join(map(str, np.unique(unknown)[:8]))
        raise SourceError(f"{name} has label {listed}, which SemanticKITTI does not know: copy it again")
    return position.astype(np.uint8)

"""The sensor files of a key frame, read and verified: what is damaged must not get into a record."""

import io
from pathlib import PurePosixPath

import numpy as np
from etils import epath
from jaxtyping import Float32, UInt8
from PIL import Image

from data_prep.nuscenes_tables import KeyFrameRow
from data_prep.table_rows import SourceError
from pop3d_jax.data.records import KeyFrame
from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES

_POINT_BYTES = 20  # five float32: x, y, z, intensity, ring


def read_key_frame(source: epath.PathLike, row: KeyFrameRow) -> KeyFrame:
    """Reads the six images, the sweep and the labels of a key frame.

    Raises:
      SourceError: a file that is missing, cut off or does not fit the tables; names table, token and file.
    """
    source = epath.Path(source)
    images = [
        _read_image(source, token, file, size)
        for token, file, size in zip(row.camera_tokens, row.camera_files, row.image_sizes, strict=True)
    ]
    points = _read_points(source, row.lidar_token, row.lidar_file)
    labels = np.zeros(0, np.uint8)
    if row.label_file is not None:
        labels = _read_labels(source, row.lidar_token, row.label_file, len(points))
    return KeyFrame(
        images=images,
        intrinsics=row.intrinsics,
        lidar_to_camera=row.lidar_to_camera,
        points=points,
        lidarseg=labels,
        lidar_to_ego=row.lidar_to_ego,
        ego_to_global=row.ego_to_global,
        sample_token=row.sample_token,
        scene_token=row.scene_token,
        scene_name=row.scene_name,
        lidar_token=row.lidar_token,
        lidar_file=row.lidar_file,
        camera_tokens=row.camera_tokens,
        camera_files=row.camera_files,
        camera_timestamps=row.camera_timestamps,
        timestamp=row.timestamp,
    )


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Decodes a colour JPEG and tells its (height, width).

    All of the data is read, at an eighth of the resolution: damage shows, at a third of the cost of decoding.

    Raises:
      ValueError: no JPEG, no three channels, cut off, or undecodable.
    """
    if not data.startswith(b"\xff\xd8"):
        raise ValueError("is no JPEG")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            width, height = image.size
            if image.mode != "RGB":
                raise ValueError(f"is a JPEG of mode {image.mode}, not of three colours")
            image.draft("RGB", (width // 8, height // 8))
            image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"is cut off or damaged: {error}") from error
    return height, width


def _read_file(source: epath.Path, table: str, token: str, file: str) -> bytes:
    parts = PurePosixPath(file)
    if parts.is_absolute() or ".." in parts.parts:
        raise SourceError(f"table {table}: row {token} names {file}, which lies outside {source}")
    try:
        return (source / file).read_bytes()
    except FileNotFoundError as error:
        raise SourceError(f"table {table}: row {token} names {source / file}, which does not exist") from error
    except OSError as error:
        raise SourceError(f"table {table}: row {token} names {source / file}: {error}") from error


def _read_image(source: epath.Path, token: str, file: str, size: tuple[int, int]) -> bytes:
    data = _read_file(source, "sample_data", token, file)
    try:
        found = jpeg_size(data)
    except ValueError as error:
        raise SourceError(f"table sample_data: row {token}: image {source / file} {error}") from error
    if found != size:
        # The intrinsics belong to the size in the table.
        raise SourceError(
            f"table sample_data: row {token}: image {source / file} has height and width {found}, the table says {size}"
        )
    return data


def _read_points(source: epath.Path, token: str, file: str) -> Float32[np.ndarray, "points 5"]:
    data = _read_file(source, "sample_data", token, file)
    name = f"table sample_data: row {token}: lidar file {source / file}"
    if not data or len(data) % _POINT_BYTES:
        raise SourceError(
            f"{name} has {len(data)} bytes, not a positive multiple of {_POINT_BYTES} (five float32 a point)"
        )
    points = np.frombuffer(data, "<f4").reshape(-1, 5)
    broken = ~np.isfinite(points).all(axis=1)
    if broken.any():
        raise SourceError(
            f"{name} has {broken.sum()} points that are NaN or infinite, the first is {int(broken.argmax())}"
        )
    return points


def _read_labels(source: epath.Path, token: str, file: str, count: int) -> UInt8[np.ndarray, " points"]:
    """Labels of a sweep of `count` points; `token` is the lidar's sample_data."""
    labels = np.frombuffer(_read_file(source, "lidarseg", token, file), np.uint8)
    name = f"table lidarseg: row of sample_data {token}: label file {source / file}"
    if len(labels) != count:
        raise SourceError(f"{name} has {len(labels)} labels for {count} points")
    if labels.max() >= len(LIDARSEG_CATEGORIES):
        raise SourceError(f"{name} has label {labels.max()}, the last category is {len(LIDARSEG_CATEGORIES) - 1}")
    return labels

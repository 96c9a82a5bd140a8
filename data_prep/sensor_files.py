"""The sensor files of a key frame, read and verified: what is damaged must not get into a record."""

import io
from pathlib import PurePosixPath

import numpy as np
from etils import epath
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from data_prep.key_frame_rows import KeyFrameRow
from data_prep.table_rows import SourceError
from pop3d_jax.data.records import KeyFrame
from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES

_POINT_BYTES = 20  # five float32: x, y, z, intensity, ring
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


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
    return row.key_frame(images, points, labels)


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


def image_size(data: bytes) -> tuple[int, int]:
    """Decodes a colour JPEG or PNG and tells its (height, width).

    Raises:
      ValueError: neither of them, no three channels, cut off, or undecodable.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return jpeg_size(data)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            width, height = image.size
            if image.mode != "RGB":
                raise ValueError(f"is a PNG of mode {image.mode}, not of three colours")
            image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"is cut off or damaged: {error}") from error
    return height, width


def read_named_file(source: epath.Path, file: str, way_out: str) -> bytes:
    """Bytes of a sensor or label file below a data set's root.

    Raises:
      SourceError: it cannot be read; ends with `way_out`.
    """
    try:
        return (source / file).read_bytes()
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else str(error)
        raise SourceError(f"{source / file} {reason}: {way_out}") from error


def read_whole_image(source: epath.Path, file: str, way_out: str) -> bytes:
    """Bytes of an image file, as they are; raises SourceError where it is missing or damaged."""
    data = read_named_file(source, file, way_out)
    try:
        image_size(data)
    except ValueError as error:
        raise SourceError(f"image {source / file} {error}: {way_out}") from error
    return data


def check_points(points: Float[np.ndarray, "points columns"], name: str) -> None:
    """Raises SourceError, which starts with `name`, where there are no points or some that are not finite."""
    if not len(points):
        raise SourceError(f"{name} has no points")
    broken = ~np.isfinite(points).all(axis=1)
    if broken.any():
        raise SourceError(
            f"{name} has {broken.sum()} points that are NaN or infinite, the first is {int(broken.argmax())}"
        )


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
    check_points(points, name)
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

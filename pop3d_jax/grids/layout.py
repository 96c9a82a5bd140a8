"""How the arrays of a store lie in their files: names, types and shapes, and the Zarr v3 metadata of each.

docs/feature_grids.md describes the arrays to those who read them.
"""

import math
from typing import Any

import numpy as np

# Rows of a chunk: what a reader reads at least.
CHUNK_ROWS = 4096
# Features hardly compress, and decompressing them would take longer than searching them: they are stored as they are,
# in smaller chunks, because the last one of a key frame is filled up with zeros; not too small, since each is a read.
_LONG_FEATURE_BYTES = 256
_LONG_FEATURE_CHUNK_ROWS = 512
_SHORT_FEATURE_CHUNK_ROWS = 2048
# Key frames of a file; a host owns whole files.
SHARD_KEY_FRAMES = 8
ROW_ARRAYS = ("coordinates", "occupancy", "features", "feature_scale", "feature_norm")
# UTF-8, filled up with zeros.
SCENE_NAME_BYTES = 64
NOT_WRITTEN = -1


def rows_per_key_frame(voxels: int) -> int:
    """Rows reserved for a key frame of at most so many voxels: whole chunks."""
    return math.ceil(voxels / CHUNK_ROWS) * CHUNK_ROWS


def describe_arrays(
    key_frames: int, rows: int, code: int, precision: str, codebook: tuple[tuple[int, ...], tuple[int, ...]] | None
) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """Name -> (type, shape, whether it has a row for every voxel) of all arrays of a store.

    Args:
      key_frames: of the store.
      rows: reserved for each.
      code: entries of a voxel's feature code.
      precision: see `pop3d_jax.grids.encoding`.
      codebook: shapes of rotation and entries, for "pq".
    """
    total = key_frames * rows
    arrays = {
        "coordinates": ("uint8", (total, 3), True),
        "occupancy": ("float16", (total,), True),
        "features": ({"float16": "float16", "int8": "int8", "pq": "uint8"}[precision], (total, code), True),
        "feature_scale": ("float16", (total,), True),
        "feature_norm": ("float16", (total,), True),
        "voxel_offset": ("int64", (key_frames,), False),
        "voxel_count": ("int32", (key_frames,), False),
        "timestamp": ("int64", (key_frames,), False),
        "scene_name": ("uint8", (key_frames, SCENE_NAME_BYTES), False),
        "image_hw": ("int32", (key_frames, 6, 2), False),
        "lidar_to_ego": ("float64", (key_frames, 4, 4), False),
        "ego_to_global": ("float64", (key_frames, 4, 4), False),
        "lidar_to_camera": ("float64", (key_frames, 6, 4, 4), False),
        "intrinsics": ("float64", (key_frames, 6, 3, 3), False),
    }
    if codebook:
        arrays["codebook_rotation"] = ("float32", codebook[0], False)
        arrays["codebook_entries"] = ("float32", codebook[1], False)
    return arrays


def array_metadata(name: str, kind: str, shape: tuple[int, ...], ragged: bool, rows: int) -> dict[str, Any]:
    """The zarr.json of an array, as TensorStore takes it.

    Args:
      name, kind, shape, ragged: name, type, shape, and whether it has a row for every voxel; see `describe_arrays`.
      rows: reserved for each key frame.
    """
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    if kind in ("int8", "uint8"):
        little = {"name": "bytes"}
    compressed = [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}]
    inner_rows = CHUNK_ROWS
    if name == "features":
        compressed = []
        is_long = np.dtype(kind).itemsize * shape[1] >= _LONG_FEATURE_BYTES
        inner_rows = _LONG_FEATURE_CHUNK_ROWS if is_long else _SHORT_FEATURE_CHUNK_ROWS
    checked = [little, *compressed, {"name": "crc32c"}]
    if ragged:
        outer = (SHARD_KEY_FRAMES * rows, *shape[1:])
        inner = (inner_rows, *shape[1:])
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        codecs = [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": list(inner),
                    "codecs": checked,
                    "index_codecs": index,
                    "index_location": "end",
                },
            }
        ]
    else:
        outer = shape if name.startswith("codebook") else (SHARD_KEY_FRAMES, *shape[1:])
        codecs = checked
    return {
        "shape": list(shape),
        "data_type": kind,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(outer)}},
        "fill_value": NOT_WRITTEN if name == "voxel_count" else 0,
        "codecs": codecs,
    }

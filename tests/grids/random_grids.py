"""Key frames of random features, and the attributes of a store of them."""

import numpy as np

from pop3d_jax.grids.encoding import encode, train_codebook
from pop3d_jax.grids.layout import SHARD_KEY_FRAMES, describe_arrays, rows_per_key_frame
from pop3d_jax.grids.store import GridStore

DIM = 16
KEY_FRAMES = 19
ROWS = rows_per_key_frame(300)


def random_key_frame(generator, precision, codebook=None):
    """(features, what `GridStore.write_shard` takes) of a key frame of some voxels, perhaps none."""
    voxels = int(generator.integers(0, 300))
    features = generator.normal(size=(voxels, DIM)).astype(np.float32)
    encoded = encode(features, precision, codebook)
    pose = np.eye(4) + np.diag(generator.normal(size=3), 1)
    return features, {
        "coordinates": generator.integers(0, 50, (voxels, 3)).astype(np.uint8),
        "occupancy": generator.random(voxels).astype(np.float16),
        "features": encoded.codes,
        "feature_scale": encoded.scale,
        "feature_norm": np.linalg.norm(features, axis=-1).astype(np.float16),
        "timestamp": np.int64(generator.integers(2**50)),
        "scene_name": np.frombuffer(b"scene-0001".ljust(64, b"\0"), np.uint8),
        "image_hw": np.full((6, 2), (900, 1600), np.int32),
        "lidar_to_ego": pose,
        "ego_to_global": pose,
        "lidar_to_camera": np.stack([pose] * 6),
        "intrinsics": np.stack([np.diag([1000.0, 1000.0, 1.0])] * 6),
    }


def attributes_of(precision):
    return {
        "precision": precision,
        "feature_dim": DIM,
        "geometry": {"grid_size": [50, 50, 50], "volume_minimum": [-50.0] * 3, "volume_maximum": [50.0] * 3},
        "text_tower": "nowhere",
        "sample_tokens": [f"{number:032x}" for number in range(KEY_FRAMES)],
    }


def write_store(folder, precision="int8", stop_after=KEY_FRAMES):
    """Writes folder/grids.zarr, or its first files: the path, and (features, arrays) of all key frames."""
    generator = np.random.default_rng(0)
    codebook = None
    if precision == "pq":
        codebook = train_codebook(generator.normal(size=(600, DIM)).astype(np.float32), 4)
    key_frames = [random_key_frame(generator, precision, codebook) for _ in range(KEY_FRAMES)]
    shapes = (codebook.rotation.shape, codebook.entries.shape) if codebook else None
    arrays = describe_arrays(KEY_FRAMES, ROWS, 4 if codebook else DIM, precision, shapes)
    store = GridStore.create(folder / "grids.zarr", attributes_of(precision), arrays, ROWS)
    if codebook:
        store.write_codebook(codebook.rotation, codebook.entries)
    for first in range(0, stop_after, SHARD_KEY_FRAMES):
        stored = [arrays for _, arrays in key_frames[first : first + SHARD_KEY_FRAMES]]
        store.write_shard(first, stored, ROWS)
    store.finish()
    return folder / "grids.zarr", key_frames

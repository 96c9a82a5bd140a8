"""Predicts key frames and writes their occupied voxels into a store; any number of hosts, each its own files."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from etils import epath

from pop3d_jax.data.pipeline import image_sizes
from pop3d_jax.data.records import KeyFrame, RecordSource
from pop3d_jax.grids.encoding import CODEBOOK_ENTRIES, Codebook, encode, train_codebook
from pop3d_jax.grids.layout import SCENE_NAME_BYTES, SHARD_KEY_FRAMES, describe_arrays, rows_per_key_frame
from pop3d_jax.grids.selection import Selection, select
from pop3d_jax.grids.store import GridStore
from pop3d_jax.hosts import meet
from pop3d_jax.inference import Prediction, Predictor
from pop3d_jax.models.parameters import ArrayTree
from pop3d_jax.nuscenes import CAMERAS
from pop3d_jax.progress import progress

# Key frames, spread over the split, and voxels that a codebook is learned from.
_CODEBOOK_KEY_FRAMES = 32
_CODEBOOK_VOXELS = 100_000


def model_fingerprint(restored: ArrayTree) -> str:
    """Hash of a checkpoint's parameters and statistics."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)))
    return digest.hexdigest()


def export(
    predictor: Predictor,
    source: RecordSource,
    numbers: Sequence[int],
    out: epath.PathLike,
    selection: Selection,
    *,
    split: str,
    text_tower: str,
    overwrite: bool = False,
) -> GridStore:
    """Writes the grids of key frames; goes on where an earlier call was stopped.

    Args:
      predictor: the trained network.
      source: records.
      numbers: which of them.
      out: local folder or gs://.
      selection: which voxels, and how.
      split: of the records, noted in the store.
      text_tower: CLIP folder or hub name whose text vectors the features belong to, noted in the store.
      overwrite: delete another store that is there.

    Returns:
      The store; complete, unless other hosts are still at work.

    Raises:
      GridStoreError: the place holds something else, there is no room, or a write failed.
      ValueError: the grid is too fine, or --pq_bytes does not divide the features.
    """
    volume, config = predictor.student.volume, predictor.config
    if max(volume.grid_size) > 256:
        raise ValueError(f"grids of {volume.grid_size} voxels: coordinates are stored as bytes, 256 an axis at most")
    dim = config.model.feature_dim
    rows = rows_per_key_frame(min(selection.top_k or volume.num_voxels, volume.num_voxels))
    is_pq = selection.precision == "pq"
    if is_pq and dim % selection.pq_bytes:
        raise ValueError(f"--pq_bytes={selection.pq_bytes} must divide the {dim} dimensions of the features")
    shapes = ((dim, dim), (selection.pq_bytes, CODEBOOK_ENTRIES, dim // selection.pq_bytes)) if is_pq else None
    attributes = {
        "precision": selection.precision,
        "feature_dim": dim,
        "selection": dataclasses.asdict(selection),
        "geometry": {
            "grid_size": volume.grid_size,
            "volume_minimum": volume.minimum,
            "volume_maximum": volume.maximum,
            "voxel_size": volume.voxel_size,
            "frame": "lidar, metres: x right, y forward, z up; voxel i spans minimum + voxel_size * (i to i + 1)",
        },
        "cameras": CAMERAS,
        "model": {"fingerprint": model_fingerprint(predictor.restored), "step": predictor.step},
        "config": json.loads(config.to_json()),
        "text_tower": text_tower,
        "records": {"fingerprint": source.fingerprint, "split": split},
        "sample_tokens": [source.sample_tokens[number] for number in numbers],
    }
    code = selection.pq_bytes if is_pq else dim
    arrays = describe_arrays(len(numbers), rows, code, selection.precision, shapes)
    # The first host makes the store, the others find it.
    if jax.process_index() == 0:
        store = GridStore.create(out, attributes, arrays, rows, overwrite=overwrite)
    meet("the store is made")
    if jax.process_index():
        store = GridStore.create(out, attributes, arrays, rows)
    codebook = _codebook(predictor, source, numbers, selection, store) if is_pq else None
    written = store.written()
    mine = range(0, len(numbers), SHARD_KEY_FRAMES)[jax.process_index() :: jax.process_count()]
    missing = [first for first in mine if not written[first : first + SHARD_KEY_FRAMES].all()]
    if len(missing) < len(mine):
        logging.info("%d of %d files are already there", len(mine) - len(missing), len(mine))
    for first in progress(missing, len(missing), "exporting, in files of key frames"):
        frames = [source[numbers[number]] for number in range(first, min(first + SHARD_KEY_FRAMES, len(numbers)))]
        predictions = predictor.many(frames)
        encoded = [
            _arrays_of(frame, prediction, selection, codebook)
            for frame, prediction in zip(frames, predictions, strict=True)
        ]
        store.write_shard(first, encoded, rows)
    meet("all have written")
    if jax.process_index() == 0:
        store.finish()
    return store


def _arrays_of(
    frame: KeyFrame, prediction: Prediction, selection: Selection, codebook: Codebook | None
) -> dict[str, np.ndarray]:
    """What `GridStore.write_shard` takes for a key frame."""
    coordinates, occupancy, features = select(prediction, selection)
    encoded = encode(features, selection.precision, codebook)
    name = frame.scene_name.encode()[:SCENE_NAME_BYTES]
    return {
        "coordinates": coordinates.astype(np.uint8),
        "occupancy": occupancy.astype(np.float16),
        "features": encoded.codes,
        "feature_scale": encoded.scale,
        "feature_norm": np.linalg.norm(features, axis=-1).astype(np.float16),
        "timestamp": np.int64(frame.timestamp),
        "scene_name": np.frombuffer(name.ljust(SCENE_NAME_BYTES, b"\0"), np.uint8),
        "image_hw": np.array(image_sizes(frame), np.int32),
        "lidar_to_ego": frame.lidar_to_ego,
        "ego_to_global": frame.ego_to_global,
        "lidar_to_camera": frame.lidar_to_camera,
        "intrinsics": frame.intrinsics,
    }


def _codebook(
    predictor: Predictor, source: RecordSource, numbers: Sequence[int], selection: Selection, store: GridStore
) -> Codebook:
    """The store's codebook; the first host learns it where there is none yet."""
    if jax.process_index() == 0 and not store.has_codebook():
        spread = np.unique(np.linspace(0, len(numbers) - 1, min(_CODEBOOK_KEY_FRAMES, len(numbers))).astype(int))
        logging.info("learning a codebook from the voxels of %d key frames", len(spread))
        samples, generator = [], np.random.default_rng(0)
        for number in progress(spread, len(spread), "predicting for the codebook"):
            features = select(predictor(source[numbers[number]]), selection)[2]
            share = min(len(features), -(-_CODEBOOK_VOXELS // len(spread)))
            samples.append(features[generator.choice(len(features), share, replace=False)])
        learned = train_codebook(np.concatenate(samples), selection.pq_bytes)
        store.write_codebook(learned.rotation, learned.entries)
    meet("the codebook is there")
    return Codebook(store.read("codebook_rotation"), store.read("codebook_entries"))

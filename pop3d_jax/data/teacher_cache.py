"""Teacher features on disk, one record a key frame, in the shards of the records they belong to.

Online, the teacher costs its forward pass in every step; a cache costs bytes: feature_dim * 2 a visible point in
float16, feature_dim + 4 in int8 with a scale. `data_prep.teacher_features` writes it.

Layout of a cache folder: `teacher_features-SPLIT.tfrecord-I-of-N`, record by record the key frames of the records'
shard I; `index/SHARD.json` of each finished shard; `teacher_features_SPLIT.json`, written last, says of which records
and of which teacher they are.
"""

import dataclasses
import functools
import json
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Float, Float32, Int8

from pop3d_jax.data.records import canonical_record
from pop3d_jax.data.shards import RecordError, ShardIndex, unframe_record

DTYPES = ("float16", "int8")
_INT8_LIMIT = 127


@dataclasses.dataclass(frozen=True)
class TeacherCacheIndex:
    """What a cache holds for one split.

    Attributes:
      records_fingerprint: of the split's records.
      teacher: name, path, variant, weights and image size of the teacher, as the configuration has them.
      teacher_fingerprint: hash of the teacher's arrays.
      dtype: "float16" or "int8".
      feature_dim: width of a feature.
      shards: in the order of the records' shards.
    """

    split: str
    records_fingerprint: str
    teacher: dict[str, Any]
    teacher_fingerprint: str
    dtype: str
    feature_dim: int
    shards: list[ShardIndex]


def cache_index_path(folder: epath.PathLike, split: str) -> epath.Path:
    """Path of a split's index."""
    return epath.Path(folder) / f"teacher_features_{split}.json"


def quantise(
    features: Float[np.ndarray, "points dim"],
) -> tuple[Int8[np.ndarray, "points dim"], Float32[np.ndarray, " points"]]:
    """Each point's features as whole numbers from -127 to 127 and the scale that gives them back."""
    scale = np.abs(features).max(axis=1, initial=0.0) / _INT8_LIMIT
    safe = np.where(scale > 0, scale, 1.0)
    return np.round(features / safe[:, None]).astype(np.int8), scale.astype(np.float32)


@functools.cache
def _features(dtype: str, dim: int) -> tfds.features.FeaturesDict:
    def array(kind: type, *shape: int | None) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=kind, encoding="bytes")

    kinds = {"float16": np.float16, "int8": np.int8}
    return tfds.features.FeaturesDict(
        {
            "features": array(kinds[dtype], None, dim),
            "scale": array(np.float32, None),
            "sample_token": tfds.features.Text(),
        }
    )


def encode_features(sample_token: str, features: Float[np.ndarray, "points dim"], dtype: str) -> bytes:
    """The serialized record of one key frame.

    Args:
      features: of its visible (point, camera) pairs, in the order of `visible_pairs`.
      dtype: "float16" (scale is then empty) or "int8".

    Raises:
      ValueError: features that are not finite, or that float16 cannot hold.
    """
    if not np.isfinite(features).all():
        raise ValueError(f"teacher features of sample {sample_token} are not finite")
    if dtype == "int8":
        stored, scale = quantise(features)
    else:
        with np.errstate(over="ignore"):  # found below
            stored = features.astype(np.float16)
        scale = np.zeros(0, np.float32)
    if not np.isfinite(stored).all():
        raise ValueError(f"teacher features of sample {sample_token} are too large for {dtype}: use int8")
    example = {"features": stored, "scale": scale, "sample_token": sample_token}
    return canonical_record(_features(dtype, features.shape[1]).serialize_example(example))


def decode_features(record: bytes, dtype: str, dim: int) -> Float[np.ndarray, "points dim"]:
    """The inverse of `encode_features`: float16 as stored, float32 from int8."""
    example = _features(dtype, dim).deserialize_example_np(record)
    if dtype == "int8":
        return example["features"] * example["scale"][:, None]
    return example["features"]


class TeacherCache:
    """Random access to the cached features of one split, key frame by key frame as in its `RecordSource`."""

    def __init__(self, folder: epath.PathLike, split: str, records_fingerprint: str):
        """Reads the index.

        Args:
          folder: written by `data_prep.teacher_features`.
          split: a split of it.
          records_fingerprint: of the records that will be trained on.

        Raises:
          RecordError: no finished cache of that split, a damaged index, or one of other records.
        """
        self._folder = epath.Path(folder)
        path = cache_index_path(folder, split)
        if not path.exists():
            raise RecordError(
                f"{folder} has no finished teacher features of split {split!r}: "
                f"run python -m data_prep.teacher_features --split {split} --out {folder}"
            )
        try:
            content = json.loads(path.read_text())
            content["shards"] = [ShardIndex(**shard) for shard in content["shards"]]
            self.index = TeacherCacheIndex(**content)
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path} is damaged ({error}): delete it and run data_prep.teacher_features") from error
        if self.index.records_fingerprint != records_fingerprint:
            raise RecordError(
                f"{path} was made of records {self.index.records_fingerprint[:16]}, these are "
                f"{records_fingerprint[:16]}: make the teacher features again, into another folder"
            )
        self._places = [
            (shard.file, offset, length, token)
            for shard in self.index.shards
            for offset, length, token in zip(shard.offsets, shard.lengths, shard.sample_tokens, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: SupportsIndex) -> Float[np.ndarray, "pairs dim"]:
        """Features of the visible pairs of the key frame at `index`: float16 as stored, float32 from int8.

        Raises:
          RecordError: missing, cut off or damaged; names shard and sample.
        """
        file, offset, length, token = self._places[range(len(self))[index]]
        path = self._folder / file
        try:
            with path.open("rb") as opened:
                opened.seek(offset)
                serialized = unframe_record(opened.read(length))
            return decode_features(serialized, self.index.dtype, self.index.feature_dim)
        except Exception as error:  # protobuf, TFDS and the file system each raise their own
            raise RecordError(
                f"{path} at byte {offset} (sample {token}): {error}; delete this shard and run "
                "data_prep.teacher_features again"
            ) from error

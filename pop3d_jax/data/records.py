"""The record: one key frame of a driving rig, and random access to the key frames of a split.

Records are written by `data_prep.build` through TFDS, so `tfds.builder_from_directory(DIR)` reads them too. Here
they are decoded in NumPy, without TensorFlow. `pop3d_jax.data.shards` knows how they lie in files.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Float32, Float64, Int64, UInt8
from tensorflow_datasets.proto import tf_example_pb2

from pop3d_jax.data.shards import SCHEMA_VERSION, RecordError, read_index, unframe_record

__all__ = [
    "KeyFrame",
    "RecordError",
    "RecordSource",
    "canonical_record",
    "decode_record",
    "encode_record",
    "record_features",
]


@dataclasses.dataclass(frozen=True)
class KeyFrame:
    """One key frame: the images of all cameras and one lidar sweep of (almost) the same instant.

    Number and order of the cameras are the data set's (`pop3d_jax.lidar_datasets`; nuScenes has six, in the order of
    `pop3d_jax.nuscenes.CAMERAS`). Lengths in metres, timestamps in microseconds; the axes of the frames are stated in
    docs/record.md for each data set.

    Attributes:
      images: the JPEG or PNG files, byte for byte as in the data set.
      intrinsics: pixels of the stored image.
      lidar_to_camera: both ego poses applied, so it is right for a moving car.
      points: x, y, z, intensity (0..255; SemanticKITTI 0..1), ring (-1 where the data set gives none) of every return.
      lidarseg: raw category of every point, as its index in the data set's list; empty where there are no labels.
      lidar_to_ego: mounting of the lidar.
      ego_to_global: ego pose at lidar time.
      lidar_file: path of the sweep below the data set's root; `camera_files` likewise.
      timestamp: of the sample, which is the lidar's.
    """

    images: list[bytes]
    intrinsics: Float64[np.ndarray, "cameras 3 3"]
    lidar_to_camera: Float64[np.ndarray, "cameras 4 4"]
    points: Float32[np.ndarray, "points 5"]
    lidarseg: UInt8[np.ndarray, " labels"]
    lidar_to_ego: Float64[np.ndarray, "4 4"]
    ego_to_global: Float64[np.ndarray, "4 4"]
    sample_token: str
    scene_token: str
    scene_name: str
    lidar_token: str
    lidar_file: str
    camera_tokens: list[str]
    camera_files: list[str]
    camera_timestamps: Int64[np.ndarray, " cameras"]
    timestamp: int


def record_features(*, decode_images: bool = True) -> tfds.features.FeaturesDict:
    """The TFDS features of a record.

    Args:
      decode_images: False gives the twin that reads the very same bytes and leaves the image files undecoded.
    """
    if decode_images:
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
        images = tfds.features.Sequence(image)
    else:
        images = tfds.features.Tensor(shape=(None,), dtype=np.object_)

    def array(dtype: type, *shape: int | None) -> tfds.features.Tensor:
        # As bytes: a tf.train.Example knows no float64, and a list of floats is slow to parse.
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    return tfds.features.FeaturesDict(
        {
            "images": images,
            "intrinsics": array(np.float64, None, 3, 3),
            "lidar_to_camera": array(np.float64, None, 4, 4),
            "points": array(np.float32, None, 5),
            "lidarseg": array(np.uint8, None),
            "lidar_to_ego": array(np.float64, 4, 4),
            "ego_to_global": array(np.float64, 4, 4),
            "sample_token": tfds.features.Text(),
            "scene_token": tfds.features.Text(),
            "scene_name": tfds.features.Text(),
            "lidar_token": tfds.features.Text(),
            "lidar_file": tfds.features.Text(),
            "camera_tokens": tfds.features.Sequence(tfds.features.Text()),
            "camera_files": tfds.features.Sequence(tfds.features.Text()),
            "camera_timestamps": tfds.features.Tensor(shape=(None,), dtype=np.int64),
            "timestamp": tfds.features.Scalar(np.int64),
        }
    )


@functools.cache
def _undecoded_features() -> tfds.features.FeaturesDict:
    return record_features(decode_images=False)


@functools.cache
def _record_features() -> tfds.features.FeaturesDict:
    return record_features()


def encode_record(key_frame: KeyFrame) -> bytes:
    """The serialized `tf.train.Example` of a key frame, by TFDS: the same bytes every time."""
    example = {field.name: getattr(key_frame, field.name) for field in dataclasses.fields(key_frame)}
    return canonical_record(_record_features().serialize_example(example))


def canonical_record(serialized: bytes) -> bytes:
    """The same `tf.train.Example` with its fields in order, which TFDS leaves to the process's hash seed."""
    return tf_example_pb2.Example.FromString(serialized).SerializeToString(deterministic=True)


def decode_record(serialized: bytes) -> KeyFrame:
    """The key frame of a serialized `tf.train.Example`, with its image files undecoded.

    Raises:
      RecordError: the bytes are not a record of this schema.
    """
    try:
        example: Mapping[str, Any] = _undecoded_features().deserialize_example_np(serialized)
    except Exception as error:  # protobuf, TFDS and NumPy each raise their own
        raise RecordError(f"not a record of schema {SCHEMA_VERSION}: {error}") from error

    def texts(name: str) -> list[str]:
        return [text.decode() for text in example[name]]

    return KeyFrame(
        images=list(example["images"]),
        intrinsics=example["intrinsics"],
        lidar_to_camera=example["lidar_to_camera"],
        points=example["points"],
        lidarseg=example["lidarseg"],
        lidar_to_ego=example["lidar_to_ego"],
        ego_to_global=example["ego_to_global"],
        sample_token=example["sample_token"].decode(),
        scene_token=example["scene_token"].decode(),
        scene_name=example["scene_name"].decode(),
        lidar_token=example["lidar_token"].decode(),
        lidar_file=example["lidar_file"].decode(),
        camera_tokens=texts("camera_tokens"),
        camera_files=texts("camera_files"),
        camera_timestamps=np.asarray(example["camera_timestamps"], np.int64),
        timestamp=int(example["timestamp"]),
    )


class RecordSource:
    """Random access to the key frames of one split: a Grain data source.

    `len(source)` is the number of key frames, `source[number]` a `KeyFrame`; it raises RecordError, which names shard,
    record and sample token, where the record is damaged or missing, and IndexError where there is no such number.

    It holds the index only; every read opens its shard, so it can be pickled to worker processes and used
    from several threads.
    """

    def __init__(self, records_dir: epath.PathLike, split: str):
        """Reads the index.

        Args:
          records_dir: a folder written by `data_prep.build`, local or gs://.
          split: a split of it.

        Raises:
          RecordError: as `read_index`.
        """
        self._folder = epath.Path(records_dir)
        index = read_index(self._folder, split)
        self._fingerprint = index.fingerprint
        self._dataset = index.dataset
        self._files = [shard.file for shard in index.shards]
        self._sample_tokens = [token for shard in index.shards for token in shard.sample_tokens]
        counts = [len(shard.offsets) for shard in index.shards]
        self._shards = np.repeat(np.arange(len(counts)), counts)
        self._offsets = np.array([offset for shard in index.shards for offset in shard.offsets], np.int64)
        self._lengths = np.array([length for shard in index.shards for length in shard.lengths], np.int64)

    def __len__(self) -> int:
        return len(self._sample_tokens)

    def __repr__(
        self,
    ) -> str:  # Grain puts it into the iterator's state: it must not name a machine or a process
        return f"RecordSource({len(self)} key frames, {self._fingerprint[:16]})"

    @property
    def sample_tokens(self) -> list[str]:
        """Sample tokens in the order of the records."""
        return self._sample_tokens

    @property
    def shard_numbers(self) -> Int64[np.ndarray, " records"]:
        """Number of the shard of each record; docs/record.md says what a shard holds."""
        return self._shards

    @property
    def dataset(self) -> str:
        """Name of the data set, as in `pop3d_jax.lidar_datasets`."""
        return self._dataset

    @property
    def fingerprint(self) -> str:
        """Identity of the content; see `SplitIndex.fingerprint`."""
        return self._fingerprint

    def serialized(self, index: SupportsIndex) -> bytes:
        """The serialized example at `index`, its framing verified.

        Raises:
          RecordError: the shard is missing, cut off or damaged; names shard, record and sample token.
          IndexError: no such index.
        """
        position = range(len(self))[index]
        path = self._folder / self._files[self._shards[position]]
        try:
            with path.open("rb") as file:
                file.seek(int(self._offsets[position]))
                return unframe_record(file.read(int(self._lengths[position])))
        except (RecordError, OSError) as error:
            raise self._named(error, path, position) from error

    def __getitem__(self, index: SupportsIndex) -> KeyFrame:
        """The key frame at `index`; raises as `serialized`, also where the record is not of this schema."""
        serialized = self.serialized(index)
        try:
            return decode_record(serialized)
        except RecordError as error:
            position = range(len(self))[index]
            raise self._named(error, self._folder / self._files[self._shards[position]], position) from error

    def _named(self, error: Exception, path: epath.Path, position: int) -> RecordError:
        return RecordError(
            f"{path}, record {position} at byte {self._offsets[position]} (sample "
            f"{self._sample_tokens[position]}): {error}; python -m data_prep.build --check --out "
            f"{self._folder} finds all damage; delete the shard and run the build again to mend it"
        )

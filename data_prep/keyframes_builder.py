"""The TFDS builder of key frames of any data set: one shard a scene or a part of one, in the official order."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from data_prep.key_frame_rows import KeyFrameRow, SceneKeyFrames
from data_prep.table_rows import SourceError
from pop3d_jax.data.records import KeyFrame, canonical_record, encode_record, record_features
from pop3d_jax.data.shards import SCHEMA_VERSION, ShardIndex, SplitIndex, shard_prefix, write_shard


@dataclasses.dataclass(frozen=True)
class SceneShard:
    """The records of one scene: an example generator as `tfds.core.ShardBasedBuilder` takes it.

    Attributes:
      source: root of the data set.
      scene: its key frames.
      read: reads one of them; raises SourceError. Of a module's top level, as it is sent to other processes.
    """

    source: str
    scene: SceneKeyFrames
    read: Callable[[epath.PathLike, KeyFrameRow], KeyFrame]

    def key_frames(self, skipped: list[dict[str, str]] | None = None) -> Iterator[KeyFrame]:
        """Reads the scene.

        Args:
          skipped: receives token and error of a key frame that cannot be read; None stops at the first one.

        Raises:
          SourceError: as `read`, where `skipped` is None.
        """
        for token, error in self.scene.broken:
            if skipped is None:
                raise SourceError(error)
            skipped.append({"sample_token": token, "error": error})
        for row in self.scene.key_frames:
            try:
                yield self.read(self.source, row)
            except SourceError as error:
                if skipped is None:
                    raise
                skipped.append({"sample_token": row.sample_token, "error": str(error)})

    def __call__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Sample token and example of each key frame; raises SourceError at the first that cannot be read."""
        for frame in self.key_frames():
            yield (
                frame.sample_token,
                {field.name: getattr(frame, field.name) for field in dataclasses.fields(frame)},
            )

    def write(self, path: epath.PathLike, *, skip_errors: bool) -> ShardIndex:
        """Writes the scene's shard; raises SourceError at damage unless `skip_errors`."""
        skipped: list[dict[str, str]] | None = [] if skip_errors else None
        records = ((frame.sample_token, encode_record(frame)) for frame in self.key_frames(skipped))
        return write_shard(path, records, skipped)


class _ShardFileWriter:
    """The example writer of the builder: shards with their index, without TensorFlow."""

    file_format = tfds.core.FileFormat.TFRECORD

    def write(self, path: epath.PathLike, examples: Iterable[tuple[str, bytes]]) -> None:
        write_shard(path, ((token, canonical_record(serialized)) for token, serialized in examples))


class KeyframesBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Key frames, the images of all cameras and a sweep each; a data set's own builder gives it a name.

    `data_prep.build` writes shards in parallel, resumes, and adds the index that `RecordSource` needs. The
    inherited `download_and_prepare` writes the very same shards (on Apache Beam, if asked), without that index.
    """

    VERSION = tfds.core.Version(SCHEMA_VERSION)
    DESCRIPTION: ClassVar[str] = "Key frames: images, lidar sweep, calibration, labels."
    url_infos: ClassVar[dict[str, Any]] = {}  # nothing is downloaded: spares TFDS looking for lists of checksums

    def __init__(self, data_dir: epath.PathLike, shards: Mapping[str, Sequence[SceneShard]]):
        """Makes the builder.

        Args:
          data_dir: the records folder itself.
          shards: of each split.
        """
        self._shards = shards
        super().__init__(data_dir=data_dir)

    def _build_data_dir(self, data_dir: str) -> tuple[str, str]:
        # No NAME/VERSION folders below the one that the user names.
        return os.path.dirname(data_dir), data_dir

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=record_features(),
            description=self.DESCRIPTION,
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Sequence[SceneShard]]:
        del dl_manager
        return self._shards

    def _example_writer(self) -> _ShardFileWriter:
        return _ShardFileWriter()


def shard_path(records_dir: epath.PathLike, dataset: str, split: str, number: int, count: int) -> epath.Path:
    """Path of shard `number` of `count` of a data set's split, by the naming of TFDS."""
    template = _shard_files(epath.Path(records_dir), dataset, split)
    return epath.Path(template.sharded_filepath(shard_index=number, num_shards=count))


def _shard_files(folder: epath.Path, dataset: str, split: str) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=shard_prefix(dataset), split=split, filetype_suffix="tfrecord"
    )


def write_metadata(
    records_dir: epath.PathLike, builder_class: type[KeyframesBuilder], indexes: Sequence[SplitIndex]
) -> None:
    """Writes TFDS's description of finished splits, dataset_info.json and features.json, from nothing.

    Each file appears whole or not at all.
    """
    folder = epath.Path(records_dir)
    unfinished = folder / f"metadata.incomplete-{os.getpid()}"
    unfinished.mkdir()
    builder = builder_class(unfinished, {})
    builder.info.set_splits(
        tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=index.split,
                    shard_lengths=[len(shard.offsets) for shard in index.shards],
                    num_bytes=sum(shard.bytes for shard in index.shards),
                    filename_template=_shard_files(unfinished, index.dataset, index.split),
                )
                for index in indexes
            ]
        )
    )
    builder.info.write_to_directory(unfinished)
    for path in list(unfinished.iterdir()):
        path.replace(folder / path.name)
    unfinished.rmdir()

"""The data sets that records are built from: how each one's folder is read."""

import dataclasses
import functools
from collections.abc import Callable

from etils import epath

from data_prep import nuscenes_tables, pandaset_builder, semantic_kitti_builder, sensor_files, splits
from data_prep.key_frame_rows import KeyFrameRow, SplitKeyFrames
from data_prep.keyframes_builder import KeyframesBuilder
from data_prep.nuscenes_builder import NuscenesKeyframes
from pop3d_jax.data.records import KeyFrame

DATASETS = ("nuscenes", "semantic_kitti", "pandar64", "pandar_gt")


@dataclasses.dataclass(frozen=True)
class Layout:
    """One data set on disk.

    Attributes:
      dataset: its name in `pop3d_jax.lidar_datasets`.
      version: of the data set; its name where it publishes no versions.
      builder: describes its records to TFDS.
      fingerprint: of the tables below a root; raises SourceError.
      read_split: key frames of a split below a root; raises SourceError.
      read_key_frame: the sensor files of one of them; raises SourceError.
    """

    dataset: str
    version: str
    builder: type[KeyframesBuilder]
    fingerprint: Callable[[epath.PathLike], str]
    read_split: Callable[[epath.PathLike, str], SplitKeyFrames]
    read_key_frame: Callable[[epath.PathLike, KeyFrameRow], KeyFrame]


def layout_of(dataset: str, version: str | None, split: str) -> Layout:
    """How a data set is read.

    Args:
      dataset: one of `DATASETS`.
      version: of nuScenes; None for the others.
      split: that is to be read.

    Raises:
      SplitError: a version where the data set has none, or a split that it does not have.
    """
    if dataset == "nuscenes":
        splits.check_split(version, split)
        return Layout(
            dataset,
            version,
            NuscenesKeyframes,
            functools.partial(nuscenes_tables.tables_fingerprint, version=version),
            lambda source, split: nuscenes_tables.read_tables(source, version, split),
            sensor_files.read_key_frame,
        )
    if version is not None:
        raise splits.SplitError(f"{dataset} has no versions: leave out --version")
    known = semantic_kitti_builder.SEQUENCES if dataset == "semantic_kitti" else pandaset_builder.SCENE_COUNTS
    if split not in known:
        raise splits.SplitError(f"no split {split!r} in {dataset}; there are {', '.join(known)} (see --split)")
    if dataset == "semantic_kitti":
        return Layout(
            dataset,
            dataset,
            semantic_kitti_builder.SemanticKittiKeyframes,
            semantic_kitti_builder.fingerprint,
            semantic_kitti_builder.read_split,
            semantic_kitti_builder.read_key_frame,
        )
    spinning = dataset == "pandar64"
    return Layout(
        dataset,
        dataset,
        pandaset_builder.Pandar64Keyframes if spinning else pandaset_builder.PandarGTKeyframes,
        pandaset_builder.fingerprint,
        functools.partial(pandaset_builder.read_split, dataset=dataset),
        pandaset_builder.read_pandar64 if spinning else pandaset_builder.read_pandar_gt,
    )

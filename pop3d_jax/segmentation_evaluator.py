"""Semantic segmentation of lidar sweeps, judged over all their points (official `utils/finetuner.py` of ScaLR).

Every point of a sweep takes the class of the nearest point that the network saw, also outside the field of view. Counts
are integers, summed over devices, hosts and the whole split before any ratio is taken.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from pop3d_jax.data.lidar_pipeline import KeyFrames, LidarSource, evaluation_batches
from pop3d_jax.lidar_experiment import LidarStudent, dataset_named, lidar_settings, record_source
from pop3d_jax.lidar_step import network_input
from pop3d_jax.metrics import SegmentationScores, confusion_matrix, segmentation_scores
from pop3d_jax.models.parameters import ArrayTree, merge_model
from pop3d_jax.progress import progress
from pop3d_jax.sharding import replicated, shard_batch

_HOST_ARRAYS = ("record_index", "points_left_out", "raw_points_left_out")


class CapacityError(ValueError):
    """A sweep does not fit: its score would be a partial one; the message names it and the field that makes room."""


@dataclasses.dataclass(frozen=True)
class SegmentationResults:
    """What was counted over a split; rows are targets, columns predictions."""

    confusion: Int[np.ndarray, "classes classes"]
    key_frames: int

    @property
    def scores(self) -> SegmentationScores:
        """In 0..1."""
        return segmentation_scores(self.confusion)


class SegmentationEvaluator:
    """Judges states of one network on one split of one data set; compiles once."""

    def __init__(
        self,
        student: LidarStudent,
        config: ml_collections.ConfigDict,
        mesh: Mesh,
        name: str,
        split: str | None = None,
    ):
        """Opens the records.

        Args:
          student: structure of the network.
          config: its experiment.
          mesh: devices.
          name: data set.
          split: of its records; `config.data.eval_split` by default.

        Raises:
          RecordError, ValueError: no such records, no such data set, or a batch that does not divide over the mesh.
        """
        if config.eval_batch_size % mesh.shape["data"]:
            raise ValueError(
                f"config.eval_batch_size = {config.eval_batch_size} (--batch_size) does not divide over the "
                f"{mesh.shape['data']} devices of the mesh's data axis: give a multiple of that number"
            )
        self.name = name
        self.dataset = dataset_named(name)
        self.key_frames = record_source(config, name, split or config.data.eval_split)
        self._config, self._mesh = config, mesh
        self._settings = lidar_settings(config, training=False)

        def count(parameters: ArrayTree, statistics: ArrayTree, batch: dict[str, jax.Array]) -> jax.Array:
            model = merge_model(student.graph, parameters, statistics)
            classes = jnp.argmax(model(*network_input(batch, self._settings.neighbors)), -1)
            predicted = jnp.take_along_axis(classes, batch["nearest_kept"], 1)
            counted = batch["raw_mask"] & batch["valid"][:, None]
            return confusion_matrix(batch["raw_labels"], predicted, len(self.dataset.class_names), mask=counted)

        self._count = jax.jit(count, out_shardings=replicated(mesh))

    def run(
        self, parameters: ArrayTree, statistics: ArrayTree, key_frames: KeyFrames | None = None
    ) -> SegmentationResults:
        """Counts over the split.

        Args:
          parameters, statistics: of the network, on all devices.
          key_frames: others than the records' own, such as corrupted ones.

        Raises:
          CapacityError: a sweep has more points than the arrays.
          RecordError: a key frame without labels, or with wrong ones.
        """
        source = LidarSource(self.key_frames if key_frames is None else key_frames, self.dataset)
        config, classes = self._config, len(self.dataset.class_names)
        batches = evaluation_batches(
            source,
            self._settings,
            batch_size=config.eval_batch_size,
            host=jax.process_index(),
            hosts=jax.process_count(),
            workers=config.data.workers,
        )
        confusion = np.zeros((classes, classes), np.int64)
        for batch in progress(batches, -(-len(source) // config.eval_batch_size), f"judging {self.name}"):
            self._check_all_fit(batch)
            arrays = {name: array for name, array in batch.items() if name not in _HOST_ARRAYS}
            with jax.set_mesh(self._mesh):
                confusion += np.asarray(self._count(parameters, statistics, shard_batch(arrays, self._mesh)))
        return SegmentationResults(confusion, len(source))

    def _check_all_fit(self, batch: dict[str, np.ndarray]) -> None:
        for name, field in (("points_left_out", "capacity"), ("raw_points_left_out", "raw_capacity")):
            row = int(batch[name].argmax())
            if batch[name][row]:
                token = self.key_frames.sample_tokens[int(batch["record_index"][row])]
                raise CapacityError(
                    f"sample {token} of {self.name} has {batch[name][row]} points more than config.points.{field} = "
                    f"{getattr(self._settings, field)}: raise it, all points are judged"
                )

"""Zero-shot evaluation of a student by the official definitions (`eval.py`, `utils/metric_util.py`).

Counts are integers, summed over the whole split before any ratio is taken.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Int

from pop3d_jax.experiment import Student
from pop3d_jax.labels import evaluation_labels, occupancy_tpvformer
from pop3d_jax.metrics import assign_classes, confusion_matrix, mean_iou, occupancy_iou
from pop3d_jax.models.clip import LoadedCLIP
from pop3d_jax.models.parameters import ArrayTree, merge_model
from pop3d_jax.nuscenes import CLASS_NAMES, EMPTY, IGNORE, UNLABELLED
from pop3d_jax.progress import progress
from pop3d_jax.retrieval import Retrieval
from pop3d_jax.sharding import replicated, shard_batch
from pop3d_jax.text import TextClassifier, zero_shot_classifier
from pop3d_jax.voxels import grid_coordinates

_LABELS = len(CLASS_NAMES)
SEMANTIC_CLASSES = tuple(range(1, EMPTY))
# The official headline counts free space as a class of its own: a mean over 17 IoUs.
_ALL_CLASSES = (*SEMANTIC_CLASSES, EMPTY)


@dataclasses.dataclass
class Results:
    """Counts over a split; rows are targets, columns predictions.

    Attributes:
      occupancy: free / occupied over all observed voxels (`vox_agn_all`).
      occupancy_all: free / occupied over all voxels, unobserved ones free: the target of the training.
      voxels_all: classes and free space over all observed voxels (`vox_clip_all`, the paper's headline).
      voxels_occupied: classes at voxels whose target has a class, whatever occupancy was predicted there.
      points: classes at labelled lidar points.
      frames: key frames counted.
    """

    occupancy: Int[np.ndarray, "2 2"]
    occupancy_all: Int[np.ndarray, "2 2"]
    voxels_all: Int[np.ndarray, "18 18"]
    voxels_occupied: Int[np.ndarray, "18 18"]
    points: Int[np.ndarray, "18 18"]
    frames: int


def headline(results: Results) -> dict[str, float]:
    """The numbers in percent; `official` means count a class that never occurs as 100, as the official code does."""
    voxels_all = mean_iou(results.voxels_all, _ALL_CLASSES)
    occupied = mean_iou(results.voxels_occupied, SEMANTIC_CLASSES)
    points = mean_iou(results.points, SEMANTIC_CLASSES)
    return {
        "occupancy_iou": 100.0 * occupancy_iou(results.occupancy),
        "occupancy_iou_all_voxels": 100.0 * occupancy_iou(results.occupancy_all),
        "miou_voxels_all": voxels_all.present_mean,
        "miou_voxels_all_official": voxels_all.official_mean,
        "miou_voxels_occupied": occupied.present_mean,
        "miou_voxels_occupied_official": occupied.official_mean,
        "miou_points": points.present_mean,
        "miou_points_official": points.official_mean,
    }


class Evaluator:
    """Evaluates students of one structure against one text classifier."""

    def __init__(self, student: Student, clip: LoadedCLIP, mesh: Mesh, text_cache: epath.PathLike | None = None):
        """Embeds the official prompts and prepares the jitted prediction.

        Args:
          student: structure of the network.
          clip: whose text tower the features live with.
          mesh: devices.
          text_cache: folder for text embeddings, or None.
        """
        self._student = student
        self._mesh = mesh
        self.clip = clip
        self.classifier: TextClassifier = zero_shot_classifier(clip, cache_dir=text_cache)
        self._text = jax.device_put(
            (jnp.asarray(self.classifier.embeddings), jnp.asarray(self.classifier.classes)), replicated(mesh)
        )
        self._evaluate = jax.jit(self._evaluate_batch, out_shardings=replicated(mesh))

    def _evaluate_batch(
        self, parameters: ArrayTree, statistics: ArrayTree, text: tuple, batch: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        volume = self._student.volume
        model = merge_model(self._student.graph, parameters, statistics)
        coordinates = grid_coordinates(batch["points"], volume)
        output = model(batch["images"], batch["lidar_to_image"], feature_points=coordinates, voxel_features=True)
        embeddings, classes = text
        targets = jax.vmap(lambda *example: evaluation_labels(*example, volume))(
            batch["points"], batch["point_labels"], batch["point_mask"]
        )
        trained = jax.vmap(lambda points, mask: occupancy_tpvformer(points, mask, volume))(
            batch["points"], batch["point_mask"]
        )
        occupied = jnp.argmax(output.occupancy_logits, -1).astype(jnp.int32)
        voxel_classes = assign_classes(output.voxel_features, embeddings, classes)
        point_classes = assign_classes(output.point_features, embeddings, classes)

        valid = batch["valid"][:, None, None, None]
        labelled = valid & batch["has_labels"][:, None, None, None]
        rays = targets["semantic_rays"].astype(jnp.int32)
        point_labels = batch["point_labels"].astype(jnp.int32)
        has_class = (rays != EMPTY) & (rays != IGNORE)
        return {
            "occupancy": confusion_matrix(
                targets["occupancy_eval"].astype(jnp.int32), occupied, 2, IGNORE, _like(valid, occupied)
            ),
            "occupancy_all": confusion_matrix(trained.astype(jnp.int32), occupied, 2, IGNORE, _like(valid, occupied)),
            "voxels_all": confusion_matrix(
                rays, jnp.where(occupied == 1, voxel_classes, EMPTY), _LABELS, IGNORE, _like(labelled, rays)
            ),
            "voxels_occupied": confusion_matrix(rays, voxel_classes, _LABELS, IGNORE, labelled & has_class),
            "points": confusion_matrix(
                jnp.where(point_labels == UNLABELLED, IGNORE, point_labels),
                point_classes,
                _LABELS,
                IGNORE,
                batch["point_mask"] & labelled[:, 0, 0],
            ),
            "point_features": output.point_features,
        }

    def run(
        self,
        parameters: ArrayTree,
        statistics: ArrayTree,
        batches: Iterator[dict[str, np.ndarray]],
        total: int,
        retrieval: Retrieval | None = None,
    ) -> Results:
        """Evaluates a split.

        Args:
          parameters, statistics: of the student.
          batches: from `evaluation_batches`.
          total: how many there are.
          retrieval: phrase queries to score in the same pass, or None.

        Returns:
          The counts; `retrieval` has gathered its scores.
        """
        sums: dict[str, Any] = dict.fromkeys(
            (field.name for field in dataclasses.fields(Results) if field.name != "frames"), 0
        )
        frames = 0
        for batch in progress(batches, total, "evaluating"):
            indices = batch.pop("record_index")
            left_out = batch.pop("points_left_out")
            batch.pop("feature_points_left_out")
            counts = self._evaluate(parameters, statistics, self._text, shard_batch(batch, self._mesh))
            for name in sums:
                sums[name] = sums[name] + np.asarray(counts[name]).astype(np.int64)
            frames += int(batch["valid"].sum())
            if retrieval is not None:
                retrieval.add(
                    np.asarray(counts["point_features"]),
                    batch["point_mask"],
                    batch["valid"],
                    indices,
                    left_out,
                )
        return Results(**sums, frames=frames)


def _like(mask: jax.Array, array: jax.Array) -> jax.Array:
    return jnp.broadcast_to(mask, array.shape)

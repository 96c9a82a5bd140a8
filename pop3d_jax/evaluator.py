"""Zero-shot evaluation of a student by the official definitions (`eval.py`, `utils/metric_util.py`).

Counts are integers, summed over devices, hosts and the whole split before any ratio is taken.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Int

from pop3d_jax.checkpoint import Checkpoints
from pop3d_jax.experiment import Student, make_student, restored_parts
from pop3d_jax.images import network_images
from pop3d_jax.labels import evaluation_labels, occupancy_tpvformer
from pop3d_jax.lidarseg import devkit_scores
from pop3d_jax.metrics import MeanIoU, assign_classes, confusion_matrix, mean_iou, occupancy_iou
from pop3d_jax.models.clip import LoadedCLIP
from pop3d_jax.models.parameters import ArrayTree, merge_model
from pop3d_jax.nuscenes import CLASS_NAMES, EMPTY, IGNORE, UNLABELLED
from pop3d_jax.progress import progress
from pop3d_jax.retrieval import Retrieval
from pop3d_jax.sharding import make_mesh, replicated, shard_batch
from pop3d_jax.text import TextClassifier, zero_shot_classifier
from pop3d_jax.voxels import grid_coordinates
from pop3d_jax.workdir import read_config

_LABELS = len(CLASS_NAMES)
SEMANTIC_CLASSES = tuple(range(1, EMPTY))
# The official headline counts free space as a class of its own: a mean over 17 IoUs.
ALL_CLASSES = (*SEMANTIC_CLASSES, EMPTY)
_FREE_AND_OCCUPIED = (0, 1)


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A checkpoint of a workdir, ready to be evaluated.

    Attributes:
      config: of the run, with the upscaling that was asked for.
      student: structure.
      mesh: devices.
      parameters, statistics: restored, on all devices.
      step: of the checkpoint.
    """

    config: ml_collections.ConfigDict
    student: Student
    mesh: Mesh
    parameters: ArrayTree
    statistics: ArrayTree
    step: int


def load_run(workdir: epath.PathLike, step: int | None = None, upscale: Sequence[int] | None = None) -> TrainedRun:
    """Restores what inference needs of a run.

    Args:
      workdir: folder that `pop3d_jax.train` wrote.
      step: of the checkpoint; the newest by default.
      upscale: factors along x, y, z by which the planes are scaled up before they are decoded (official
        `scale_w`, `scale_h`, `scale_z` of `TPVAggregator`): a finer grid from the same parameters. None: the
        run's own.

    Raises:
      WorkdirError, CheckpointError: nothing to restore, or not of this model.
      ValueError: the finer grid has more voxels than `Volume` takes.
    """
    workdir = epath.Path(workdir)
    config = read_config(workdir)
    if upscale is not None:
        config.model.upscale = tuple(upscale)
    student = make_student(config)
    mesh = make_mesh(config.mesh.data, config.mesh.camera)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    step = checkpoints.latest_step() if step is None else step
    restored = checkpoints.restore(restored_parts(student), replicated(mesh), step)
    return TrainedRun(config, student, mesh, restored["parameters"], restored["statistics"], step)


@dataclasses.dataclass
class Results:
    """Counts over a split; rows are targets, columns predictions.

    Attributes:
      occupancy: free / occupied over all observed voxels (`vox_agn_all`).
      occupancy_all: free / occupied over all voxels, unobserved ones free: the target of the training.
      voxels_all: classes and free space over all observed voxels (`vox_clip_all`, the paper's headline).
      voxels_occupied: classes at voxels whose target has a class, whatever occupancy was predicted there.
      voxels_with_points: classes at voxels where most points have a class, points clipped into the border
        included, and free space where the voxel was predicted free (`vox_clip_occupied`).
      points: classes at lidar points; row 0 holds the unlabelled ones.
      point_occupancy: free / occupied at lidar points, all of which are occupied (`pts_agn`).
      frames: key frames counted.
    """

    occupancy: Int[np.ndarray, "2 2"]
    occupancy_all: Int[np.ndarray, "2 2"]
    voxels_all: Int[np.ndarray, "18 18"]
    voxels_occupied: Int[np.ndarray, "18 18"]
    voxels_with_points: Int[np.ndarray, "18 18"]
    points: Int[np.ndarray, "18 18"]
    point_occupancy: Int[np.ndarray, "2 2"]
    frames: int

    @property
    def occupancy_at_points(self) -> Int[np.ndarray, "2 2"]:
        """`occupancy_all` at the occupied voxels alone (`vox_occ_agn_unq`)."""
        counts = self.occupancy_all.copy()
        counts[0] = 0
        return counts


@dataclasses.dataclass(frozen=True)
class OfficialScore:
    """One `MeanIoU` of the official `eval.py`.

    Attributes:
      name: the official object's own name.
      printed_name: the official variable, which is also what the script prints of the two it prints.
      counts: attribute of `Results` that holds its counts.
      class_indices, ignore_label: its arguments.
      meaning: what it measures, in a few words.
    """

    name: str
    printed_name: str
    counts: str
    class_indices: tuple[int, ...]
    ignore_label: int
    meaning: str

    def mean_iou(self, results: Results) -> MeanIoU:
        """The score, with the official mean and the one over the classes that occur."""
        return mean_iou(getattr(results, self.counts), self.class_indices, self.ignore_label)


# The released script reads its semantic targets through the class-agnostic label map, so that its `pts_clip*`,
# `vox_clip_occupied` and `vox_occ_agn_unq` compare with the label 1 everywhere: they say nothing. Here they have the
# targets they were meant to have; `vox_clip_all` and `vox_agn_all` are sound in the release and equal it.
OFFICIAL_SCORES = (
    OfficialScore(
        "vox_clip_all", "val_miou_vox_clip_all", "voxels_all", ALL_CLASSES, IGNORE, "classes and free, observed voxels"
    ),
    OfficialScore(
        "vox_clip_occupied",
        "val_miou_vox_clip_occupied",
        "voxels_with_points",
        SEMANTIC_CLASSES,
        IGNORE,
        "classes, voxels with points",
    ),
    OfficialScore("pts_clip", "val_miou_pts_clip", "points", SEMANTIC_CLASSES, IGNORE, "classes, all lidar points"),
    OfficialScore(
        "pts_clip_ignore0",
        "val_miou_pts_clip_ignore0",
        "points",
        SEMANTIC_CLASSES,
        UNLABELLED,
        "classes, labelled lidar points",
    ),
    OfficialScore(
        "vox_agn_all", "val_miou_vox_agn", "occupancy", _FREE_AND_OCCUPIED, IGNORE, "free / occupied, observed voxels"
    ),
    OfficialScore(
        "vox_occ_agn_unq",
        "val_miou_vox_occupied_agnostic_unique",
        "occupancy_at_points",
        _FREE_AND_OCCUPIED,
        IGNORE,
        "occupied, voxels with points",
    ),
    OfficialScore(
        "pts_agn", "val_miou_pts_agn", "point_occupancy", _FREE_AND_OCCUPIED, IGNORE, "occupied, all lidar points"
    ),
)


def headline(results: Results) -> dict[str, float]:
    """The numbers in percent; `official` means count a class that never occurs as 100, as the official code does."""
    voxels_all = mean_iou(results.voxels_all, ALL_CLASSES)
    occupied = mean_iou(results.voxels_occupied, SEMANTIC_CLASSES)
    points = mean_iou(results.points, SEMANTIC_CLASSES, ignore_label=UNLABELLED)
    return {
        "occupancy_iou": 100.0 * occupancy_iou(results.occupancy),
        "occupancy_iou_all_voxels": 100.0 * occupancy_iou(results.occupancy_all),
        "miou_voxels_all": voxels_all.present_mean,
        "miou_voxels_all_official": voxels_all.official_mean,
        "miou_voxels_occupied": occupied.present_mean,
        "miou_voxels_occupied_official": occupied.official_mean,
        "miou_points": points.present_mean,
        "miou_points_official": points.official_mean,
        "miou_points_devkit": 100.0 * devkit_scores(results.points[:EMPTY, :EMPTY]).mean_iou,
    }


def official_table(results: Results) -> dict[str, dict[str, Any]]:
    """Every score of the official script by the name of its variable, in percent.

    Returns:
      For each: `official_mean` (a class that never occurs as a target counts 100), `present_mean` (over the
      classes that occur; None where none does), `classes_present` of `classes`, and `meaning`.
    """
    table = {}
    for score in OFFICIAL_SCORES:
        value = score.mean_iou(results)
        table[score.printed_name] = {
            "official_mean": value.official_mean,
            "present_mean": None if math.isnan(value.present_mean) else value.present_mean,
            "classes_present": sum(value.present),
            "classes": len(value.present),
            "meaning": score.meaning,
        }
    return table


class Evaluator:
    """Evaluates students of one structure against one text classifier."""

    def __init__(
        self,
        student: Student,
        clip: LoadedCLIP,
        mesh: Mesh,
        text_cache: epath.PathLike | None = None,
        classifier: TextClassifier | None = None,
    ):
        """Embeds the official prompts, unless a classifier is given, and prepares the jitted prediction.

        Args:
          student: structure of the network.
          clip: whose text tower the features live with.
          mesh: devices.
          text_cache: folder for text embeddings, or None.
          classifier: such as the authors' own, see `read_text_classifier`.
        """
        self._student = student
        self._mesh = mesh
        self.clip = clip
        self.classifier = classifier or zero_shot_classifier(clip, cache_dir=text_cache)
        self._text = jax.device_put(
            (jnp.asarray(self.classifier.embeddings), jnp.asarray(self.classifier.classes)), replicated(mesh)
        )
        # Replicated results: every host reads the counts of the whole batch, also where it holds a part of it.
        self._evaluate = jax.jit(self._evaluate_batch, static_argnames="with_points", out_shardings=replicated(mesh))

    def _evaluate_batch(
        self,
        parameters: ArrayTree,
        statistics: ArrayTree,
        text: tuple,
        batch: dict[str, jax.Array],
        with_points: bool,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        volume = self._student.volume
        model = merge_model(self._student.graph, parameters, statistics)
        coordinates = grid_coordinates(batch["points"], volume)
        output = model(
            network_images(batch["images"]), batch["lidar_to_image"], coordinates, coordinates, voxel_features=True
        )
        embeddings, classes = text
        targets = jax.vmap(lambda *example: evaluation_labels(*example, volume))(
            batch["points"], batch["point_labels"], batch["point_mask"]
        )
        trained = jax.vmap(lambda points, mask: occupancy_tpvformer(points, mask, volume))(
            batch["points"], batch["point_mask"]
        )
        occupied = jnp.argmax(output.occupancy_logits, -1).astype(jnp.int32)
        point_occupied = jnp.argmax(output.point_occupancy_logits, -1).astype(jnp.int32)
        voxel_classes = assign_classes(output.voxel_features, embeddings, classes)
        seen_classes = jnp.where(occupied == 1, voxel_classes, EMPTY)
        point_classes = assign_classes(output.point_features, embeddings, classes)

        valid = batch["valid"][:, None, None, None]
        labelled = valid & batch["has_labels"][:, None, None, None]
        rays = targets["semantic_rays"].astype(jnp.int32)
        majority = targets["semantic_majority"].astype(jnp.int32)
        observed = targets["occupancy_eval"].astype(jnp.int32)
        has_class = (rays != EMPTY) & (rays != IGNORE)
        has_points = (majority != EMPTY) & (majority != UNLABELLED)
        counts = {
            "occupancy": confusion_matrix(observed, occupied, 2, IGNORE, _like(valid, occupied)),
            "occupancy_all": confusion_matrix(trained.astype(jnp.int32), occupied, 2, IGNORE, _like(valid, occupied)),
            "voxels_all": confusion_matrix(rays, seen_classes, _LABELS, IGNORE, _like(labelled, rays)),
            "voxels_occupied": confusion_matrix(rays, voxel_classes, _LABELS, IGNORE, labelled & has_class),
            "voxels_with_points": confusion_matrix(majority, seen_classes, _LABELS, IGNORE, labelled & has_points),
            "points": confusion_matrix(
                batch["point_labels"].astype(jnp.int32),
                point_classes,
                _LABELS,
                IGNORE,
                batch["point_mask"] & labelled[:, 0, 0],
            ),
            "point_occupancy": confusion_matrix(
                jnp.ones_like(point_occupied), point_occupied, 2, IGNORE, batch["point_mask"] & valid[:, 0, 0]
            ),
            "frames": batch["valid"].sum(dtype=jnp.int32),
        }
        if not with_points:
            return counts, {}
        names = ("point_mask", "valid", "record_index", "points_left_out")
        return counts, {"point_features": output.point_features} | {name: batch[name] for name in names}

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
          batches: from `evaluation_batches`; with several hosts, this host's part of them.
          total: how many there are.
          retrieval: phrase queries to score in the same pass, or None.

        Returns:
          The counts over all hosts, the same on each; `retrieval` has gathered its scores.
        """
        sums: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Results)), 0)
        for batch in progress(batches, total, "evaluating"):
            # What the teacher would be asked for is not needed here.
            arrays = {name: array for name, array in batch.items() if not name.startswith("feature_")}
            arrays["record_index"] = arrays["record_index"].astype(np.int32)
            device_batch = shard_batch(arrays, self._mesh)
            with jax.set_mesh(self._mesh):
                counts, points = self._evaluate(
                    parameters, statistics, self._text, device_batch, with_points=retrieval is not None
                )
            for name in sums:
                sums[name] = sums[name] + np.asarray(counts[name]).astype(np.int64)
            if retrieval is not None:
                host = {name: np.asarray(array) for name, array in points.items()}
                retrieval.add(
                    host["point_features"],
                    host["point_mask"],
                    host["valid"],
                    host["record_index"],
                    host["points_left_out"],
                )
        return Results(**sums | {"frames": int(sums["frames"])})


def _like(mask: jax.Array, array: jax.Array) -> jax.Array:
    return jnp.broadcast_to(mask, array.shape)

"""Metrics of the official evaluation: confusion matrices, IoU, zero-shot class assignment, average precision.

Counting happens on the device in integers (`confusion_matrix`); what is read off the counts happens on the
host in float64, so that counts can be summed over batches, devices and hosts in any order without changing a
result.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, Integer, Num

from pop3d_jax.nuscenes import IGNORE, UNLABELLED


def confusion_matrix(
    target: Integer[Array, "*voxels"],
    prediction: Integer[Array, "*voxels"],
    num_classes: int,
    ignore_label: int = IGNORE,
    mask: Bool[Array, "*voxels"] | None = None,
) -> Int32[Array, "classes classes"]:
    """Counts of (target, prediction) pairs; rows are targets, columns predictions.

    Args:
      target: labels in 0 .. num_classes - 1, or `ignore_label`, whose elements are not counted.
      prediction: labels in 0 .. num_classes - 1; choose `num_classes` to hold every label that can occur, since
        a pair with a label outside is not counted (a compiled function cannot raise).
      mask: elements to count, such as points that are no padding; None counts all.

    Returns:
      int32 counts, which may be summed over 2**31 elements: 26,000 grids of 80,000 voxels.
    """
    # Labels may be bytes, which 256 classes would not fit.
    target, prediction = target.astype(jnp.int32), prediction.astype(jnp.int32)
    known = (target >= 0) & (target < num_classes) & (prediction >= 0) & (prediction < num_classes)
    counted = known & (target != ignore_label)
    if mask is not None:
        counted = counted & mask
    # Elements that do not count go to an index beyond the table, which the scatter drops.
    pair = target * num_classes + prediction
    pair = jnp.where(counted, pair, num_classes**2).reshape(-1)
    counts = jnp.zeros(num_classes**2, jnp.int32).at[pair].add(1, mode="drop")
    return counts.reshape(num_classes, num_classes)


@dataclasses.dataclass(frozen=True)
class MeanIoU:
    """IoU of some classes, all values in percent.

    Attributes:
      class_indices: the classes, in the order of the other fields.
      per_class: official IoU of each class: 100 for a class that never occurs as a target, even if predicted.
      official_mean: mean of `per_class`; the number that the official evaluation prints.
      present: which classes occur as a target.
      present_mean: mean over the present classes alone; NaN where there is none.
    """

    class_indices: tuple[int, ...]
    per_class: tuple[float, ...]
    official_mean: float
    present: tuple[bool, ...]
    present_mean: float


def mean_iou(
    confusion: Integer[np.ndarray, "classes classes"] | Integer[Array, "classes classes"],
    class_indices: Sequence[int],
    ignore_label: int | None = None,
) -> MeanIoU:
    """Official `MeanIoU` (`utils/metric_util.py`) from a confusion matrix over all labels.

    Args:
      confusion: summed over the evaluation, indexed by label itself. Rows of labels that are not listed count
        as wrong predictions where a listed class was predicted, as official; ignored targets are in no row.
      class_indices: the classes to report. The official arguments `extra_classes` and `extra_classes_pred`
        only size a plot and change no number.
      ignore_label: a target label whose row is left out here (the official `MeanIoU` takes one label). None, or a
        label without a row: nothing is left out.

    Raises:
      ValueError: a class index lies outside the matrix.
    """
    classes = np.asarray(class_indices, np.int64)
    confusion = np.array(confusion, np.int64)
    if ignore_label is not None and ignore_label < len(confusion):
        confusion[ignore_label] = 0
    if classes.size == 0 or classes.min() < 0 or classes.max() >= len(confusion):
        raise ValueError(f"mean_iou: classes {list(class_indices)} do not fit a matrix of {len(confusion)} labels")
    correct = np.diagonal(confusion)[classes]
    seen, positive = confusion.sum(1)[classes], confusion.sum(0)[classes]
    present = seen > 0
    iou = np.where(present, 100.0 * correct / np.where(present, seen + positive - correct, 1), 100.0)
    return MeanIoU(
        class_indices=tuple(classes.tolist()),
        per_class=tuple(iou.tolist()),
        official_mean=float(iou.mean()),
        present=tuple(present.tolist()),
        present_mean=float(iou[present].mean()) if present.any() else float("nan"),
    )


@dataclasses.dataclass(frozen=True)
class SegmentationScores:
    """Scores of a semantic segmentation, in 0..1.

    Attributes:
      per_class: IoU; NaN for a class that is neither a target nor predicted, 0 for one that is only predicted.
      mean_iou: over the classes that are not NaN; NaN where there is none.
      per_class_accuracy: share of a class's points that are found; NaN where it has none.
      mean_accuracy: over the classes that are not NaN.
      accuracy: share of all points; NaN where there is none.
    """

    per_class: Float[np.ndarray, " classes"]
    mean_iou: float
    per_class_accuracy: Float[np.ndarray, " classes"]
    mean_accuracy: float
    accuracy: float


def segmentation_scores(
    confusion: Integer[np.ndarray, "classes classes"] | Integer[Array, "classes classes"],
) -> SegmentationScores:
    """Scores from counts; rows are targets, columns predictions (official `utils/metrics.py` of ScaLR).

    Args:
      confusion: summed over the whole evaluation: the mean over clouds of their IoU is another number.
    """
    counts = np.asarray(confusion).astype(np.int64)
    correct, targets, predictions = np.diagonal(counts), counts.sum(1), counts.sum(0)

    def quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        return np.where(denominator > 0, numerator / np.maximum(denominator, 1), np.nan)

    def mean(values: np.ndarray) -> float:
        known = values[~np.isnan(values)]
        return float(known.mean()) if known.size else float("nan")

    iou, accuracy = quotient(correct, targets + predictions - correct), quotient(correct, targets)
    return SegmentationScores(
        per_class=iou,
        mean_iou=mean(iou),
        per_class_accuracy=accuracy,
        mean_accuracy=mean(accuracy),
        accuracy=float(correct.sum() / targets.sum()) if targets.any() else float("nan"),
    )


def occupancy_iou(confusion: Integer[np.ndarray, "2 2"] | Integer[Array, "2 2"]) -> float:
    """IoU of the occupied class, in 0..1, from counts of free (0) and occupied (1).

    NaN where nothing is occupied in targets and predictions alike.
    """
    counts = np.asarray(confusion).astype(np.int64)
    union = counts[1, 1] + counts[0, 1] + counts[1, 0]
    return float(counts[1, 1] / union) if union else float("nan")


def prompt_logits(
    features: Float[Array, "*points feature"],
    text_features: Float[Array, "prompts feature"],
    normalise: bool = False,
) -> Float32[Array, "*points prompts"]:
    """Dot products of features and prompts (as the official evaluation); with `normalise`, cosines.

    Computed in full float32 on every device: reduced precision would change labels of close classes.
    """
    features, text_features = features.astype(jnp.float32), text_features.astype(jnp.float32)
    if normalise:
        features, text_features = (
            array / jnp.maximum(jnp.linalg.norm(array, axis=-1, keepdims=True), 1e-12)
            for array in (features, text_features)
        )
    return jnp.einsum("...f,pf->...p", features, text_features, precision=jax.lax.Precision.HIGHEST)


def assign_classes(
    features: Float[Array, "*points feature"],
    text_features: Float[Array, "prompts feature"],
    prompt_to_class: Integer[Array, " prompts"] | None = None,
    normalise: bool = False,
    dropped_class: int = UNLABELLED,
) -> Int32[Array, "*points"]:
    """Zero-shot class of each point or voxel: that of its best prompt (official `assign_clip_labels`).

    Args:
      prompt_to_class: class of each prompt; prompts of `dropped_class` take no part. None: every prompt is a
        class of its own, numbered from 1.
      normalise: compare by cosine instead of the raw product.

    Returns:
      Class labels; ties go to the first prompt.
    """
    logits = prompt_logits(features, text_features, normalise)
    if prompt_to_class is None:
        return jnp.argmax(logits, -1).astype(jnp.int32) + 1
    best = jnp.argmax(jnp.where(prompt_to_class == dropped_class, -jnp.inf, logits), -1)
    return prompt_to_class.astype(jnp.int32)[best]


def class_logits(
    logits: Float[Array, "*points prompts"],
    prompt_to_class: Integer[Array, " prompts"],
    num_classes: int,
    *,
    official: bool = False,
) -> Float[Array, "*points classes"]:
    """Largest logit among the prompts of each class 0 .. num_classes - 1; minus infinity where none.

    The order of the prompts does not matter. The official helper (`max_logits_per_class`) takes it for granted
    that prompts are sorted by class: it counts the prompts of every class and hands them out in that order.

    Args:
      official: repeat that flaw. It changes numbers only where prompts are not sorted by class, and never the
        assigned labels. Leave out the prompts of the dropped class beforehand, as the official code does.
    """
    if official:
        prompt_to_class = jnp.sort(prompt_to_class)
    prompts_first = jnp.moveaxis(logits, -1, 0)
    largest = jax.ops.segment_max(prompts_first, prompt_to_class.astype(jnp.int32), num_segments=num_classes)
    return jnp.moveaxis(largest, 0, -1)


def average_precision(
    scores: Float[np.ndarray, " points"],
    targets: Bool[np.ndarray, " points"] | Integer[np.ndarray, " points"],
) -> float:
    """Area under the precision-recall steps: sum over distinct scores of precision times the gain in recall.

    The definition of scikit-learn's `average_precision_score`, which the retrieval benchmark uses; equal
    scores enter together.

    Args:
      scores: higher is better.
      targets: 1 where the point matches the query.

    Raises:
      ValueError: no positive target, where recall is undefined (scikit-learn warns and gives 0), or a score
        is NaN.
    """
    targets = targets.astype(bool)
    if not targets.any():
        raise ValueError("average_precision: no point matches the query; leave such a frame out of the mean")
    if np.isnan(scores).any():
        raise ValueError("average_precision: a score is NaN")
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
    found = np.cumsum(targets[order], dtype=np.int64)[last]
    gain = np.diff(found, prepend=0) / found[-1]
    return float(np.sum(gain * found / (last + 1)))


@dataclasses.dataclass(frozen=True)
class ConstantGrid:
    """The best prediction that never looks at an image.

    Attributes:
      occupied: the grid, the same for every frame.
      threshold: voxels with a mean occupancy of at least this are occupied.
      iou: its occupancy IoU on the counts it was chosen by, in 0..1.
    """

    occupied: Bool[np.ndarray, "x y z"]
    threshold: float
    iou: float


def best_constant_grid(
    mean_occupancy: Float[np.ndarray, "x y z"],
    occupied_count: Num[np.ndarray, "x y z"],
    observed_count: Num[np.ndarray, "x y z"],
) -> ConstantGrid:
    """Baseline: the training set's mean occupancy, thresholded where its IoU is best.

    Args:
      mean_occupancy: share of the training frames in which each voxel is occupied (0 where it was never
        observed).
      occupied_count: frames of the judging set with the voxel occupied. Counts of the held-out frames make
        the baseline as strong as it can be; those of the training frames make it an honest predictor.
      observed_count: frames of the judging set with the voxel's target not ignored.

    Returns:
      The best of all thresholds, found exactly: only the distinct values of the mean can matter.

    Raises:
      ValueError: a mean is NaN, or no voxel is occupied in the judging set.
    """
    if np.isnan(mean_occupancy).any():
        raise ValueError("best_constant_grid: mean_occupancy has NaN; use 0 for voxels that were never observed")
    occupied_count, observed_count = occupied_count.astype(np.float64), observed_count.astype(np.float64)
    total = occupied_count.sum()
    if total <= 0:
        raise ValueError("best_constant_grid: no voxel is occupied in the judging set")
    order = np.argsort(-mean_occupancy, axis=None, kind="stable")
    falling = mean_occupancy.reshape(-1)[order]
    last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
    intersection = np.cumsum(occupied_count.reshape(-1)[order])[last]
    union = np.cumsum((observed_count - occupied_count).reshape(-1)[order])[last] + total
    iou = intersection / union
    best = int(np.argmax(iou))
    threshold = falling[last[best]]
    return ConstantGrid(mean_occupancy >= threshold, float(threshold), float(iou[best]))

"""RayIoU (SparseOcc, Liu et al. 2024): IoU over lidar-like rays instead of voxels.

A ray counts if it hits something in the ground truth; rays that are free there are dropped, whatever the prediction
says. It is right if what it hits in the prediction has the same class and its far side is less than a threshold nearer
or farther. No mask is used. `rays.py` casts, `origins.py` finds the places to cast from.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, UInt8

from pop3d_jax.occ3d.counts import NUM_LABELS, check_predicted, intersection_over_union, mean_of_defined
from pop3d_jax.occ3d.grid import FREE
from pop3d_jax.occ3d.rays import cast_rays, ray_directions
from pop3d_jax.voxels import Volume

# Labels and distances of what rays hit.
CastRays = tuple[UInt8[np.ndarray, "origins rays"], Float32[np.ndarray, "origins rays"]]
# RayIoU's, metres.
THRESHOLDS = (1.0, 2.0, 4.0)


@dataclasses.dataclass(frozen=True)
class RayCounts:
    """Rays that hit something in the ground truth, by label; counts of frames may be added.

    Attributes:
      thresholds: metres.
      ground_truth: rays that hit each label in the ground truth. A ray that hits a label outside 0 to 17 is in none.
      predicted: what the same rays hit in the prediction, free included. Their sum is the number of counted rays.
      true_positive: rays of the same label in both, their distances less than the threshold apart.
    """

    thresholds: tuple[float, ...]
    ground_truth: Int64[np.ndarray, "18"]
    predicted: Int64[np.ndarray, "18"]
    true_positive: Int64[np.ndarray, "thresholds 18"]

    def __add__(self, other: "RayCounts") -> "RayCounts":
        """Counts of both; ValueError where their thresholds differ."""
        if self.thresholds != other.thresholds:
            raise ValueError(f"ray counts at thresholds {self.thresholds} and {other.thresholds} do not add up")
        return RayCounts(
            self.thresholds,
            self.ground_truth + other.ground_truth,
            self.predicted + other.predicted,
            self.true_positive + other.true_positive,
        )


@dataclasses.dataclass(frozen=True)
class RayScores:
    """RayIoU, in 0..1.

    Attributes:
      ray_iou: mean over all defined entries of `per_class`.
      per_threshold: mean over the defined classes at each threshold.
      per_class: IoU of classes 0 to 16 at each threshold; NaN for a class that no counted ray hits on either side, 0
        for one that is only predicted.
    """

    ray_iou: float
    per_threshold: tuple[float, ...]
    per_class: Float64[np.ndarray, "thresholds 17"]


def count_rays(
    semantics: UInt8[np.ndarray, "x y z"],
    predicted: UInt8[np.ndarray, "..."],
    origins: Float[np.ndarray, "origins 3"],
    volume: Volume,
    directions: Float32[np.ndarray, "rays 3"] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    true_rays: CastRays | None = None,
) -> RayCounts:
    """Casts rays through ground truth and prediction of one key frame and counts them.

    Args:
      semantics: ground truth; anything but 17 stops a ray.
      predicted: labels 0 to 17, of the same shape.
      origins: metres, in the frame of the volume (Occ3D: ego); see `lidar_origins`.
      volume: where the grids lie.
      directions: from every origin; None takes `ray_directions()`.
      thresholds: metres.
      true_rays: what `cast_rays` says of the ground truth, where that is known: it is the same for every prediction.

    Raises:
      ValueError: the shapes differ, a prediction is outside 0 to 17, or what `cast_rays` refuses.
    """
    if predicted.shape != semantics.shape:
        raise ValueError(f"count_rays: ground truth of shape {semantics.shape}, prediction {predicted.shape}")
    check_predicted(predicted)
    directions = ray_directions() if directions is None else directions
    true_rays = true_rays or cast_rays(semantics, origins, directions, volume)
    return count_cast_rays(*true_rays, *cast_rays(predicted, origins, directions, volume), thresholds)


def count_cast_rays(
    true_labels: UInt8[np.ndarray, "*rays"],
    true_distances: Float32[np.ndarray, "*rays"],
    labels: UInt8[np.ndarray, "*rays"],
    distances: Float32[np.ndarray, "*rays"],
    thresholds: Sequence[float] = THRESHOLDS,
) -> RayCounts:
    """Counts rays that were cast through ground truth and prediction."""
    counted = true_labels != FREE
    true_labels, labels = true_labels[counted], labels[counted]
    same = true_labels == labels
    # In float32, as official.
    apart = np.abs(distances[counted] - true_distances[counted])

    def histogram(labels):
        return np.bincount(labels[labels < NUM_LABELS], minlength=NUM_LABELS)

    right = [histogram(labels[same & (apart < np.float32(threshold))]) for threshold in thresholds]
    return RayCounts(tuple(thresholds), histogram(true_labels), histogram(labels), np.stack(right))


def ray_iou(counts: RayCounts) -> RayScores:
    """RayIoU from counts over all frames."""
    truth, predicted = np.broadcast_arrays(counts.ground_truth, counts.predicted, counts.true_positive)[:2]
    per_class = intersection_over_union(counts.true_positive, truth, predicted)[:, :FREE]
    return RayScores(mean_of_defined(per_class), tuple(map(mean_of_defined, per_class)), per_class)

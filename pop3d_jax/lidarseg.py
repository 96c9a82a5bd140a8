"""The lidarseg evaluation of the nuScenes devkit, and the layout of a submission to it.

The devkit differs from the official POP-3D evaluation in what it does with classes that do not occur: one that is
neither a target nor predicted is left out of the mean, one that is only predicted scores 0 (`LidarsegEval`,
`ConfusionMatrix` of nuscenes-devkit).
"""

import dataclasses
import json

import numpy as np
from etils import epath
from jaxtyping import Float, Int, Integer, UInt8

from pop3d_jax.metrics import segmentation_scores
from pop3d_jax.nuscenes import CLASS_NAMES, EMPTY, UNLABELLED

# The classes of the challenge: 0 is ignored, 1..16 are scored.
CLASSES = CLASS_NAMES[:EMPTY]

# What the network was made from and what it reads. The images decide; the sweep is asked for the positions at which
# labels are read. The teacher's image-text pairs are external data.
SUBMISSION_META = {
    "use_camera": True,
    "use_lidar": True,
    "use_radar": False,
    "use_map": False,
    "use_external": True,
}


class LidarsegError(ValueError):
    """Predictions that the devkit would refuse; the message names the sweep and the way out."""


@dataclasses.dataclass(frozen=True)
class LidarsegScores:
    """What the devkit reports, in 0..1.

    Attributes:
      per_class: IoU of each class 0..16; NaN for class 0 and for classes that neither occur nor are predicted.
      mean_iou: over the classes that are not NaN.
      frequency_weighted_iou: IoU weighted by the share of points of each class.
    """

    per_class: Float[np.ndarray, "17"]
    mean_iou: float
    frequency_weighted_iou: float


def devkit_scores(confusion: Integer[np.ndarray, "17 17"]) -> LidarsegScores:
    """Scores from counts; rows are targets, columns predictions.

    Args:
      confusion: summed over all sweeps. The row of class 0 is left out: such points count nowhere, not even as
        false positives; a prediction of 0 is an error of its target's class.

    Returns:
      NaN means where no point has a class.
    """
    counts: Int[np.ndarray, "17 17"] = confusion.astype(np.int64)
    counts[UNLABELLED] = 0
    iou = segmentation_scores(counts).per_class
    iou[UNLABELLED] = np.nan
    scored, targets = ~np.isnan(iou), counts.sum(1)
    if not targets.any():
        return LidarsegScores(iou, float("nan"), float("nan"))
    share = targets / targets.sum()
    return LidarsegScores(iou, float(iou[scored].mean()), float((share * iou)[scored].sum()))


def write_submission_meta(folder: epath.PathLike, split: str, meta: dict[str, bool] | None = None) -> epath.Path:
    """Writes FOLDER/SPLIT/submission.json and returns its path.

    Args:
      folder: the submission; what the devkit calls the results folder, to be zipped with its two subfolders.
      split: as the devkit names it, such as "test".
      meta: what the method reads; `SUBMISSION_META` by default.
    """
    path = epath.Path(folder) / split / "submission.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": SUBMISSION_META if meta is None else meta}))
    return path


def write_sweep(
    folder: epath.PathLike, split: str, lidar_token: str, classes: UInt8[np.ndarray, " points"], points: int
) -> epath.Path:
    """Writes the predicted classes of one sweep, FOLDER/lidarseg/SPLIT/LIDAR_TOKEN_lidarseg.bin: one byte a point.

    Args:
      folder, split: as `write_submission_meta`.
      lidar_token: the sweep's sample_data token.
      classes: one for each point of the sweep, in its order.
      points: how many points the sweep has.

    Returns:
      The path.

    Raises:
      LidarsegError: another number of points, or a class outside 1..16.
    """
    if len(classes) != points:
        raise LidarsegError(
            f"sweep {lidar_token} has {points} points and {len(classes)} predictions: a submission needs one for each"
        )
    wrong = classes[(classes == UNLABELLED) | (classes >= EMPTY)]
    if len(wrong):
        raise LidarsegError(
            f"sweep {lidar_token}: class {int(wrong[0])} is predicted for {len(wrong)} points; the devkit takes 1..16"
        )
    path = epath.Path(folder) / "lidarseg" / split / f"{lidar_token}_lidarseg.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(classes.tobytes())
    return path

"""How often each true label was predicted as each label: what every rule of `rules.py` reads its scores from."""

import numpy as np
from jaxtyping import Bool, Float64, Int64, Integer

from pop3d_jax.occ3d.grid import FREE

# Labels are 0 to 17.
NUM_LABELS = FREE + 1
# The row of ground truth outside 0 to 17, such as 255: some rules take it for occupied, others leave it out.
UNLABELLED_ROW = NUM_LABELS


def confusion_of(
    semantics: Integer[np.ndarray, "..."], predicted: Integer[np.ndarray, "..."], mask: Bool[np.ndarray, "..."]
) -> Int64[np.ndarray, "19 18"]:
    """Counts the pairs of true and predicted labels; counts of frames may be added.

    Args:
      semantics: ground truth, one frame or several.
      predicted: labels 0 to 17, of the same shape.
      mask: voxels to count, of the same shape.

    Returns:
      Rows are ground truth, 0 to 17 and then anything outside; columns are predictions.

    Raises:
      ValueError: the shapes differ, or a prediction is outside 0 to 17, in the mask or not.
    """
    if not semantics.shape == predicted.shape == mask.shape:
        raise ValueError(
            f"confusion_of: ground truth of shape {semantics.shape}, prediction {predicted.shape}, mask {mask.shape}"
        )
    check_predicted(predicted)
    truth = semantics[mask].astype(np.int64)
    truth[(truth < 0) | (truth >= NUM_LABELS)] = UNLABELLED_ROW
    pairs = truth * NUM_LABELS + predicted[mask]
    return np.bincount(pairs, minlength=(NUM_LABELS + 1) * NUM_LABELS).reshape(NUM_LABELS + 1, NUM_LABELS)


def check_predicted(predicted: Integer[np.ndarray, "..."]) -> None:
    """Refuses predictions outside 0 to 17, which no rule has a place for; ValueError names the labels."""
    wrong = predicted[(predicted < 0) | (predicted >= NUM_LABELS)]
    if wrong.size:
        labels = ", ".join(map(str, np.unique(wrong)[:5]))
        raise ValueError(f"{wrong.size} predicted voxels have a label outside 0 to {FREE}: {labels}")


def intersection_over_union(
    both: Integer[np.ndarray, "*shape"],
    ground_truth: Integer[np.ndarray, "*shape"],
    predicted: Integer[np.ndarray, "*shape"],
    epsilon: float = 0.0,
) -> Float64[np.ndarray, "*shape"]:
    """IoU from counts; NaN where there is neither ground truth nor prediction and no epsilon.

    Args:
      epsilon: added to the union.
    """
    union = ground_truth + predicted - both + epsilon
    return np.divide(both, union, out=np.full(union.shape, np.nan), where=union > 0)


def mean_of_defined(values: Float64[np.ndarray, "..."]) -> float:
    """Mean over what is not NaN; NaN where nothing is left."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")

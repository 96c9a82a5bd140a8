"""What a result is worth: predictors that know nothing of the images, or nothing of the words."""

import jax
import numpy as np
from jaxtyping import Int

from pop3d_jax.data.pipeline import ExampleSettings, evaluation_batches
from pop3d_jax.data.records import RecordSource
from pop3d_jax.evaluator import SEMANTIC_CLASSES
from pop3d_jax.labels import evaluation_labels
from pop3d_jax.metrics import best_constant_grid, mean_iou
from pop3d_jax.nuscenes import IGNORE
from pop3d_jax.progress import progress
from pop3d_jax.voxels import Volume

_BATCH = 4


def _occupancy_counts(
    source: RecordSource, settings: ExampleSettings, volume: Volume, description: str
) -> tuple[np.ndarray, np.ndarray]:
    """Frames in which each voxel is occupied, and in which it is observed."""
    targets = jax.jit(
        jax.vmap(lambda points, labels, mask: evaluation_labels(points, labels, mask, volume)["occupancy_eval"])
    )
    occupied = np.zeros(volume.grid_size)
    observed = np.zeros(volume.grid_size)
    batches = evaluation_batches(source, settings, batch_size=_BATCH)
    for batch in progress(batches, -(-len(source) // _BATCH), description):
        grids = np.asarray(targets(batch["points"], batch["point_labels"], batch["point_mask"]))[batch["valid"]]
        occupied += (grids == 1).sum(0)
        observed += (grids != IGNORE).sum(0)
    return occupied, observed


def constant_grid_iou(train: RecordSource, held_out: RecordSource, settings: ExampleSettings, volume: Volume) -> float:
    """Occupancy IoU (0..1) on held-out frames of the best grid that is the same for every frame.

    The training set's mean occupancy is formed in both sensible ways, over all frames and over those in which the
    voxel was observed, and thresholded where it does best on the held-out frames themselves: no constant predictor
    made from it can do better.
    """
    occupied, observed = _occupancy_counts(train, settings, volume, "mean occupancy of the training set")
    judged_occupied, judged_observed = _occupancy_counts(held_out, settings, volume, "held-out occupancy")
    means = (
        occupied / len(train),
        np.divide(occupied, observed, out=np.zeros_like(occupied), where=observed > 0),
    )
    return max(best_constant_grid(mean, judged_occupied, judged_observed).iou for mean in means)


def shuffled_prompts_miou(confusion: Int[np.ndarray, "18 18"], shuffles: int, seed: int = 0) -> list[float]:
    """Mean IoU in percent over the present classes when the words of the classes are shuffled among each other.

    Only classes that occur are shuffled, so that no shuffle loses points to classes nobody could score. Relabelling
    predictions is the same as permuting the columns of the confusion matrix.

    Args:
      confusion: at occupied voxels, rows targets, columns predictions.
      shuffles: how many permutations; none of them leaves every class in its place.
      seed: of the permutations.
    """
    present = np.array([index for index in SEMANTIC_CLASSES if confusion[index].sum() > 0])
    if len(present) < 2:
        raise ValueError(f"only {len(present)} classes occur: their words cannot be shuffled")
    rng = np.random.default_rng(seed)
    scores = []
    while len(scores) < shuffles:
        order = rng.permutation(len(present))
        if (order == np.arange(len(present))).all():
            continue
        shuffled = confusion.copy()
        shuffled[:, present] = confusion[:, present[order]]
        scores.append(mean_iou(shuffled, SEMANTIC_CLASSES).present_mean)
    return scores

"""What a result is worth: predictors that know nothing of the images, or nothing of the words."""

import jax
import numpy as np
from jaxtyping import Int

from pop3d_jax.data.pipeline import ExampleSettings, evaluation_batches
from pop3d_jax.data.records import RecordSource
from pop3d_jax.evaluator import SEMANTIC_CLASSES
from pop3d_jax.labels import evaluation_labels, occupancy_tpvformer
from pop3d_jax.metrics import best_constant_grid, mean_iou
from pop3d_jax.nuscenes import IGNORE
from pop3d_jax.progress import progress
from pop3d_jax.voxels import Volume

_BATCH = 4


def _occupancy_counts(
    source: RecordSource, settings: ExampleSettings, volume: Volume, description: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each kind of target: frames in which a voxel is occupied, and in which it counts."""

    def targets(points: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        observed = evaluation_labels(points, labels, mask, volume)["occupancy_eval"]
        return {"observed": observed, "all": occupancy_tpvformer(points, mask, volume)}

    compiled = jax.jit(jax.vmap(targets))
    counts = {kind: (np.zeros(volume.grid_size), np.zeros(volume.grid_size)) for kind in ("observed", "all")}
    batches = evaluation_batches(source, settings, batch_size=_BATCH)
    for batch in progress(batches, -(-len(source) // _BATCH), description):
        for kind, grids in compiled(batch["points"], batch["point_labels"], batch["point_mask"]).items():
            valid = np.asarray(grids)[batch["valid"]]
            counts[kind][0][...] += (valid == 1).sum(0)
            counts[kind][1][...] += (valid != IGNORE).sum(0)
    return counts


def constant_grid_iou(
    train: RecordSource, held_out: RecordSource, settings: ExampleSettings, volume: Volume
) -> dict[str, float]:
    """Occupancy IoU (0..1) on held-out frames of the best grid that is the same for every frame.

    The training set's mean occupancy is formed in both sensible ways, over all frames and over those in which the
    voxel counts, and thresholded where it does best on the held-out frames themselves: no constant predictor made
    from it can do better.

    Returns:
      "observed": judged on observed voxels; "all": on all voxels, unobserved ones free.
    """
    learned = _occupancy_counts(train, settings, volume, "mean occupancy of the training set")
    judged = _occupancy_counts(held_out, settings, volume, "held-out occupancy")
    scores = {}
    for kind, (occupied, counted) in learned.items():
        means = (occupied / len(train), np.divide(occupied, counted, out=np.zeros_like(occupied), where=counted > 0))
        scores[kind] = max(best_constant_grid(mean, *judged[kind]).iou for mean in means)
    return scores


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

"""The losses of POP-3D and ScaLR: cross entropy and Lovász-softmax of classes, errors and distances of features.

Labels that are ignored, and points of padding, are masked, so shapes are static. Where the official functions
give NaN or an empty tensor because nothing is left to average (all voxels ignored, no valid point), these
give 0 with zero gradients: a sample without labels then trains nothing rather than destroying the parameters.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from pop3d_jax.nuscenes import IGNORE


def _divide_or_zero(numerator: Float[Array, ""], denominator: Float[Array, ""]) -> Float[Array, ""]:
    """The quotient, or 0 without gradient where the denominator is 0."""
    empty = denominator == 0
    return jnp.where(empty, 0.0, numerator / jnp.where(empty, 1.0, denominator))


def cross_entropy(
    logits: Float[Array, "*voxels classes"],
    labels: Integer[Array, "*voxels"],
    class_weights: Float[Array, " classes"] | None = None,
    ignore_label: int = IGNORE,
) -> Float[Array, ""]:
    """Cross entropy as `torch.nn.CrossEntropyLoss(weight, ignore_index)` defines it.

    Args:
      logits: unnormalised scores.
      labels: class of each voxel, or `ignore_label`.
      class_weights: a weight for each class; the mean is then weighted: sum of weight * loss over sum of
        weights.

    Returns:
      The mean over all voxels that are not ignored (of the whole batch together); 0 where there is none.
    """
    valid = labels != ignore_label
    classes = jnp.where(valid, labels, 0).astype(jnp.int32)
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    losses = -jnp.take_along_axis(log_probabilities, classes[..., None], -1)[..., 0]
    weights = valid.astype(jnp.float32)
    if class_weights is not None:
        weights = weights * class_weights.astype(jnp.float32)[classes]
    return _divide_or_zero(jnp.sum(weights * losses), jnp.sum(weights))


def _lovasz_weights(
    errors: Float[Array, " voxels"], foreground: Bool[Array, " voxels"], valid: Bool[Array, " voxels"]
) -> Float[Array, " voxels"]:
    """Derivative of one class's Lovász extension by the errors (Algorithm 1 of Berman et al., CVPR 2018).

    With voxels sorted by falling error, the weight is the growth of the Jaccard loss when the voxel joins
    those predicted wrongly. A foreground voxel takes one from the intersection: 1 / union. A background voxel
    adds one to the union: intersection / (union * (union - 1)). These closed forms replace the official
    difference of two neighbouring values near one, which cancels in float32.
    """
    # Ignored voxels sort to the end, behind errors that are never negative, and then weigh nothing.
    key = jnp.where(valid, -errors, jnp.inf)
    place = jnp.arange(errors.shape[0], dtype=jnp.int32)
    _, foreground_sorted, order = jax.lax.sort((key, foreground & valid, place), num_keys=1, is_stable=False)
    total = jnp.sum(foreground_sorted, dtype=jnp.int32)
    joined = jnp.cumsum(foreground_sorted, dtype=jnp.int32)
    union = jnp.maximum(total + place + 1 - joined, 1).astype(jnp.float32)
    intersection = (total - joined).astype(jnp.float32)
    # A background voxel's union counts itself and the foreground, so it is at least two where a foreground
    # exists.
    grown = intersection / (union * jnp.maximum(union - 1.0, 1.0))
    weights = jnp.where(foreground_sorted, 1.0 / union, grown)
    return jnp.where(valid, jnp.zeros_like(errors).at[order].set(weights, unique_indices=True), 0.0)


def lovasz_softmax(
    probabilities: Float[Array, "*voxels classes"],
    labels: Integer[Array, "*voxels"],
    ignore_label: int = IGNORE,
) -> Float[Array, ""]:
    """Lovász-softmax loss over the classes present in the labels (official `lovasz_losses.lovasz_softmax`).

    As official (`per_image=False`), all leading axes are flattened together: a batch is one large image. Call
    it under `jax.vmap` for one loss per sample. Equal errors are sorted in no particular order: the value
    does not depend on it, the gradient is one of the valid subgradients. A single valid voxel works
    (official: fails).

    Args:
      probabilities: softmax output.
      labels: class of each voxel, or `ignore_label`.

    Returns:
      Mean over the present classes; 0 where every voxel is ignored.
    """
    num_classes = probabilities.shape[-1]
    flat_labels = labels.reshape(-1)
    valid = flat_labels != ignore_label
    foreground = flat_labels == jnp.arange(num_classes, dtype=flat_labels.dtype)[:, None]
    foreground = foreground & valid
    errors = jnp.abs(foreground - probabilities.reshape(-1, num_classes).T.astype(jnp.float32))
    weights = jax.vmap(_lovasz_weights, in_axes=(0, 0, None))(jax.lax.stop_gradient(errors), foreground, valid)
    # The sum of weight * error is the Lovász extension itself, and its gradient by the errors is the weights.
    losses = jnp.sum(jax.lax.stop_gradient(weights) * errors, -1)
    present = jnp.any(foreground, -1)
    return _divide_or_zero(jnp.sum(jnp.where(present, losses, 0.0)), jnp.sum(present).astype(jnp.float32))


def feature_loss(
    prediction: Float[Array, "*points feature"],
    target: Float[Array, "*points feature"],
    mask: Bool[Array, "*points"],
) -> Float[Array, ""]:
    """Mean squared error over all elements of the valid points (`torch.nn.MSELoss`); nothing is normalised.

    Returns:
      The mean; 0 where no point is valid. Whatever stands at masked points (NaN too) has no influence.
    """
    difference = jnp.where(mask[..., None], prediction.astype(jnp.float32) - target.astype(jnp.float32), 0.0)
    count = jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32) * prediction.shape[-1]
    return _divide_or_zero(jnp.sum(difference**2), count)


def _unit(features: Float[Array, "*points feature"]) -> Float[Array, "*points feature"]:
    """Features of length one; zero vectors stay zero, and their gradients stay bounded."""
    square = jnp.sum(features**2, -1, keepdims=True)
    return features * jax.lax.rsqrt(jnp.where(square == 0, 1.0, square))


def distillation_loss(
    student: Float[Array, "*points feature"],
    teacher: Float[Array, "*points feature"],
    mask: Bool[Array, "*points"],
) -> Float[Array, ""]:
    """Mean distance of normalised features (official `utils/distiller.py` of ScaLR): its norm, not its square.

    Unrelated features of many channels are about sqrt(2) apart, opposite ones 2. Where both are equal the gradient is
    zero, as torch's norm has it.

    Args:
      student, teacher: features of paired points; lengths have no influence.
      mask: which pairs there are.

    Returns:
      The mean over all pairs of the batch together; 0 where there is none. Whatever stands at masked points (NaN too)
      has no influence.
    """
    student, teacher = (
        _unit(jnp.where(mask[..., None], features.astype(jnp.float32), 0.0)) for features in (student, teacher)
    )
    square = jnp.sum((student - teacher) ** 2, -1)
    # The root's slope at zero is infinite: it must not be reached, not even to be thrown away.
    equal = square == 0
    distance = jnp.where(equal, 0.0, jnp.sqrt(jnp.where(equal, 1.0, square)))
    return _divide_or_zero(jnp.sum(distance), jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32))


def segmentation_loss(
    logits: Float[Array, "*points classes"],
    labels: Integer[Array, "*points"],
    *,
    lovasz_weight: float = 1.0,
    ignore_label: int = IGNORE,
) -> dict[str, Float[Array, ""]]:
    """The objective of ScaLR's probing and fine-tuning (official `SemSegLoss`): cross entropy + Lovász-softmax.

    The batch is one large cloud, as official: the present classes of all its points together.

    Args:
      logits: unnormalised scores.
      labels: class of each point, or `ignore_label`, padding included.

    Returns:
      Unweighted terms `cross_entropy` and `lovasz`, and `total`, their weighted sum. All are 0 without gradient where
      every point is ignored (official: NaN).
    """
    entropy = cross_entropy(logits, labels, None, ignore_label)
    lovasz = lovasz_softmax(jax.nn.softmax(logits.astype(jnp.float32)), labels, ignore_label)
    return {"cross_entropy": entropy, "lovasz": lovasz, "total": entropy + lovasz_weight * lovasz}


def pop3d_loss(
    occupancy_logits: Float[Array, "batch x y z classes"],
    occupancy_target: Integer[Array, "batch x y z"],
    point_features: Float[Array, "batch points feature"] | None = None,
    feature_target: Float[Array, "batch points feature"] | None = None,
    feature_mask: Bool[Array, "batch points"] | None = None,
    *,
    class_weights: Float[Array, " classes"] | None = None,
    cross_entropy_weight: float = 1.0,
    lovasz_weight: float = 1.0,
    feature_weight: float = 1.0,
    ignore_label: int = IGNORE,
    per_sample: bool = True,
) -> dict[str, Float[Array, ""]]:
    """The training objective of POP-3D (official `train.py`): cross entropy + Lovász-softmax + feature error.

    Args:
      occupancy_logits: free, occupied.
      occupancy_target: 0, 1 or `ignore_label`, as `pop3d_jax.labels.occupancy_tpvformer` makes it.
      point_features: predicted features at points; None (all three arguments) leaves the feature term out.
      class_weights: of the cross entropy; None as in the released recipe.
      per_sample: True computes every term for each sample and averages over the batch, which is what the
        official run does (one sample per GPU, gradients averaged over GPUs) and needs no sort across devices.
        False flattens the batch into one, which is what the official functions do when they are handed a
        batch.

    Returns:
      Unweighted terms `cross_entropy`, `lovasz` and `feature`, and `total`, their weighted sum.
    """

    def terms(logits, target, prediction, features, mask):
        probabilities = jax.nn.softmax(logits.astype(jnp.float32))
        result = {
            "cross_entropy": cross_entropy(logits, target, class_weights, ignore_label),
            "lovasz": lovasz_softmax(probabilities, target, ignore_label),
        }
        if prediction is not None:
            result["feature"] = feature_loss(prediction, features, mask)
        return result

    arguments = (occupancy_logits, occupancy_target, point_features, feature_target, feature_mask)
    result = jax.tree.map(jnp.mean, jax.vmap(terms)(*arguments)) if per_sample else terms(*arguments)
    total = cross_entropy_weight * result["cross_entropy"] + lovasz_weight * result["lovasz"]
    return result | {"total": total + feature_weight * result.get("feature", 0.0)}

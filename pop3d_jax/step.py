"""One training step, as a plain function of (state, batch, teacher parameters).

Labels are made from the lidar points inside the step; the teacher runs inside it too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pop3d_jax.data.augment import draw_grid_mask, grid_mask
from pop3d_jax.images import draw_photometric, network_images
from pop3d_jax.labels import occupancy_tpvformer
from pop3d_jax.losses import pop3d_loss
from pop3d_jax.models.parameters import ArrayTree, merge_model
from pop3d_jax.optim import trainable_norm
from pop3d_jax.teacher import Teacher
from pop3d_jax.voxels import Volume, grid_coordinates

State = dict[str, Any]
Metrics = dict[str, jax.Array]


def initial_state(parameters: ArrayTree, statistics: ArrayTree, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step: what is donated to every step and what a checkpoint holds."""
    return {
        "parameters": parameters,
        "statistics": statistics,
        "optimizer": optimizer.init(parameters),
        "step": jnp.zeros((), jnp.int32),
    }


def updated_state(
    state: State, gradients: ArrayTree, statistics: ArrayTree, optimizer: optax.GradientTransformation, groups: Any
) -> tuple[State, Metrics]:
    """The state after one update, and the norms that every system logs.

    Args:
      state: before the step.
      gradients: of its parameters.
      statistics: after the step; those of the state where nothing updates them.
      optimizer, groups: from `make_optimizer`, `parameter_groups`; the norm leaves out what is frozen.
    """
    updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["parameters"])
    parameters = optax.apply_updates(state["parameters"], updates)
    new_state = {
        "parameters": parameters,
        "statistics": statistics,
        "optimizer": optimizer_state,
        "step": state["step"] + 1,
    }
    return new_state, {
        "gradient_norm": trainable_norm(gradients, groups),
        "parameter_norm": optax.tree.norm(parameters),
    }


def make_loss(graph: nnx.GraphDef, volume: Volume, weights: dict[str, Any]) -> Callable[..., tuple[jax.Array, Metrics]]:
    """The loss of one batch.

    Args:
      graph: structure of the student.
      volume: where the voxels are.
      weights: `cross_entropy`, `lovasz`, `feature`, and `class_weights` (free, occupied) or empty.

    Returns:
      A function (parameters, statistics, images, batch, feature_targets, dropout_key) -> (loss, its terms).
    """

    def loss(
        parameters: ArrayTree,
        statistics: ArrayTree,
        images: jax.Array,
        batch: dict[str, jax.Array],
        feature_targets: jax.Array,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        model = merge_model(graph, parameters, statistics)
        output = model(
            images,
            batch["lidar_to_image"],
            feature_points=grid_coordinates(batch["feature_points"], volume),
            voxel_features=False,
            dropout_key=dropout_key,
        )
        occupancy = jax.vmap(lambda points, mask: occupancy_tpvformer(points, mask, volume))(
            batch["points"], batch["point_mask"]
        )
        terms = pop3d_loss(
            output.occupancy_logits,
            occupancy,
            output.point_features,
            feature_targets,
            batch["feature_mask"],
            class_weights=jnp.asarray(weights["class_weights"]) if weights["class_weights"] else None,
            cross_entropy_weight=weights["cross_entropy"],
            lovasz_weight=weights["lovasz"],
            feature_weight=weights["feature"],
        )
        return terms["total"], terms

    return loss


def make_train_step(
    graph: nnx.GraphDef,
    volume: Volume,
    teacher: Teacher,
    optimizer: optax.GradientTransformation,
    groups: Any,
    *,
    loss_weights: dict[str, Any],
    photometric: bool,
    swap_channels: bool,
    use_grid_mask: bool,
    use_dropout: bool,
    seed: int,
) -> Callable[[State, dict[str, jax.Array], ArrayTree], tuple[State, Metrics]]:
    """The training step, to be jitted by the caller with the state donated.

    Args:
      graph: structure of the student.
      volume: where the voxels are.
      teacher: its structure; its parameters are an argument of the step.
      optimizer: from `make_optimizer`.
      groups: from `parameter_groups`; the norms leave out what is frozen.
      loss_weights: see `make_loss`.
      photometric: whether the student's images are distorted in brightness, contrast, saturation and hue, as official.
      swap_channels: whether that includes a random order of the colour channels, as official.
      use_grid_mask: GridMask on the student's images, as official in training.
      use_dropout: whether dropout is on.
      seed: all randomness of step n comes from (seed, n).

    Returns:
      (state, batch, teacher parameters) -> (new state, metrics: loss terms, gradient_norm, parameter_norm).
    """
    loss = make_loss(graph, volume, loss_weights)

    def train_step(state: State, batch: dict[str, jax.Array], teacher_parameters: ArrayTree) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        mask_key, dropout_key, colour_key = jax.random.split(key, 3)
        draw = None
        if photometric:
            # Every camera on its own, as official.
            draw = draw_photometric(colour_key, batch["images"].shape[:2], swap_channels=swap_channels)
        images = network_images(batch["images"], draw)
        if use_grid_mask:
            # One draw for the whole batch and all cameras, as official (where the batch is one key frame).
            height, width = images.shape[2:4]
            images = images * grid_mask(draw_grid_mask(mask_key, height), height, width)[:, :, None]
        if "feature_targets" in batch:  # from a cache
            targets = batch["feature_targets"].astype(jnp.float32)
        else:
            targets = jax.lax.stop_gradient(
                teacher.point_features(
                    teacher_parameters,
                    batch.get("teacher_images", batch["images"]),
                    batch["feature_cameras"],
                    batch["feature_pixels"],
                )
            )
        (_, terms), gradients = jax.value_and_grad(loss, has_aux=True)(
            state["parameters"],
            state["statistics"],
            images,
            batch,
            targets,
            dropout_key if use_dropout else None,
        )
        new_state, norms = updated_state(state, gradients, state["statistics"], optimizer, groups)
        return new_state, terms | norms

    return train_step

"""One training step of ScaLR, distillation or segmentation, as a plain function of (state, batch, constants)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pop3d_jax.data.neighbors import nearest_neighbors
from pop3d_jax.losses import distillation_loss, segmentation_loss
from pop3d_jax.models.parameters import ArrayTree, merge_model, split_model
from pop3d_jax.step import Metrics, State, updated_state
from pop3d_jax.teacher import Teacher

Batch = dict[str, jax.Array]
Step = Callable[[State, Batch, Any], tuple[State, Metrics]]


def network_input(batch: Batch, neighbors: int) -> tuple[jax.Array, ...]:
    """Arguments of the network: features, neighbours, cells, mask.

    Args:
      batch: of the pipeline; with `points` in place of `neighbors` they are searched here, on the device.
      neighbors: how many a point has, itself apart.
    """
    found = batch.get("neighbors")
    if found is None:
        found = nearest_neighbors(batch["points"], batch["point_mask"], neighbors, implementation="all_pairs")
    return batch["point_features"], found, batch["cells"], batch["point_mask"]


def make_distillation_step(
    graph: nnx.GraphDef,
    teacher: Teacher,
    optimizer: optax.GradientTransformation,
    groups: Any,
    *,
    neighbors: int,
    use_drop_path: bool,
    seed: int,
) -> Step:
    """A step towards the teacher's features (official `utils/distiller.py`), to be jitted with the state donated.

    Args:
      graph: structure of the student.
      teacher: its structure; its parameters are the step's third argument.
      optimizer, groups: from `make_optimizer`, `parameter_groups`.
      neighbors: of a point, for batches that bring none.
      use_drop_path: whether the student has any.
      seed: all randomness of step n comes from (seed, n).
    """

    def train_step(state: State, batch: Batch, teacher_parameters: ArrayTree) -> tuple[State, Metrics]:
        # Without drop-path the seed is no part of the program, so that all seeds share what was compiled.
        key = jax.random.fold_in(jax.random.key(seed), state["step"]) if use_drop_path else None
        targets = jax.lax.stop_gradient(
            teacher.point_features(
                teacher_parameters, batch["images"], batch["feature_cameras"], batch["feature_pixels"]
            )
        )

        def loss(parameters: ArrayTree) -> tuple[jax.Array, ArrayTree]:
            model = merge_model(graph, parameters, state["statistics"])
            features = model(*network_input(batch, neighbors), training=True, dropout_key=key)
            return distillation_loss(features, targets, batch["feature_mask"]), split_model(model)[2]

        (total, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(state["parameters"])
        new_state, norms = updated_state(state, gradients, statistics, optimizer, groups)
        return new_state, {"total": total, "paired_points": jnp.sum(batch["feature_mask"])} | norms

    return train_step


def make_segmentation_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    groups: Any,
    *,
    neighbors: int,
    lovasz_weight: float,
    train_backbone: bool,
    use_drop_path: bool,
    seed: int,
) -> Step:
    """A step of linear probing, fine-tuning or training with labels (official `utils/finetuner.py`).

    Args:
      lovasz_weight: of the Lovász term beside the cross entropy.
      train_backbone: False is probing: the backbone stays as in inference, the head trains.
      graph, optimizer, groups, neighbors, use_drop_path, seed: as `make_distillation_step`.
    """

    def train_step(state: State, batch: Batch, constants: ArrayTree) -> tuple[State, Metrics]:
        del constants
        # Without drop-path the seed is no part of the program, so that all seeds share what was compiled.
        key = jax.random.fold_in(jax.random.key(seed), state["step"]) if use_drop_path else None

        def loss(parameters: ArrayTree) -> tuple[jax.Array, tuple[Metrics, ArrayTree]]:
            model = merge_model(graph, parameters, state["statistics"])
            logits = model(
                *network_input(batch, neighbors),
                training=True,
                train_backbone=train_backbone,
                dropout_key=key,
            )
            terms = segmentation_loss(logits, batch["point_labels"], lovasz_weight=lovasz_weight)
            return terms["total"], (terms, split_model(model)[2])

        (_, (terms, statistics)), gradients = jax.value_and_grad(loss, has_aux=True)(state["parameters"])
        new_state, norms = updated_state(state, gradients, statistics, optimizer, groups)
        return new_state, terms | norms

    return train_step

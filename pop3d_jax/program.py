"""The jitted training program of an experiment, and everything it is made of but arrays.

`train` runs it; `compile_report` compiles it for machines that are not there.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax
from jax.sharding import Mesh

from pop3d_jax.experiment import make_student
from pop3d_jax.optim import make_optimizer, parameter_groups
from pop3d_jax.sharding import check_batch, replicated, state_shardings
from pop3d_jax.step import initial_state, make_train_step
from pop3d_jax.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class TrainingProgram:
    """A training step on a mesh.

    Attributes:
      student: structure of the network, a `Student` or, of ScaLR, a `LidarStudent`.
      optimizer: what makes updates of gradients.
      abstract_state: shapes of the training state.
      shardings: where the state's arrays live, a tree like the state.
      step: jitted (state, batch, teacher parameters) -> (state, metrics); the state is donated. To be called, or
        lowered, inside `jax.set_mesh(mesh)`.
    """

    student: Any
    optimizer: optax.GradientTransformation
    abstract_state: dict[str, Any]
    shardings: dict[str, Any]
    step: Callable[..., Any]


def number_of_steps(config: ml_collections.ConfigDict, key_frames: int) -> int:
    """Steps of the whole training: `total_steps`, or `epochs` of whole batches."""
    return config.total_steps or math.ceil(config.epochs * max(key_frames // config.batch_size, 1))


def training_program(
    config: ml_collections.ConfigDict, teacher: Teacher, total_steps: int, mesh: Mesh
) -> TrainingProgram:
    """Prepares the step; nothing is compiled and no array is made.

    Args:
      config: the experiment.
      teacher: loaded, or its shapes only.
      total_steps: length of the learning rate's schedule.
      mesh: devices, also ones that are not there.

    Raises:
      ValueError: teacher and student do not fit together, or batch and views do not divide over the mesh.
    """
    teacher.check_width(config.model.feature_dim, "config.model.feature_dim")
    student = make_student(config)
    check_batch(config.batch_size, student.config.num_cameras, mesh)
    groups = parameter_groups(student.abstract_parameters, student.is_frozen)
    optimizer = make_optimizer(config.optim, total_steps, groups)
    abstract_state = jax.eval_shape(
        lambda: initial_state(student.abstract_parameters, student.abstract_statistics, optimizer)
    )
    shardings = state_shardings(abstract_state, mesh, config.mesh.shard_optimizer)
    step = jax.jit(
        make_train_step(
            student.graph,
            student.volume,
            teacher,
            optimizer,
            groups,
            loss_weights=config.loss.to_dict(),
            photometric=config.data.photometric,
            swap_channels=config.data.swap_channels,
            use_grid_mask=config.model.grid_mask,
            use_dropout=config.model.dropout > 0,
            seed=config.seed,
        ),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
    return TrainingProgram(student, optimizer, abstract_state, shardings, step)

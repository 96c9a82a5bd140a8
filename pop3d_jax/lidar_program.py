"""The jitted training programs of ScaLR, all but their arrays; `pop3d_jax.program` is POP-3D's."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax
from jax.sharding import Mesh

from pop3d_jax.lidar_experiment import LidarStudent, dataset_named, make_lidar_student
from pop3d_jax.lidar_step import Step, make_distillation_step, make_segmentation_step
from pop3d_jax.optim import make_optimizer, parameter_groups, waffleiron_layer
from pop3d_jax.program import TrainingProgram
from pop3d_jax.sharding import check_batch, replicated, state_shardings
from pop3d_jax.step import initial_state
from pop3d_jax.teacher import Teacher


def distillation_program(
    config: ml_collections.ConfigDict, teacher: Teacher, total_steps: int, mesh: Mesh
) -> TrainingProgram:
    """Prepares the step towards a teacher's features; nothing is compiled and no array is made.

    Args:
      config: the experiment.
      teacher: loaded, or its shapes only.
      total_steps: length of the learning rate's schedule.
      mesh: devices, also ones that are not there.

    Raises:
      ValueError: teacher and student do not fit together, or the batch does not divide over the mesh.
    """
    teacher.check_width(config.model.output_channels, "config.model.output_channels")

    def make_step(student: LidarStudent, optimizer: optax.GradientTransformation, groups: Any) -> Step:
        return make_distillation_step(
            student.graph,
            teacher,
            optimizer,
            groups,
            neighbors=config.points.neighbors,
            use_drop_path=config.model.drop_path > 0,
            seed=config.seed,
        )

    return _program(config, total_steps, mesh, lambda path: False, make_step)


def segmentation_program(config: ml_collections.ConfigDict, total_steps: int, mesh: Mesh) -> TrainingProgram:
    """Prepares the step towards labels; as `distillation_program`.

    Raises:
      ValueError: the data sets' classes differ from each other or from the head's, or the batch does not divide.
    """
    class_names = {dataset_named(name).class_names for name in config.datasets}
    if len(class_names) != 1:
        raise ValueError(
            f"config.datasets = {sorted(config.datasets)} have different classes: train on one of them at a time"
        )
    classes = len(next(iter(class_names)))
    if classes != config.model.output_channels:
        raise ValueError(
            f"{', '.join(config.datasets)} has {classes} classes, the head has {config.model.output_channels} outputs: "
            f"set --config.model.output_channels={classes}"
        )

    def make_step(student: LidarStudent, optimizer: optax.GradientTransformation, groups: Any) -> Step:
        return make_segmentation_step(
            student.graph,
            optimizer,
            groups,
            neighbors=config.points.neighbors,
            lovasz_weight=config.loss.lovasz,
            train_backbone=config.train_backbone,
            use_drop_path=config.model.drop_path > 0,
            seed=config.seed,
        )

    return _program(config, total_steps, mesh, lambda path: not config.train_backbone and path[0] != "head", make_step)


def _program(
    config: ml_collections.ConfigDict,
    total_steps: int,
    mesh: Mesh,
    is_frozen: Callable[[tuple[str, ...]], bool],
    make_step: Callable[[LidarStudent, optax.GradientTransformation, Any], Step],
) -> TrainingProgram:
    student = make_lidar_student(config)
    check_batch(config.batch_size, 1, mesh)
    groups = parameter_groups(student.abstract_parameters, is_frozen)
    optimizer = make_optimizer(
        config.optim, total_steps, groups, functools.partial(waffleiron_layer, depth=student.config.depth)
    )
    abstract_state = jax.eval_shape(
        lambda: initial_state(student.abstract_parameters, student.abstract_statistics, optimizer)
    )
    shardings = state_shardings(abstract_state, mesh, config.mesh.shard_optimizer)
    step = jax.jit(make_step(student, optimizer, groups), donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    return TrainingProgram(student, optimizer, abstract_state, shardings, step)

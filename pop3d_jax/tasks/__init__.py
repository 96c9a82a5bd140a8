"""The systems of this project by the name of their task, `config.task`; "occupancy" where it names none.

Each gives the training loop a `Task`, and `compile_report` its programs for machines that are not there.
"""

import dataclasses
from collections.abc import Callable

import ml_collections
from etils import epath
from jax.sharding import Mesh

from pop3d_jax.abstract_programs import AbstractProgram
from pop3d_jax.tasks import lidar, occupancy
from pop3d_jax.tasks.task import Task

__all__ = ["Task", "abstract_inference", "abstract_training", "describe_sizes", "load_task"]


@dataclasses.dataclass(frozen=True)
class _System:
    """The functions of one task; see those of the same names below."""

    load: Callable[[ml_collections.ConfigDict, epath.Path, Mesh], Task]
    abstract_training: Callable[[ml_collections.ConfigDict, Mesh, int], AbstractProgram]
    abstract_inference: Callable[[ml_collections.ConfigDict, Mesh], AbstractProgram]
    describe_sizes: Callable[[ml_collections.ConfigDict], str]


_SYSTEMS = {
    "occupancy": _System(
        occupancy.occupancy_task, occupancy.abstract_training, occupancy.abstract_inference, occupancy.describe_sizes
    ),
    "distillation": _System(
        lidar.distillation_task, lidar.abstract_distillation, lidar.abstract_inference, lidar.describe_sizes
    ),
    "segmentation": _System(
        lidar.segmentation_task, lidar.abstract_segmentation, lidar.abstract_inference, lidar.describe_sizes
    ),
}


def load_task(config: ml_collections.ConfigDict, workdir: epath.PathLike, mesh: Mesh) -> Task:
    """The task of an experiment, its records open and its teacher loaded.

    Raises:
      ValueError: unknown name; see the tasks for more.
    """
    return _system(config).load(config, epath.Path(workdir), mesh)


def abstract_training(config: ml_collections.ConfigDict, mesh: Mesh, steps: int) -> AbstractProgram:
    """The training step on a mesh; no record and no weight is read.

    Args:
      config: the experiment.
      mesh: devices, also ones that are not there.
      steps: length of the learning rate's schedule.

    Raises:
      ValueError: unknown name; see the tasks' programs for more.
    """
    return _system(config).abstract_training(config, mesh, steps)


def abstract_inference(config: ml_collections.ConfigDict, mesh: Mesh) -> AbstractProgram:
    """The student's forward pass over a batch; arguments and errors as `abstract_training`."""
    return _system(config).abstract_inference(config, mesh)


def describe_sizes(config: ml_collections.ConfigDict) -> str:
    """What a program's cost hangs on, in a few words: "images 928x1600, grid 100x100x8"."""
    return _system(config).describe_sizes(config)


def _system(config: ml_collections.ConfigDict) -> _System:
    name = config.get("task", "occupancy")
    if name not in _SYSTEMS:
        raise ValueError(f"config.task is {name!r}: choose one of {sorted(_SYSTEMS)}")
    return _SYSTEMS[name]

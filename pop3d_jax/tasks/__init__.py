"""The systems of this project as the training loop sees them: one function each makes a `Task` of a configuration."""

import ml_collections
from etils import epath
from jax.sharding import Mesh

from pop3d_jax.tasks.lidar import distillation_task, segmentation_task
from pop3d_jax.tasks.occupancy import occupancy_task
from pop3d_jax.tasks.task import Task

__all__ = ["Task", "load_task"]


def load_task(config: ml_collections.ConfigDict, workdir: epath.PathLike, mesh: Mesh) -> Task:
    """The task that `config.task` names; "occupancy" where it names none.

    Raises:
      ValueError: unknown name; see the tasks for more.
    """
    tasks = {"occupancy": occupancy_task, "distillation": distillation_task, "segmentation": segmentation_task}
    name = config.get("task", "occupancy")
    if name not in tasks:
        raise ValueError(f"config.task is {name!r}: choose one of {sorted(tasks)}")
    return tasks[name](config, epath.Path(workdir), mesh)

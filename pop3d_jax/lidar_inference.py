"""A trained lidar network ready to predict: restored once, asked about single key frames.

`pop3d_jax.inference` is the same for POP-3D.
"""

import dataclasses

import jax
import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Float

from pop3d_jax.checkpoint import Checkpoints
from pop3d_jax.data.lidar_examples import make_segmentation_example
from pop3d_jax.data.records import KeyFrame
from pop3d_jax.experiment import restored_parts
from pop3d_jax.lidar_datasets import LidarDataset
from pop3d_jax.lidar_experiment import LidarStudent, lidar_settings, make_lidar_student
from pop3d_jax.lidar_step import network_input
from pop3d_jax.models.parameters import merge_model
from pop3d_jax.sharding import make_mesh, replicated
from pop3d_jax.workdir import read_config

LIDAR_TASKS = ("distillation", "segmentation")
# Where a sweep has more points than config.points.capacity, the arrays grow in these steps: nothing is left out.
_CAPACITY_STEP = 4096
_HOST_ARRAYS = (
    "nearest_kept",
    "raw_labels",
    "raw_mask",
    "raw_points_left_out",
    "point_labels",
    "points_left_out",
)


class LidarPredictor:
    """The network of a workdir, on one device; compiled once, and again only for sweeps that need larger arrays."""

    def __init__(self, workdir: epath.PathLike, step: int | None = None):
        """Restores a checkpoint (the newest by default).

        Raises:
          WorkdirError, CheckpointError: nothing to restore, or not of this model.
          ValueError: the run is not one of a lidar network.
        """
        self.config: ml_collections.ConfigDict = read_config(workdir)
        task = self.config.get("task", "occupancy")
        if task not in LIDAR_TASKS:
            raise ValueError(
                f"{workdir} holds a run of task {task!r}, which has no lidar network: name one of task "
                f"{' or '.join(LIDAR_TASKS)}, or ask it without --lidar"
            )
        self.student: LidarStudent = make_lidar_student(self.config)
        self._mesh = make_mesh(1, 1, jax.local_devices()[:1])
        checkpoints = Checkpoints(epath.Path(workdir) / "checkpoints", read_only=True)
        self.step = checkpoints.latest_step() if step is None else step
        self._restored = checkpoints.restore(restored_parts(self.student), replicated(self._mesh), step)
        self._settings = dataclasses.replace(lidar_settings(self.config, training=False), labelled=False)

        def predict(restored: dict, batch: dict[str, jax.Array]) -> jax.Array:
            model = merge_model(self.student.graph, restored["parameters"], restored["statistics"])
            return model(*network_input(batch, self._settings.neighbors))

        self._predict = jax.jit(predict)

    def __call__(self, key_frame: KeyFrame, dataset: LidarDataset) -> Float[np.ndarray, "points dim"]:
        """The network's output at every point of a sweep, in its order: features, not normalised, or logits.

        A point takes the output of the nearest point that the network saw, also outside the field of view, as in
        evaluation. The images are not looked at.

        Args:
          key_frame: the record.
          dataset: whose it is.

        Raises:
          ValueError: no point lies in the field of view, or a coordinate is not finite; names the sample.
        """
        settings = dataclasses.replace(self._settings, raw_capacity=len(key_frame.points))
        example = make_segmentation_example(key_frame, dataset, settings, None)
        left_out = int(example["points_left_out"])
        if left_out:
            capacity = -(-(settings.capacity + left_out) // _CAPACITY_STEP) * _CAPACITY_STEP
            settings = dataclasses.replace(settings, capacity=capacity)
            example = make_segmentation_example(key_frame, dataset, settings, None)
        if not example["point_mask"].any():
            raise ValueError(
                f"sample {key_frame.sample_token} has no point in the field of view "
                f"config.points.field_of_view = {settings.field_of_view}: the network sees nothing of it"
            )
        batch = {name: array[None] for name, array in example.items() if name not in _HOST_ARRAYS}
        with jax.set_mesh(self._mesh):
            output = self._predict(self._restored, jax.device_put(batch, replicated(self._mesh)))
        return np.asarray(output[0], np.float32)[example["nearest_kept"]]

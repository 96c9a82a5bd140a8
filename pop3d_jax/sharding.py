"""The device mesh, and where the axes of arrays go: one table from logical axis to mesh axis.

Mesh axes: `data` splits the batch, `camera` the six views.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axis. Everything that is not named is replicated.
RULES = {"batch": "data", "camera": "camera"}

# The arrays of a batch by their leading logical axes.
BATCH_AXES = {
    "images": ("batch", "camera"),
    "teacher_images": ("batch", "camera"),
    "lidar_to_image": ("batch", "camera"),
}


def make_mesh(data: int = -1, camera: int = 1) -> Mesh:
    """A (data, camera) mesh over the devices of all hosts.

    Args:
      data: devices along the batch; -1 takes all that `camera` leaves.
      camera: devices along the views.

    Raises:
      ValueError: the numbers do not fit the devices there are.
    """
    devices = jax.device_count()
    if data == -1:
        data = devices // camera
    if data * camera != devices or data < 1:
        raise ValueError(
            f"mesh data={data} x camera={camera} does not cover the {devices} devices there are: "
            "set config.mesh so that the product is that number"
        )
    return jax.make_mesh((data, camera), ("data", "camera"), axis_types=(AxisType.Auto, AxisType.Auto))


def partition_spec(*axes: str | None) -> PartitionSpec:
    """PartitionSpec of logical axes.

    Raises:
      ValueError: an axis without a rule, or two axes that fall on the same mesh axis.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"logical axes without a rule: {unknown}; the rules are {RULES}")
    mesh_axes = [RULES[axis] if axis else None for axis in axes]
    used = [axis for axis in mesh_axes if axis]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} collide on mesh axes {mesh_axes}")
    return PartitionSpec(*mesh_axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole: parameters, optimiser state, text."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This host's part of a batch to global arrays on the mesh.

    Raises:
      ValueError: the batch does not divide over the mesh's data axis.
    """
    local_data = mesh.shape["data"] // jax.process_count()
    for name, array in batch.items():
        if local_data and array.shape[0] % local_data:
            raise ValueError(
                f"batch array {name} has {array.shape[0]} examples on this host, which do not divide over "
                f"{local_data} devices of the mesh's data axis: change config.batch_size or config.mesh.data"
            )
    shardings = {name: NamedSharding(mesh, partition_spec(*BATCH_AXES.get(name, ("batch",)))) for name in batch}
    return {name: jax.make_array_from_process_local_data(shardings[name], array) for name, array in batch.items()}

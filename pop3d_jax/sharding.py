"""The device mesh, and where the axes of arrays go: one table from logical axis to mesh axis.

Mesh axes: `data` splits the batch, `camera` the six views. Most of a program leaves its partition to the compiler; the
parts that would be gathered onto one device otherwise (pictures merged into one axis, loops of table look-ups) say
with `per_device` that every device works on its own examples and views. They see the mesh by `jax.set_mesh`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axis. Everything that is not named is replicated.
RULES = {"batch": "data", "camera": "camera", "optimizer_shard": "data"}
# Optimiser arrays below this size stay whole: their collectives would cost more than their bytes.
_SMALLEST_SHARDED = 2**14

# The arrays of a batch by their leading logical axes.
BATCH_AXES = {
    "images": ("batch", "camera"),
    "teacher_images": ("batch", "camera"),
    "lidar_to_image": ("batch", "camera"),
}


def make_mesh(data: int = -1, camera: int = 1, device_list: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, camera) mesh over the devices of all hosts.

    Args:
      data: devices along the batch; -1 takes all that `camera` leaves.
      camera: devices along the views.
      device_list: other devices than those there are, such as a topology's.

    Raises:
      ValueError: the numbers do not fit the devices there are.
    """
    devices = jax.device_count() if device_list is None else len(device_list)
    if data == -1:
        data = devices // camera
    if data * camera != devices or data < 1:
        raise ValueError(
            f"mesh data={data} x camera={camera} does not cover the {devices} devices there are: "
            "set config.mesh so that the product is that number"
        )
    return jax.make_mesh(
        (data, camera), ("data", "camera"), axis_types=(AxisType.Auto, AxisType.Auto), devices=device_list
    )


def check_batch(batch_size: int, cameras: int, mesh: Mesh) -> None:
    """Whether a batch and its views divide over a mesh, and the mesh over the hosts.

    Raises:
      ValueError: they do not.
    """
    if batch_size % mesh.shape["data"]:
        raise ValueError(
            f"config.batch_size = {batch_size} does not divide over the {mesh.shape['data']} devices of the mesh's "
            "data axis: change config.batch_size or config.mesh.data"
        )
    if mesh.shape["data"] % jax.process_count():
        raise ValueError(
            f"the mesh's data axis of {mesh.shape['data']} devices does not divide over {jax.process_count()} hosts; "
            "the views of one key frame cannot be spread over several: lower config.mesh.camera"
        )
    if cameras % mesh.shape["camera"]:
        raise ValueError(
            f"config.mesh.camera = {mesh.shape['camera']} does not divide the {cameras} views: choose a divisor"
        )


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


def per_device(
    function: Callable[..., Any], inputs: Sequence[tuple[str | None, ...]], outputs: tuple[str | None, ...]
) -> Callable[..., Any]:
    """A function that every device applies to its own part of the arrays; itself where there is one device.

    Args:
      function: of arrays or trees of arrays.
      inputs: leading logical axes of each argument; () for what every device needs whole.
      outputs: leading logical axes of the result's arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return jax.shard_map(
        function,
        in_specs=tuple(partition_spec(*axes) for axes in inputs),
        out_specs=partition_spec(*outputs),
        check_vma=False,
    )


def first_view(views: int) -> jax.Array | int:
    """Inside `per_device`: number of the first of this device's `views` views."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return 0
    return jax.lax.axis_index(RULES["camera"]) * views


def sum_over_views(tree: Any) -> Any:
    """Inside `per_device`: the sum over all devices that hold other views of the same examples."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.lax.psum(tree, RULES["camera"])


def state_shardings(abstract_state: dict[str, Any], mesh: Mesh, shard_optimizer: bool) -> dict[str, Any]:
    """Where a training state lives.

    Args:
      abstract_state: shapes, as `jax.eval_shape` of `initial_state` gives them.
      mesh: devices.
      shard_optimizer: whether each device of the data axis keeps only its part of the optimiser's large arrays
        (ZeRO stage 1); parameters are whole on every device.

    Returns:
      A tree of shardings like the state.
    """
    whole = replicated(mesh)

    def place(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if leaf.size >= _SMALLEST_SHARDED:
            for axis, size in enumerate(leaf.shape):
                if size % mesh.shape[RULES["optimizer_shard"]] == 0:
                    return NamedSharding(mesh, partition_spec(*[None] * axis, "optimizer_shard"))
        return whole

    shardings = jax.tree.map(lambda _: whole, abstract_state)
    if shard_optimizer:
        shardings["optimizer"] = jax.tree.map(place, abstract_state["optimizer"])
    return shardings


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

"""Programs with the shapes and places of their arguments, and no arrays: what `compile_report` compiles.

Each task (`pop3d_jax.tasks`) makes its own of a configuration and a mesh, whose devices need not be there.
"""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from pop3d_jax.data.records import KeyFrame
from pop3d_jax.program import TrainingProgram
from pop3d_jax.sharding import BATCH_AXES, partition_spec, replicated

# Pixels of nuScenes' images; their calibration does not matter here.
_IMAGE_HW = (900, 1600)


@dataclasses.dataclass(frozen=True)
class AbstractProgram:
    """A jitted function and what it would be called with.

    Attributes:
      name: "training step" or "inference step".
      function: jitted; to be traced inside `jax.set_mesh` of the mesh that it was made for.
      arguments: trees of shapes with shardings.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]


def blank_key_frame(cameras: int) -> KeyFrame:
    """A key frame of black images in nuScenes' size and one point: what arrays look like, not what is in them."""
    file = io.BytesIO()
    Image.new("RGB", _IMAGE_HW[::-1]).save(file, "JPEG")
    eye = np.eye(4)
    return KeyFrame(
        images=[file.getvalue()] * cameras,
        intrinsics=np.tile(np.eye(3), (cameras, 1, 1)),
        lidar_to_camera=np.tile(eye, (cameras, 1, 1)),
        points=np.ones((1, 5), np.float32),
        lidarseg=np.zeros(0, np.uint8),
        lidar_to_ego=eye,
        ego_to_global=eye,
        sample_token="",
        scene_token="",
        scene_name="",
        lidar_token="",
        lidar_file="",
        camera_tokens=[""] * cameras,
        camera_files=[""] * cameras,
        camera_timestamps=np.zeros(cameras, np.int64),
        timestamp=0,
    )


def abstract_batch(example: Mapping[str, np.ndarray], batch_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and places of a batch's arrays on the devices, from those of one example."""
    return {
        name: jax.ShapeDtypeStruct(
            (batch_size, *array.shape),
            array.dtype,
            sharding=NamedSharding(mesh, partition_spec(*BATCH_AXES.get(name, ("batch",)))),
        )
        for name, array in example.items()
        if not name.endswith("_left_out")
    }


def abstract_state(program: TrainingProgram) -> dict[str, Any]:
    """Shapes and places of a training state."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        program.abstract_state,
        program.shardings,
    )


def on_every_device(tree: Any, mesh: Mesh) -> Any:
    """Shapes of arrays that every device has whole, such as the teacher's."""
    place = replicated(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)

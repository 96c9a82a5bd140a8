"""Labels on Occ3D's grid from a trained network, asked at the centres of Occ3D's voxels.

The network's planes are computed once a key frame. From them come the network's own grid, as everywhere else, and what
the heads say at Occ3D's 640,000 centres: occupancy at all of them, features only at those that are occupied, in chunks
of `CHUNK` centres that become labels at once. So memory holds the features of one chunk (8,000 of 512 numbers: 16 MB,
and 33 MB for each hidden layer of 1,024), never those of all centres (1.3 GB), and time goes with the number of
occupied voxels. The compiler's temporaries at the published size, without backbone and encoder: 68 MB for the centres,
819 MB for the network's own grid, which is decoded whole (`benchmarks/occ3d_labels.py`).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from pop3d_jax.data.records import KeyFrame
from pop3d_jax.images import network_images
from pop3d_jax.inference import StudentRun
from pop3d_jax.models.heads import TPVHeads, sample_planes
from pop3d_jax.models.tpv import TPVPlanes
from pop3d_jax.occ3d.centres import place_centres
from pop3d_jax.occ3d.grid import FREE, OCC3D_VOLUME
from pop3d_jax.occ3d.phrase_labels import (
    LabelledGrid,
    LabelText,
    best_labels,
    check_threshold,
    label_text,
    largest_leads,
    without_absent,
)
from pop3d_jax.occ3d.prompts import PromptSet
from pop3d_jax.sharding import per_device, replicated
from pop3d_jax.teacher import load_text_side

# Divides Occ3D's number of voxels.
CHUNK = 8_000


def grid_labels(
    heads: TPVHeads, planes: TPVPlanes, text: LabelText, absent_threshold: float | None
) -> UInt8[Array, "x y z"]:
    """Labels of the network's own voxels.

    Args:
      heads: of the network.
      planes: of one key frame, a batch of one.
      text: the phrases.
      absent_threshold: see `StudentLabels`.
    """
    output = heads(planes, voxel_features=True)
    occupied = jnp.argmax(output.occupancy_logits[0], -1) == 1
    features = output.voxel_features[0]
    if absent_threshold is not None:
        leads = largest_leads(features.reshape(-1, features.shape[-1]), occupied.reshape(-1), text)
        text = without_absent(text, leads, absent_threshold)
    return jnp.where(occupied, best_labels(features, text), jnp.uint8(FREE))


def labels_at(
    heads: TPVHeads,
    planes: TPVPlanes,
    cells: Float32[Array, "centres 3"],
    unseen: Bool[Array, " centres"],
    text: LabelText,
    absent_threshold: float | None,
) -> UInt8[Array, " centres"]:
    """Labels at centres of other voxels than the network's.

    Args:
      heads: of the network.
      planes: of one key frame, a batch of one.
      cells: centres in cells of the network's volume; their number is a multiple of `CHUNK`.
      unseen: centres that are free whatever the network says.
      text: the phrases.
      absent_threshold: see `StudentLabels`.
    """
    planes = heads.upscaled(planes)

    def is_occupied(chunk: Float[Array, "chunk 3"]) -> Bool[Array, " chunk"]:
        return jnp.argmax(heads.occupancy(sample_planes(planes, chunk[None]))[0], -1) == 1

    occupied = jax.lax.map(is_occupied, cells.reshape(-1, CHUNK, 3)).reshape(-1) & ~unseen
    # The occupied centres first; what fills the rest lies outside, where writing is dropped.
    order = jnp.nonzero(occupied, size=len(cells), fill_value=len(cells))[0]
    chunks = -(-occupied.sum() // CHUNK)

    def chunk(number: Array) -> tuple[Int[Array, " chunk"], Float[Array, "chunk dim"]]:
        where = jax.lax.dynamic_slice(order, (number * CHUNK,), (CHUNK,))
        return where, heads.features(sample_planes(planes, cells.at[where].get(mode="clip")[None]))[0]

    if absent_threshold is not None:

        def further(number: Array, leads: Array) -> Array:
            where, features = chunk(number)
            return jnp.maximum(leads, largest_leads(features, where < len(cells), text))

        leads = jax.lax.fori_loop(0, chunks, further, jnp.full(text.labels.shape, -jnp.inf))
        text = without_absent(text, leads, absent_threshold)

    def write(number: Array, labels: Array) -> Array:
        where, features = chunk(number)
        return labels.at[where].set(best_labels(features, text), mode="drop")

    return jax.lax.fori_loop(0, chunks, write, jnp.full(len(cells), FREE, jnp.uint8))


class StudentLabels:
    """Labels of key frames from the student of a workdir.

    Attributes:
      run: the restored student.
      prompts: the phrases.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        step: int | None,
        prompts: PromptSet,
        absent_threshold: float | None = None,
    ):
        """Restores a checkpoint and embeds the phrases.

        Args:
          workdir: folder of the run.
          step: of the checkpoint; None for the newest.
          prompts: what the classes are asked with.
          absent_threshold: a class is absent from a key frame, and none of its phrases takes part there, where the
            largest lead of its phrases over the background phrases (`phrase_labels.largest_leads`, cosines) stays
            below this over the occupied voxels: those at Occ3D's centres for `queried`, the network's own for
            `resampled`. Costs a second pass over the features. Plus infinity makes everything free; None or minus
            infinity nothing.

        Raises:
          WorkdirError, CheckpointError: nothing to restore, or not of this model.
          ValueError: the run is one of a lidar network, its teacher has no text side, or the threshold is not a
            number.
        """
        check_threshold(absent_threshold)
        self.run = StudentRun(workdir, step)
        self.prompts = prompts
        clip = load_text_side(self.run.config.teacher)
        text = label_text(prompts, clip, epath.Path(workdir) / "text_cache")
        self._text = jax.device_put(text, replicated(self.run.mesh))

        def predict(restored: dict, text: LabelText, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            model = self.run.model(restored)
            planes = model.planes(network_images(batch["images"]), batch["lidar_to_image"])
            graph, state = nnx.split(model.heads)

            def decode(state: Any, text: LabelText, *arrays: Any) -> tuple[jax.Array, jax.Array]:
                heads = nnx.merge(graph, state)

                def one(example: tuple[TPVPlanes, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                    planes, cells, unseen = example
                    planes = jax.tree.map(lambda plane: plane[None], planes)
                    return (
                        labels_at(heads, planes, cells, unseen, text, absent_threshold),
                        grid_labels(heads, planes, text, absent_threshold),
                    )

                return jax.lax.map(one, arrays)

            # Each device for itself: how many chunks there are differs from one key frame to another.
            split = [(), (), ("batch",), ("batch",), ("batch",)]
            return per_device(decode, split, ("batch",))(state, text, planes, batch["cells"], batch["unseen"])

        self._predict = jax.jit(predict)

    def many(self, key_frames: Sequence[KeyFrame]) -> Iterator[LabelledGrid]:
        """Labels key frames, one on each of this host's devices at a time; pictures are decoded meanwhile.

        The lidar is not looked at.
        """
        volume = self.run.student.volume

        def centres_of(key_frame: KeyFrame) -> dict[str, np.ndarray]:
            placed = place_centres(key_frame.lidar_to_ego, volume)
            return {"cells": placed.cells, "unseen": placed.unseen}

        for frames, arrays in self.run.batches(key_frames, centres_of):
            with jax.set_mesh(self.run.mesh):
                queried, grid = self._predict(self.run.restored, self._text, arrays)
            for i, frame in enumerate(frames):
                placed = place_centres(frame.lidar_to_ego, volume)
                yield LabelledGrid(
                    frame.sample_token,
                    np.asarray(queried[i]).reshape(OCC3D_VOLUME.grid_size),
                    placed.resampled(np.asarray(grid[i])),
                    placed.unseen.reshape(OCC3D_VOLUME.grid_size),
                )

"""The label of each voxel by a vote."""

import numpy as np
from jaxtyping import Float, Int, UInt8

from pop3d_jax.occ3d.grid import FREE
from pop3d_jax.voxels import Volume


def majority_labels(
    voxels: Int[np.ndarray, " votes"],
    classes: UInt8[np.ndarray, " votes"],
    volume: Volume,
    weights: Float[np.ndarray, " votes"] | None = None,
) -> UInt8[np.ndarray, "x y z"]:
    """The class with the most votes in each voxel, the lowest one in a tie; 17, free, where nobody voted.

    Args:
      voxels: flat index of each vote, -1 for one that does not count.
      classes: 0..16.
      volume: the grid.
      weights: of the votes, positive; all alike if there are none.
    """
    counted = voxels >= 0
    voxels = voxels[counted]
    touched = np.zeros(volume.num_voxels, bool)
    touched[voxels] = True
    rows = np.cumsum(touched, dtype=np.int64) - 1
    key = rows[voxels] * FREE + classes[counted]
    count = int(touched.sum())
    votes = np.bincount(key, None if weights is None else weights[counted], minlength=count * FREE)
    labels = np.full(volume.num_voxels, FREE, np.uint8)
    labels[touched] = votes.reshape(count, FREE).argmax(1)
    return labels.reshape(volume.grid_size)

"""Occ3D-nuScenes' grid and labels (Tian et al. 2023): what its `labels.npz` files hold.

The grid lies in the **ego** frame at lidar time (x forward, y left, z up), not in the lidar's, metres; arrays are
indexed [x, y, z]. Labels 0 to 16 are the lidarseg classes, 0 being "others" here, and 17 is free. There is no label for
what nobody saw: the masks tell it from what is free.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, UInt8

from pop3d_jax.nuscenes import CLASS_NAMES
from pop3d_jax.voxels import Volume

# In the ego frame, unlike the volumes of the networks.
OCC3D_VOLUME = Volume((-40.0, -40.0, -1.0), (40.0, 40.0, 5.4), (200, 200, 16))
OCC3D_CLASSES = ("others", *CLASS_NAMES[1:-1], "free")
OTHERS = 0
OTHER_FLAT = 12
FREE = 17
MASKS = ("camera", "lidar", "none")


@dataclasses.dataclass(frozen=True)
class Occ3DFrame:
    """Ground truth of one key frame.

    Attributes:
      semantics: labels; anything outside 0 to 17 says that there is none.
      mask_lidar: voxels that the accumulated lidar observed, occupied or free.
      mask_camera: voxels that the cameras of this key frame observe.
    """

    semantics: UInt8[np.ndarray, "x y z"]
    mask_lidar: Bool[np.ndarray, "x y z"]
    mask_camera: Bool[np.ndarray, "x y z"]

    def mask(self, name: str) -> Bool[np.ndarray, "x y z"]:
        """The voxels that count under a mask of `MASKS`; KeyError for another name."""
        everything = np.ones(self.semantics.shape, bool)
        return {"camera": self.mask_camera, "lidar": self.mask_lidar, "none": everything}[name]

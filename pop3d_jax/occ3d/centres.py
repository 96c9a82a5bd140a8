"""Where Occ3D's voxel centres lie in a network's volume."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, UInt8

from pop3d_jax.occ3d.grid import FREE, OCC3D_VOLUME
from pop3d_jax.voxels import Volume, grid_coordinates_float64, voxel_centres


@dataclasses.dataclass(frozen=True)
class PlacedCentres:
    """Occ3D's centres in C order of its grid [x, y, z], seen from a volume in the lidar frame.

    Attributes:
      cells: where they lie in cells of the volume, see `voxels.grid_coordinates`.
      voxels: flat index of the voxel that contains each; one of the border where it lies outside.
      unseen: which of them lie outside.
    """

    cells: Float32[np.ndarray, "centres 3"]
    voxels: Int32[np.ndarray, " centres"]
    unseen: Bool[np.ndarray, " centres"]

    def resampled(self, labels: UInt8[np.ndarray, "x y z"]) -> UInt8[np.ndarray, "200 200 16"]:
        """Labels of the volume's voxels at Occ3D's centres, free where unseen."""
        return np.where(self.unseen, np.uint8(FREE), labels.reshape(-1)[self.voxels]).reshape(OCC3D_VOLUME.grid_size)


def place_centres(lidar_to_ego: Float64[np.ndarray, "4 4"], volume: Volume) -> PlacedCentres:
    """Brings Occ3D's centres from the ego frame into a volume in the lidar frame, in float64.

    The mounting of the lidar is the same in most key frames, so the last few results are kept (11 MB each).

    Args:
      lidar_to_ego: of the key frame.
      volume: of the network, lidar frame.
    """
    return _placed(lidar_to_ego.tobytes(), volume)


@functools.lru_cache(maxsize=4)
def _placed(lidar_to_ego: bytes, volume: Volume) -> PlacedCentres:
    ego_to_lidar = np.linalg.inv(np.frombuffer(lidar_to_ego).reshape(4, 4))
    ego = voxel_centres(np.indices(OCC3D_VOLUME.grid_size).reshape(3, -1).T, OCC3D_VOLUME)
    lidar = ego @ ego_to_lidar[:3, :3].T + ego_to_lidar[:3, 3]
    inside = ((lidar >= volume.minimum) & (lidar < volume.maximum)).all(-1)
    cells = grid_coordinates_float64(lidar, volume)
    voxels = np.ravel_multi_index(tuple(np.floor(cells).astype(np.int64).T), volume.grid_size)
    return PlacedCentres(cells.astype(np.float32), voxels.astype(np.int32), ~inside)

"""Where RayIoU's rays begin: the lidar's places in all key frames of the scene, seen from one of them."""

import numpy as np
from jaxtyping import Float64

from pop3d_jax.geometry import invert_rigid

# RayIoU's (SparseOcc, `loaders/ego_pose_dataset.py`): places this far from the ego's, metres along x or y, are left
# out, and of the others at most this many are taken.
_REACH = 39.0
_MOST = 8


def lidar_origins(
    lidar_to_ego: Float64[np.ndarray, "n 4 4"], ego_to_global: Float64[np.ndarray, "n 4 4"], reference: int
) -> Float64[np.ndarray, "t 3"]:
    """Origins of the rays of one key frame: past, present and future places of the lidar, in the order of the scene.

    A place counts if |x| and |y| are below 39 m; z is not looked at, so a place may lie outside the grid. Of more than
    8, the first, the last and 6 evenly between them are taken, which may leave out the reference's own. As official,
    places are rounded to float32 in the reference's lidar frame.

    Args:
      lidar_to_ego: calibration of each key frame of the scene, in order.
      ego_to_global: pose of the ego at each key frame's lidar time.
      reference: the key frame that is scored.

    Returns:
      At most 8 places, metres, ego frame of the reference.

    Raises:
      ValueError: the reference is not one of the key frames.
    """
    if not 0 <= reference < len(ego_to_global):
        raise ValueError(f"lidar_origins: reference {reference} of {len(ego_to_global)} key frames")
    to_reference = invert_rigid(lidar_to_ego[reference]) @ invert_rigid(ego_to_global[reference])
    in_lidar = (to_reference @ (ego_to_global @ lidar_to_ego))[:, :3, 3].astype(np.float32)
    in_lidar[reference] = 0.0
    matrix = lidar_to_ego[reference]
    origins = in_lidar.astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
    near = origins[(np.abs(origins[:, :2]) < _REACH).all(axis=1)]
    if len(near) > _MOST:
        near = near[np.round(np.linspace(0, len(near) - 1, _MOST)).astype(np.int64)]
    return near

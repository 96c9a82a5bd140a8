"""Which lidar points each camera sees, and at which pixel (host, float64)."""

import numpy as np
from jaxtyping import Float, Int

from pop3d_jax import geometry


def visible_pairs(
    points: Float[np.ndarray, "points 3"],
    intrinsics: Float[np.ndarray, "cameras 3 3"],
    lidar_to_camera: Float[np.ndarray, "cameras 4 4"],
    image_hw: tuple[int, int],
    min_depth: float = 1.0,
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"], Int[np.ndarray, "pairs 2"]]:
    """Pairs of a point and a camera that sees it (rule of the official `generate_projections_nuscenes.py`).

    Visible is: depth > min_depth, 0 < u < width - 1, 0 < v < height - 1, all strict; occlusion is not tested.

    Args:
      points: metres, lidar frame.
      intrinsics: pixels of an image of size `image_hw`.
      lidar_to_camera: both ego poses applied.
      image_hw: height and width in pixels, before any padding.
      min_depth: metres.

    Returns:
      Point index (int64), camera index (int64), and (row, column) of the nearest pixel (int64, half to even).
      Cameras are concatenated in their order, points ascending within each; a point that two cameras see
      comes twice.
    """
    matrices = geometry.lidar_to_image(intrinsics.astype(np.float64), lidar_to_camera.astype(np.float64))
    indices, cameras, pixels = [], [], []
    for camera, matrix in enumerate(matrices):
        uv, depth = geometry.project(points, matrix)
        seen = np.flatnonzero(geometry.visible(uv, depth, image_hw, min_depth))
        indices.append(seen)
        cameras.append(np.full(len(seen), camera, np.int64))
        pixels.append(np.round(uv[seen, ::-1]).astype(np.int64))
    return np.concatenate(indices), np.concatenate(cameras), np.concatenate(pixels)

"""A lidar sweep on its way into WaffleIron, on the host: thinning, cropping, features, cells, pixels.

All functions return indices or masks rather than shortened clouds, so that labels, pixels and points stay together.
Sources: `utils/transforms.py`, `datasets/pc_dataset.py` and `datasets/im_pc_dataset.py` of ScaLR
(github.com/valeoai/ScaLR), whose numbers these functions give, down to the precision each step is computed in.
"""

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, Int64, UInt8
from PIL import Image
from scipy.spatial import cKDTree

from pop3d_jax.geometry import project
from pop3d_jax.lidar_datasets import LidarDataset

FieldOfView = tuple[tuple[float, float, float], tuple[float, float, float]]

FEATURES = ("intensity", "x", "y", "z", "radius")

# Axes (row, column) of the grid that a cloud is projected to along each axis.
_PLANES = {0: (1, 2), 1: (0, 2), 2: (0, 1)}


def thin(
    xyz: Float32[np.ndarray, "points 3"], voxel_size: float, rng: np.random.Generator | None = None
) -> Int64[np.ndarray, " kept"]:
    """One point of every voxel.

    Args:
      xyz: metres; the voxels start at the smallest coordinate of each axis.
      voxel_size: metres; 0 keeps all points.
      rng: draws the point of each voxel, uniformly; None takes the first.

    Returns:
      Indices of the points, in the lexicographic order of their voxels.

    Raises:
      ValueError: a coordinate is not finite.
    """
    if not np.isfinite(xyz).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(xyz).all(1))} points have coordinates that are not finite")
    if voxel_size <= 0 or not len(xyz):
        return np.arange(len(xyz))
    voxels = ((xyz - xyz.min(0)) / np.float32(voxel_size)).astype(np.int64)
    order = np.arange(len(xyz)) if rng is None else rng.permutation(len(xyz))
    order = order[np.lexsort(voxels[order].T[::-1])]  # stable: the first of each voxel stays in front
    ordered = voxels[order]
    return order[np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(1)])]


def in_field_of_view(
    xyz: Float32[np.ndarray, "points 3"], field_of_view: FieldOfView, margin: float = 1e-4
) -> Bool[np.ndarray, " points"]:
    """Points strictly inside the box (smallest corner, largest corner), metres, made smaller by the margin."""
    lower, upper = np.array(field_of_view, np.float64)
    return ((xyz > (lower + margin).astype(np.float32)) & (xyz < (upper - margin).astype(np.float32))).all(1)


def nearest(
    xyz: Float32[np.ndarray, "points 3"], centre: Float[np.ndarray, "3"], count: int
) -> Int64[np.ndarray, " kept"]:
    """Indices of the `count` points nearest to `centre`, by distance; of all points, in their order, if they are fewer.

    The official code sorts only where it has to leave points out.
    """
    if len(xyz) <= count:
        return np.arange(len(xyz))
    return np.argsort(np.square(xyz - centre.astype(np.float64)).sum(1), kind="stable")[:count]


def point_features(
    xyz: Float32[np.ndarray, "points 3"], intensity: Float32[np.ndarray, " points"], dataset: LidarDataset
) -> Float32[np.ndarray, "points 5"]:
    """Input of the network as named in `FEATURES`: intensity normalised, metres for the rest."""
    normalised = (intensity[:, None] - np.float32(dataset.intensity_mean)) / np.float32(dataset.intensity_std)
    return np.concatenate([normalised, xyz, np.linalg.norm(xyz, axis=1, keepdims=True)], 1)


def grid_cells(
    xyz: Float32[np.ndarray, "points 3"],
    field_of_view: FieldOfView,
    projection_axes: tuple[int, ...],
    grid_shapes: tuple[tuple[int, int], ...],
) -> Int32[np.ndarray, "axes points"]:
    """The cell of each point in each 2D grid, row * columns + column.

    Args:
      xyz: metres, inside the field of view.
      field_of_view: the box that every grid spans.
      projection_axes: the axis that each grid leaves out.
      grid_shapes: rows and columns of each grid; rows run along the first of the two axes left.

    Raises:
      ValueError: a point outside the field of view.
    """
    lower, upper = np.array(field_of_view, np.float64)
    cells = np.empty((len(projection_axes), len(xyz)), np.int32)
    for grid, (axis, shape) in enumerate(zip(projection_axes, grid_shapes, strict=True)):
        plane = list(_PLANES[axis])
        size = (upper[plane] - lower[plane]) / np.array(shape)
        quantised = np.floor((xyz[:, plane] - lower[plane]) / size).astype(np.int64)
        outside = ((quantised < 0) | (quantised >= shape)).any(1)
        if outside.any():
            raise ValueError(f"{outside.sum()} points lie outside the field of view {field_of_view}: crop them first")
        cells[grid] = quantised[:, 0] * shape[1] + quantised[:, 1]
    return cells


def nearest_kept(xyz: Float32[np.ndarray, "raw 3"], kept: Float32[np.ndarray, "kept 3"]) -> Int32[np.ndarray, " raw"]:
    """Index of the kept point nearest to each raw point: where it gets its prediction from; zeros if none is kept."""
    if not len(kept):
        return np.zeros(len(xyz), np.int32)
    return cKDTree(kept).query(xyz)[1].astype(np.int32)


def pixel_pairs(
    xyz: Float32[np.ndarray, "points 3"],
    lidar_to_image: Float[np.ndarray, "4 4"],
    image_hw: tuple[int, int],
    dataset: LidarDataset,
) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, "pairs 2"]]:
    """The points that one camera sees, and the pixel of each.

    Seen is what the data set's depth rule lets through and what falls strictly between the first and the last pixel's
    coordinate, 0 < u < width - 1 and 0 < v < height - 1. Occlusion is not tested. In float64: the official code of
    nuScenes rounds to float32 after each of four transforms, which moves about two in a thousand points by one pixel.

    Args:
      xyz: metres, lidar frame of the record.
      lidar_to_image: as `geometry.lidar_to_image` returns it, for an image of size `image_hw`.
      image_hw: height and width, pixels.
      dataset: its depth rule.

    Returns:
      Indices of the points, ascending, and (row, column), rounded down, of each.
    """
    uv, depth = project(xyz, lidar_to_image)
    if dataset.depth_of == "lidar_x":
        depth = xyz[:, 0]
    height, width = image_hw
    u, v = uv.T
    seen = (depth > dataset.min_depth) & (u > 0) & (u < width - 1) & (v > 0) & (v < height - 1)
    return np.flatnonzero(seen), np.floor(uv[seen, ::-1]).astype(np.int64)


def resized_pixels(
    pixels: Int[np.ndarray, "pairs 2"], image_hw: tuple[int, int], resized_hw: tuple[int, int]
) -> Int64[np.ndarray, "pairs 2"]:
    """(row, column) in the resized image, rounded down a second time, as official."""
    scale = [resized / size for resized, size in zip(resized_hw, image_hw, strict=True)]
    return np.floor(np.multiply(pixels, scale)).astype(np.int64)


def resize_image(
    image: UInt8[np.ndarray, "h w 3"], hw: tuple[int, int], *, antialias: bool
) -> Float32[np.ndarray, "height width 3"]:
    """Bilinear resize that ignores the aspect ratio, in float32, values 0..255.

    Args:
      image: RGB.
      hw: new height and width.
      antialias: True is what torchvision does from 0.17 on; False is torchvision 0.12, the version that ScaLR names.
    """
    if image.shape[:2] == hw:
        return image.astype(np.float32)
    if antialias:
        planes = [
            Image.fromarray(plane).resize(hw[::-1], Image.Resampling.BILINEAR)
            for plane in np.moveaxis(image, 2, 0).astype(np.float32)
        ]
        return np.stack([np.asarray(plane) for plane in planes], 2)
    rows, columns = (_two_taps(size, resized) for size, resized in zip(image.shape[:2], hw, strict=True))
    named, numbers = np.unique(rows[:2], return_inverse=True)  # the other rows are not asked for
    across = _mix(image[named], columns, 1)
    return _mix(across, (*numbers.reshape(2, -1), rows[2]), 0)


_Taps = tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]


def _two_taps(size: int, resized: int) -> _Taps:
    """The two source positions of each new one, pixel centres aligned, and the share of the second (all in float32)."""
    position = (np.arange(resized, dtype=np.float32) + np.float32(0.5)) * np.float32(size / resized)
    position = np.maximum(position - np.float32(0.5), 0)
    first = position.astype(np.int64)
    return first, np.minimum(first + 1, size - 1), position - first.astype(np.float32)


def _mix(image: np.ndarray, taps: _Taps, axis: int) -> np.ndarray:
    first, second, share = taps
    share = np.expand_dims(share, tuple(other for other in range(image.ndim) if other != axis))
    return np.take(image, first, axis) * (1 - share) + np.take(image, second, axis) * share

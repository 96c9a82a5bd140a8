"""Where the tokens of the three planes look in the images.

The planes are named as officially: ``hw`` has tokens (y, x), ``zh`` tokens (z, y), ``wz`` tokens (x, z), the first
index slow. Every token stands for a line through the volume along the missing axis, with anchor points on it.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PLANES = ("hw", "zh", "wz")
_MIN_DEPTH = 1e-5


def plane_shapes(grid_size: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of the planes hw, zh, wz of a grid of (x, y, z) cells."""
    x, y, z = grid_size
    return (y, x), (z, y), (x, z)


def reference_points(
    grid_size: tuple[int, int, int], extent: tuple[float, float, float], anchors: tuple[int, int, int]
) -> tuple[Float[np.ndarray, "tokens anchors 3"], ...]:
    """Anchor points of each plane, as shares (x, y, z) of the volume; ``TPVFormerEncoder.get_reference_points``.

    Across the plane they are cell centres. Along its missing axis they run from half a *metre* (not half a cell)
    after the border to half a metre before the other one, as officially.

    Args:
        grid_size: cells along x, y, z.
        extent: size of the volume in metres along x, y, z.
        anchors: number of anchors of the planes hw, zh, wz.

    Returns:
        float32, one array for each of hw, zh, wz.
    """
    centres = [(np.arange(n) + 0.5) / n for n in grid_size]
    points = []
    for rows_axis, columns_axis, count in zip((1, 2, 0), (0, 1, 2), anchors, strict=True):
        line_axis = 3 - rows_axis - columns_axis
        length = extent[line_axis]
        line = np.linspace(0.5, length - 0.5, count) / length
        shape = (grid_size[rows_axis], grid_size[columns_axis], count)
        point = np.empty((*shape, 3), np.float32)
        point[..., rows_axis] = centres[rows_axis][:, None, None]
        point[..., columns_axis] = centres[columns_axis][None, :, None]
        point[..., line_axis] = line
        points.append(point.reshape(-1, count, 3))
    return tuple(points)


def cell_centres(shape: tuple[int, int]) -> Float[np.ndarray, "tokens 2"]:
    """(x, y) in [0, 1] of the tokens of a plane of (rows, columns), the plane seen as an image."""
    rows, columns = shape
    y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    return np.stack([x, y], -1).reshape(-1, 2).astype(np.float32)


def sample_points(
    reference: Float[np.ndarray, "tokens anchors 3"],
    volume_minimum: tuple[float, float, float],
    volume_maximum: tuple[float, float, float],
    lidar_to_image: Float[Array, "batch camera 4 4"],
    image_hw: tuple[int, int],
) -> tuple[Float[Array, "batch camera tokens anchors 2"], Bool[Array, "batch camera tokens anchors"]]:
    """Projects anchors into every camera; ``TPVFormerEncoder.point_sampling``, correct for any batch.

    Args:
        reference: anchors as shares of the volume.
        volume_minimum, volume_maximum: corners in metres, lidar frame.
        lidar_to_image: metres to (u * depth, v * depth, depth, 1), pixels of the padded image.
        image_hw: size of the padded image.

    Returns:
        (u, v) as shares of the padded width and height (huge behind the camera), and whether the anchor is in front
        of the camera and strictly inside the padded image.
    """
    minimum, maximum = np.float32(volume_minimum), np.float32(volume_maximum)
    points = reference * (maximum - minimum) + minimum
    points = jnp.asarray(np.concatenate([points, np.ones_like(points[..., :1])], -1))
    # float32 all through: with bfloat16 products, as TPUs make them by default, pixels would be off by several.
    projected = jnp.einsum("bcij,naj->bcnai", lidar_to_image.astype(jnp.float32), points, precision="highest")
    depth = projected[..., 2:3]
    pixels = projected[..., :2] / jnp.maximum(depth, _MIN_DEPTH)
    shares = pixels / jnp.asarray([image_hw[1], image_hw[0]], jnp.float32)
    inside = jnp.all((shares > 0.0) & (shares < 1.0), axis=-1)
    return shares, inside & (depth[..., 0] > _MIN_DEPTH)


class PlaneViews(NamedTuple):
    """What a plane's tokens see: computed once, used by every layer.

    anchors: (u, v) shares of the image, as `sample_points` returns them.
    hit: whether any anchor is visible; such a token takes part in that camera with all its anchors.
    order: token indices, for every camera those that take part first.
    rank: place of every token in ``order``.
    """

    anchors: Float[Array, "batch camera tokens anchors 2"]
    hit: Bool[Array, "batch camera tokens"]
    order: Int[Array, "batch camera tokens"]
    rank: Int[Array, "batch camera tokens"]


def plane_views(
    anchors: Float[Array, "batch camera tokens anchors 2"], visible: Bool[Array, "batch camera tokens anchors"]
) -> PlaneViews:
    """Sorts tokens by whether they take part, so that the attention can stop where nobody does."""
    hit = visible.any(-1)
    order = jnp.argsort(~hit, axis=-1, stable=True).astype(jnp.int32)
    rank = jnp.argsort(order, axis=-1).astype(jnp.int32)
    return PlaneViews(anchors, hit, order, rank)

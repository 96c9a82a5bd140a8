"""Bilinear sampling and resizing of channels-last maps, with the conventions of PyTorch.

Both are written for accelerators: sampling reads whole rows of a flat [height * width, channel] table, and resizing
is two small matrix products, so that its gradient needs no scatter.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def take_rows(table: Float[Array, "*batch rows channel"], index: jax.Array) -> jax.Array:
    """Rows of a table, item by item; the caller promises that every index is inside.

    Args:
      table: [batch, rows, channel].
      index: integers [batch, n].

    Returns:
      [batch, n, channel].
    """
    return jax.vmap(lambda rows, where: rows.at[where].get(mode="promise_in_bounds"))(table, index)


def grid_sample(
    features: Float[Array, "batch height width channel"], grid: Float[Array, "batch *points 2"]
) -> Float[Array, "batch *points channel"]:
    """Reads a map at any positions: `torch.nn.functional.grid_sample` with its defaults.

    Bilinear, zeros outside, `align_corners=False`: -1 and 1 are the outer edges of the first and the last cell.
    Finite coordinates of any size are safe: what lies far outside is clipped before it becomes an integer.

    Args:
      features: the maps.
      grid: positions (x, y), x along the width.

    Returns:
      The sampled features, in the type of `features`.
    """
    batch, height, width, channels = features.shape
    flat_grid = grid.reshape(batch, -1, 2)
    # One cell more than the last position that still touches the map, so that clipping changes nothing there.
    x = jnp.clip(((flat_grid[..., 0] + 1) * width - 1) / 2, -2, width + 1)
    y = jnp.clip(((flat_grid[..., 1] + 1) * height - 1) / 2, -2, height + 1)
    left, top = jnp.floor(x), jnp.floor(y)
    right_share, bottom_share = x - left, y - top
    left, top = left.astype(jnp.int32), top.astype(jnp.int32)
    table = features.reshape(batch, height * width, channels)
    sampled = jnp.zeros((), features.dtype)
    # A plain sum of four weighted gathers is fused into one loop; stacking the corners first would store them.
    for row, row_weight in ((top, 1 - bottom_share), (top + 1, bottom_share)):
        for column, column_weight in ((left, 1 - right_share), (left + 1, right_share)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = jnp.where(inside, row_weight * column_weight, 0)
            index = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
            sampled = sampled + take_rows(table, index) * weight[..., None]
    return sampled.astype(features.dtype).reshape(*grid.shape[:-1], channels)


def _resize_matrix(size: int, new_size: int) -> np.ndarray:
    """Interpolation along one axis: [new_size, size], two weights in every row."""
    position = np.maximum((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0.0)
    lower = np.minimum(position.astype(np.int64), size - 1)
    upper = np.minimum(lower + 1, size - 1)
    share = position - lower
    matrix = np.zeros((new_size, size))
    rows = np.arange(new_size)
    np.add.at(matrix, (rows, lower), 1 - share)
    np.add.at(matrix, (rows, upper), share)
    return matrix


def resize_bilinear(
    features: Float[Array, "batch height width channel"], size: tuple[int, int]
) -> Float[Array, "batch new_height new_width channel"]:
    """Resizes maps: `torch.nn.functional.interpolate(size, mode="bilinear")`, `align_corners=False`, no antialiasing.

    Args:
      features: the maps.
      size: (new_height, new_width), at least 1 each.

    Returns:
      The resized maps.

    Raises:
      ValueError: if a size is below 1.
    """
    if min(size) < 1:
        raise ValueError(f"resize_bilinear needs sizes of at least 1, got {size}")
    _, height, width, _ = features.shape
    rows = jnp.asarray(_resize_matrix(height, size[0]), features.dtype)
    columns = jnp.asarray(_resize_matrix(width, size[1]), features.dtype)
    return jnp.einsum("yh,xw,bhwc->byxc", rows, columns, features)

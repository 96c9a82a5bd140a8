"""Modulated deformable convolution (DCNv2), channels-last, for one deformable group.

Three implementations of one definition. "taps" walks over the taps of the kernel, so that the
sampled columns of one tap are all that ever exists, forwards and backwards, and it works on every image at once, so
that a batch may be spread over devices. "matmul" samples by multiplying the map with a matrix of bilinear coefficients,
some positions at a time: no gather and no scatter, many more multiplications, for accelerators whose gathers are slow
(an infinite cell makes all of its image's results infinite or NaN there).
"reference" samples all taps at once and leaves the gradient to JAX: short, memory-hungry, and there to test against.
"auto" takes the one that was measured to be the fastest at the nearest shape (`choice.py`).

Measured in `benchmarks/deformable_conv.py` and, within the backbone, `benchmarks/backbone_memory.py`.
"""

import functools
import itertools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pop3d_jax.ops.choice import fastest
from pop3d_jax.ops.grid_sample import take_rows

Implementation = Literal["taps", "matmul", "reference"]
_Geometry = tuple[int, int, int]  # stride, padding, dilation
# Positions whose coefficient matrix exists at a time.
_MATMUL_POSITIONS = 128


def deformable_conv2d(
    x: Float[Array, "image height width channel"],
    offset: Float[Array, "image out_height out_width tap 2"],
    mask: Float[Array, "image out_height out_width tap"],
    kernel: Float[Array, "kernel_height kernel_width channel out_channel"],
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    implementation: str = "auto",
) -> Float[Array, "image out_height out_width out_channel"]:
    """A convolution whose taps are moved by `offset` and weighted by `mask`.

    As mmcv's `ModulatedDeformConv2d` without bias: bilinear sampling, zeros outside the map, and no gradient at all
    from a tap that is a full cell or more outside (not even at exactly -1, where bilinear weights have a kink).

    Args:
      x: the maps.
      offset: displacement (dy, dx) of every tap in cells; taps in row-major order.
      mask: factor of every tap, usually a sigmoid.
      kernel: the weights.
      stride: of the output grid, in cells.
      padding: zeros around the map, in cells, all sides.
      dilation: distance between taps, in cells.
      implementation: see the module.

    Returns:
      The convolved maps, in the type of `x`.

    Raises:
      ValueError: if the shapes do not belong together, or the implementation is unknown.
    """
    kernel_height, kernel_width = kernel.shape[:2]
    expected = tuple(
        (size + 2 * padding - dilation * (extent - 1) - 1) // stride + 1
        for size, extent in zip(x.shape[1:3], (kernel_height, kernel_width), strict=True)
    )
    if offset.shape[1:4] != (*expected, kernel_height * kernel_width):
        raise ValueError(
            f"deformable_conv2d: offset {offset.shape} should be [image, {expected[0]}, {expected[1]}, "
            f"{kernel_height * kernel_width}, 2] for x {x.shape}, kernel {kernel.shape}, stride {stride}, "
            f"padding {padding}, dilation {dilation}"
        )
    geometry = (stride, padding, dilation)
    if implementation == "auto":
        # Not the number of images, which the mesh decides: the same network should compute the same on every mesh.
        sizes = {"cells": x.shape[1] * x.shape[2], "channels": x.shape[3]}
        implementation = fastest("deformable_conv2d", "taps", sizes)
    if implementation == "taps":
        return _convolve_by_taps(x, offset, mask, kernel, geometry)
    if implementation == "matmul":
        return _convolve_by_matmul(x, offset, mask, kernel, geometry)
    if implementation == "reference":
        return _convolve_reference(x, offset, mask, kernel, geometry)
    known = (*get_args(Implementation), "auto")
    raise ValueError(f"deformable_conv2d: implementation {implementation!r}; choose from {known}")


def _positions(
    x: jax.Array, offset: jax.Array, kernel_hw: tuple[int, int], geometry: _Geometry
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows and columns where the taps read, in cells, and whether they touch the map: [image, h, w, tap] each."""
    stride, padding, dilation = geometry
    height, width = x.shape[1:3]
    tap_row, tap_column = np.divmod(np.arange(kernel_hw[0] * kernel_hw[1]), kernel_hw[1])
    row = np.arange(offset.shape[1])[:, None, None] * stride - padding + tap_row * dilation
    column = np.arange(offset.shape[2])[:, None] * stride - padding + tap_column * dilation
    # Positions need more digits than bfloat16 has.
    offset = offset.astype(jnp.promote_types(offset.dtype, jnp.float32))
    row, column = offset[..., 0] + row, offset[..., 1] + column
    inside = (row > -1) & (row < height) & (column > -1) & (column < width)
    return row, column, inside


def _convolve_reference(
    x: jax.Array, offset: jax.Array, mask: jax.Array, kernel: jax.Array, geometry: _Geometry
) -> jax.Array:
    images, height, width, channels = x.shape
    row, column, inside = _positions(x, offset, kernel.shape[:2], geometry)
    row, column = jnp.where(inside, row, 0), jnp.where(inside, column, 0)
    top, left = jnp.floor(row), jnp.floor(column)
    sampled = 0
    for down, right in itertools.product((0, 1), (0, 1)):
        corner_row, corner_column = (top + down).astype(jnp.int32), (left + right).astype(jnp.int32)
        on_map = (corner_row >= 0) & (corner_row < height) & (corner_column >= 0) & (corner_column < width)
        weight = (1 - jnp.abs(row - top - down)) * (1 - jnp.abs(column - left - right))
        value = x[
            jnp.arange(images)[:, None, None, None],
            jnp.clip(corner_row, 0, height - 1),
            jnp.clip(corner_column, 0, width - 1),
        ]
        sampled = sampled + value * (weight * (on_map & inside))[..., None]
    columns = sampled * mask[..., None]
    return jnp.einsum("nhwtc,tco->nhwo", columns, kernel.reshape(-1, channels, kernel.shape[-1])).astype(x.dtype)


def _convolve_by_matmul(
    x: jax.Array, offset: jax.Array, mask: jax.Array, kernel: jax.Array, geometry: _Geometry
) -> jax.Array:
    """For some positions at a time: [position x tap, height x width] coefficients times the map, times the kernel."""
    _, height, width, channels = x.shape
    row, column, inside = _positions(x, offset, kernel.shape[:2], geometry)
    row, column = jnp.where(inside, row, 0), jnp.where(inside, column, 0)
    weight = jnp.where(inside, mask, 0).astype(row.dtype)
    positions, taps = row.shape[1] * row.shape[2], row.shape[3]
    # In float32 throughout: coefficients and gradients, summed over chunks, need more digits than bfloat16 has.
    accumulator_type = jnp.promote_types(x.dtype, jnp.float32)
    tap_kernels = kernel.astype(accumulator_type).reshape(taps, channels, -1)
    size = min(_MATMUL_POSITIONS, positions)
    chunks = -(-positions // size)

    def triangle(position: jax.Array, length: int) -> jax.Array:
        floor = jax.lax.stop_gradient(jnp.floor(position))
        fraction = (position - floor)[..., None]
        cell = jnp.arange(length, dtype=position.dtype)
        near, far = cell == floor[..., None], cell == floor[..., None] + 1
        return jnp.where(near, 1 - fraction, 0) + jnp.where(far, fraction, 0)

    def convolve_image(image: jax.Array, *where: jax.Array) -> jax.Array:
        table = image.astype(accumulator_type).reshape(height * width, channels)

        # The matrices are made again in the backward pass, not remembered.
        @jax.checkpoint
        def convolve(total: None, chunk: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
            row, column, weight = chunk
            along_y = triangle(row, height) * weight[..., None]
            coefficients = along_y[..., None] * triangle(column, width)[..., None, :]
            coefficients = coefficients.reshape(size * taps, height * width)
            columns = jnp.dot(coefficients, table, precision="highest").reshape(size, taps, channels)
            return total, jnp.einsum("ptc,tco->po", columns, tap_kernels, precision="highest")

        padded = [
            jnp.pad(array.reshape(positions, taps), ((0, chunks * size - positions), (0, 0))).reshape(
                chunks, size, taps
            )
            for array in where
        ]
        return jax.lax.scan(convolve, None, tuple(padded))[1].reshape(chunks * size, -1)[:positions]

    result = jax.vmap(convolve_image)(x, row, column, weight)
    return result.reshape(*offset.shape[:3], -1).astype(x.dtype)


def _tables(
    x: jax.Array, offset: jax.Array, mask: jax.Array, kernel_hw: tuple[int, int], geometry: _Geometry
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the loop over taps reads.

    Returns:
      The zero-framed maps as rows [image, (height + 2) * (width + 2), channel]; for every tap the row of its upper
      left corner [tap, image, position]; and the weights of its four corners [tap, image, position, 4].
    """
    images, _, width, channels = x.shape
    row, column, inside = _positions(x, offset, kernel_hw, geometry)
    # A tap outside reads cell (0, 0) with weight zero: also safe for huge or undefined positions.
    row, column = jnp.where(inside, row, 0), jnp.where(inside, column, 0)
    top, left = jnp.floor(row), jnp.floor(column)
    down, right = row - top, column - left
    weights = jnp.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], axis=-1)
    weights = weights * jnp.where(inside, mask, 0)[..., None]
    corner = (top.astype(jnp.int32) + 1) * (width + 2) + left.astype(jnp.int32) + 1
    frame = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(images, -1, channels)
    taps = mask.shape[-1]
    return (
        frame,
        jnp.moveaxis(corner.reshape(images, -1, taps), -1, 0),
        jnp.moveaxis(weights.reshape(images, -1, taps, 4), 2, 0),
    )


def _corner_steps(width: int) -> tuple[int, int, int, int]:
    """From a cell of the framed map to itself, its right, its lower and its lower right neighbour."""
    return 0, 1, width + 2, width + 3


def _weighted_sum(corners: list[jax.Array], weights: jax.Array, dtype: jnp.dtype) -> jax.Array:
    columns = sum(corner * weights[..., i : i + 1] for i, corner in enumerate(corners))
    return columns.astype(dtype).reshape(-1, columns.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _convolve_by_taps(
    x: jax.Array, offset: jax.Array, mask: jax.Array, kernel: jax.Array, geometry: _Geometry
) -> jax.Array:
    return _forward(x, offset, mask, kernel, geometry)[0]


def _forward(
    x: jax.Array, offset: jax.Array, mask: jax.Array, kernel: jax.Array, geometry: _Geometry
) -> tuple[jax.Array, tuple]:
    frame, corner, weights = _tables(x, offset, mask, kernel.shape[:2], geometry)
    tap_kernels = kernel.reshape(-1, *kernel.shape[2:])
    steps = _corner_steps(x.shape[2])
    accumulator_type = jnp.promote_types(x.dtype, jnp.float32)

    def convolve_tap(tap_corner: jax.Array, tap_weights: jax.Array, tap_kernel: jax.Array) -> jax.Array:
        corners = [take_rows(frame, tap_corner + step) for step in steps]
        columns = _weighted_sum(corners, tap_weights, x.dtype)
        return jnp.dot(columns, tap_kernel, preferred_element_type=accumulator_type)

    # The sum starts from the first tap, not from zeros: those depend on nothing, and XLA makes the zeros of all layers
    # at the start of the network and keeps them until they are used.
    first, others = (corner[0], weights[0], tap_kernels[0]), (corner[1:], weights[1:], tap_kernels[1:])
    total, _ = jax.lax.scan(lambda total, tap: (total + convolve_tap(*tap), None), convolve_tap(*first), others)
    return total.reshape(*offset.shape[:3], -1).astype(x.dtype), (x, offset, mask, kernel)


def _backward(geometry: _Geometry, residuals: tuple, gradient: jax.Array) -> tuple:
    """Samples again instead of having stored the columns; the scatters of all taps add into one buffer."""
    x, offset, mask, kernel = residuals
    (frame, corner, weights), pull_back = jax.vjp(
        lambda *inputs: _tables(*inputs, kernel.shape[:2], geometry), x, offset, mask
    )
    tap_kernels = kernel.reshape(-1, *kernel.shape[2:])
    steps = _corner_steps(x.shape[2])
    accumulator_type = jnp.promote_types(x.dtype, jnp.float32)
    gradient = gradient.reshape(-1, gradient.shape[-1])
    add_rows = jax.vmap(lambda table, where, rows: table.at[where].add(rows, mode="promise_in_bounds"))

    def undo_tap(frame_gradient: jax.Array, tap: tuple) -> tuple[jax.Array, tuple]:
        tap_corner, tap_weights, tap_kernel = tap
        corners = [take_rows(frame, tap_corner + step) for step in steps]
        columns = _weighted_sum(corners, tap_weights, x.dtype)
        kernel_gradient = jnp.dot(columns.T, gradient, preferred_element_type=accumulator_type)
        column_gradient = jnp.dot(gradient, tap_kernel.T, preferred_element_type=accumulator_type)
        column_gradient = column_gradient.reshape(*tap_corner.shape, -1)
        weight_gradient = jnp.stack([jnp.sum(rows * column_gradient, axis=-1) for rows in corners], axis=-1)
        for i, step in enumerate(steps):
            frame_gradient = add_rows(frame_gradient, tap_corner + step, column_gradient * tap_weights[..., i : i + 1])
        return frame_gradient, (kernel_gradient, weight_gradient)

    frame_gradient, (kernel_gradient, weight_gradient) = jax.lax.scan(
        undo_tap, jnp.zeros(frame.shape, accumulator_type), (corner, weights, tap_kernels)
    )
    no_gradient = np.zeros(corner.shape, jax.dtypes.float0)
    x_gradient, offset_gradient, mask_gradient = pull_back(
        (frame_gradient.astype(frame.dtype), no_gradient, weight_gradient.astype(weights.dtype))
    )
    return x_gradient, offset_gradient, mask_gradient, kernel_gradient.reshape(kernel.shape).astype(kernel.dtype)


_convolve_by_taps.defvjp(_forward, _backward)

"""Deformable attention as matrix products inside a Pallas kernel: what `matmul` does, without its matrices in memory.

A query's bilinear samples of one map are a matrix [height, width] of coefficients, the product of triangles along y
and along x. The kernel makes that matrix for a block of queries in on-chip memory, multiplies it with the map, which
lies there too, and forgets it: main memory sees positions, weights, maps and results only. The backward kernel makes
the matrices again.

Compiled by Mosaic for TPUs; on any other platform the same kernels are interpreted, which is exact and slow.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

# Queries whose matrices are on the chip at a time.
_QUERIES = 32
# Tile of a TPU's registers: rows and lanes.
_ROWS, _LANES = 8, 128
# On-chip memory the kernels may use: maps and their gradients (each twice, for the next head's transfer) and matrices.
_VMEM_BYTES = 60 * 2**20
# Contracted axes of a product: [m, k] [k, n], [m, k] [n, k], [k, m] [k, n].
_PLAIN, _SECOND_TRANSPOSED, _FIRST_TRANSPOSED = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


@jax.custom_vjp
def sample_map(
    feature_map: Float[Array, "head height channel width"],
    x: Float[Array, "head query point"],
    y: Float[Array, "head query point"],
    weights: Float[Array, "head query point"],
) -> Float[Array, "head query channel"]:
    """Weighted sums of bilinear samples, zero outside the map.

    Args:
        feature_map: channels second to last: few channels fill a tile's rows better than its lanes.
        x, y: positions in texels, centres at integers, finite.
        weights: of the samples.

    Returns:
        The sums in float32.
    """
    return _forward(feature_map, x, y, weights)[0]


def _forward(feature_map: Array, x: Array, y: Array, weights: Array) -> tuple[Array, tuple]:
    heads, _, channels, _ = feature_map.shape
    padded_map, samples, sizes = _padded(feature_map, x, y, weights)
    outputs = jax.ShapeDtypeStruct((heads, samples[0].shape[1], channels), jnp.float32)
    call = _call(_forward_kernel, sizes, [outputs], ["query"], matrices=1)
    (result,) = _on_any_platform(call, *samples, padded_map)
    return result[:, : x.shape[1]], (feature_map, x, y, weights)


def _backward(saved: tuple, cotangent: Array) -> tuple[Array, Array, Array, Array]:
    feature_map, x, y, weights = saved
    _, height, _, width = feature_map.shape
    padded_map, samples, sizes = _padded(feature_map, x, y, weights)
    queries, padded_queries = x.shape[1], samples[0].shape[1]
    cotangent = jnp.pad(cotangent, ((0, 0), (0, padded_queries - queries), (0, 0)))
    per_sample = jax.ShapeDtypeStruct(samples[0].shape, jnp.float32)
    outputs = [per_sample] * 3 + [jax.ShapeDtypeStruct(padded_map.shape, jnp.float32)]
    call = _call(_backward_kernel, sizes, outputs, ["query"] * 3 + ["map"], matrices=2)
    *by_sample, by_map = _on_any_platform(call, *samples, padded_map, cotangent)
    by_map = by_map[:, :height, :, :width].astype(feature_map.dtype)
    return by_map, *(array[:, :queries] for array in by_sample)


sample_map.defvjp(_forward, _backward)


def _padded(feature_map: Array, x: Array, y: Array, weights: Array) -> tuple[Array, tuple, tuple[int, ...]]:
    """Maps of whole tiles, blocks of queries (those added weigh nothing), and (height, width, points, channels)."""
    _, height, channels, width = feature_map.shape
    more_rows, more_columns = -height % _ROWS, -width % _LANES
    feature_map = jnp.pad(feature_map, ((0, 0), (0, more_rows), (0, 0), (0, more_columns)))
    more_queries = ((0, 0), (0, -x.shape[1] % _QUERIES), (0, 0))
    samples = tuple(jnp.pad(array.astype(jnp.float32), more_queries) for array in (x, y, weights))
    return feature_map, samples, (height + more_rows, width + more_columns, x.shape[2], channels)


def _call(
    kernel: Callable[..., None],
    sizes: tuple[int, ...],
    outputs: list[jax.ShapeDtypeStruct],
    kinds: list[str],
    matrices: int,
) -> Callable[..., tuple[Array, ...]]:
    """The kernel over all heads and blocks of queries; the blocks of one head follow each other."""
    height, width, points, channels = sizes

    def block(shape: tuple[int, ...], kind: str) -> pl.BlockSpec:
        if kind == "map":
            return pl.BlockSpec((1, *shape[1:]), lambda head, query: (head, 0, 0, 0))
        return pl.BlockSpec((1, _QUERIES, shape[2]), lambda head, query: (head, query, 0))

    def call(*inputs: Array, interpret: bool) -> tuple[Array, ...]:
        heads, queries, _ = inputs[0].shape
        of_inputs = [block(array.shape, "map" if array.ndim == 4 else "query") for array in inputs]
        moved = sum(math.prod(array.shape) * array.dtype.itemsize for array in (*inputs, *outputs))
        results = pl.pallas_call(
            kernel,
            grid=(heads, queries // _QUERIES),
            in_specs=of_inputs,
            out_specs=[block(output.shape, kind) for output, kind in zip(outputs, kinds, strict=True)],
            out_shape=outputs,
            scratch_shapes=[pltpu.VMEM((_QUERIES * height, _LANES), jnp.float32)] * (width // _LANES * matrices),
            # A query's coefficients are one product over points, its result one over texels; backwards, three and two.
            cost_estimate=pl.CostEstimate(
                flops=2 * heads * queries * height * width * (points * (2 * matrices - 1) + channels * matrices),
                bytes_accessed=moved,
                transcendentals=0,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
            ),
            interpret=interpret,
        )(*inputs)
        return tuple(results)

    return call


def _on_any_platform(call: Callable[..., tuple[Array, ...]], *inputs: Array) -> tuple[Array, ...]:
    return jax.lax.platform_dependent(
        *inputs,
        tpu=functools.partial(call, interpret=False),
        default=functools.partial(call, interpret=True),
    )


def _product(a: Array, b: Array, axes: tuple[tuple[int], tuple[int]]) -> Array:
    return jax.lax.dot_general(
        a, b, (axes, ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _triangle(position: Array, size: int) -> tuple[Array, Array]:
    """Coefficients [size, point] of all texels of a row for samples at `position` [1, point], and their slopes."""
    floor = jnp.floor(position)
    fraction = position - floor
    texel = jax.lax.broadcasted_iota(jnp.int32, (size, position.shape[1]), 0).astype(jnp.float32)
    near, far = texel == floor, texel == floor + 1.0
    coefficient = jnp.where(near, 1.0 - fraction, 0.0) + jnp.where(far, fraction, 0.0)
    return coefficient, jnp.where(far, 1.0, 0.0) - jnp.where(near, 1.0, 0.0)


# A block's matrices lie one below the other, cut into pieces of 128 columns: refs of [query x height, 128]. Only so
# can a TPU read the same row of every matrix.


def _matrix_of(query: Array, height: int) -> pl.Slice:
    return pl.ds(pl.multiple_of(query * height, _ROWS), height)


def _read_rows(pieces: Sequence[Any], rows: pl.Slice) -> Array:
    return jnp.concatenate([piece_ref[rows, :] for piece_ref in pieces], axis=1)


def _write_rows(pieces: Sequence[Any], rows: pl.Slice, values: Array) -> None:
    for number, piece_ref in enumerate(pieces):
        piece_ref[rows, :] = values[:, number * _LANES : (number + 1) * _LANES]


def _fill_coefficients(x_ref, y_ref, weights_ref, map_ref, coefficients) -> None:
    """Query after query its matrix [height, width]."""
    _, height, _, width = map_ref.shape

    def fill(query, carry):
        row = pl.ds(query, 1)
        along_y, _ = _triangle(y_ref[0, row, :], height)
        along_x, _ = _triangle(x_ref[0, row, :], width)
        matrix = _product(along_y * weights_ref[0, row, :], along_x, _SECOND_TRANSPOSED)
        _write_rows(coefficients, _matrix_of(query, height), matrix)
        return carry

    jax.lax.fori_loop(0, _QUERIES, fill, 0)


def _forward_kernel(x_ref, y_ref, weights_ref, map_ref, result_ref, *coefficients) -> None:
    _fill_coefficients(x_ref, y_ref, weights_ref, map_ref, coefficients)
    _, height, channels, _ = map_ref.shape

    def add_row(line, total):
        # The same row of every query's matrix.
        rows = _read_rows(coefficients, pl.ds(line, _QUERIES, stride=height))
        return total + _product(rows, map_ref[0, line].astype(jnp.float32), _SECOND_TRANSPOSED)

    zeros = jnp.zeros((_QUERIES, channels), jnp.float32)
    result_ref[0] = jax.lax.fori_loop(0, height, add_row, zeros)


def _backward_kernel(
    x_ref,
    y_ref,
    weights_ref,
    map_ref,
    cotangent_ref,
    by_x_ref,
    by_y_ref,
    by_weight_ref,
    by_map_ref,
    *pieces,
) -> None:
    coefficients, by_coefficient = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]
    _fill_coefficients(x_ref, y_ref, weights_ref, map_ref, coefficients)
    _, height, _, width = map_ref.shape

    # The blocks of one head add up in one gradient of its map.
    @pl.when(pl.program_id(1) == 0)
    def _():
        by_map_ref[...] = jnp.zeros_like(by_map_ref)

    def line_of_map(line, carry):
        rows = pl.ds(line, _QUERIES, stride=height)
        cotangent = cotangent_ref[0]
        _write_rows(by_coefficient, rows, _product(cotangent, map_ref[0, line].astype(jnp.float32), _PLAIN))
        by_map_ref[0, line] += _product(cotangent, _read_rows(coefficients, rows), _FIRST_TRANSPOSED)
        return carry

    jax.lax.fori_loop(0, height, line_of_map, 0)

    def query_of_block(query, carry):
        row = pl.ds(query, 1)
        matrix = _read_rows(by_coefficient, _matrix_of(query, height))
        along_y, slope_y = _triangle(y_ref[0, row, :], height)
        along_x, slope_x = _triangle(x_ref[0, row, :], width)
        weights = weights_ref[0, row, :]
        by_line = _product(matrix, along_x, _PLAIN)
        by_column = _product(matrix, along_y, _FIRST_TRANSPOSED)
        by_weight_ref[0, row, :] = jnp.sum(along_y * by_line, axis=0, keepdims=True)
        by_y_ref[0, row, :] = weights * jnp.sum(slope_y * by_line, axis=0, keepdims=True)
        by_x_ref[0, row, :] = weights * jnp.sum(slope_x * by_column, axis=0, keepdims=True)
        return carry

    jax.lax.fori_loop(0, _QUERIES, query_of_block, 0)

"""Multi-scale deformable attention: every query reads a few weighted bilinear samples of several feature maps.

Five implementations of one function, tested against each other:

* ``reference``: the definition, all samples at once. Short, and hungry for memory.
* ``gather``: one row gather per sample corner. The rows are read a few samples at a time and summed on the
  spot, so no array of size queries x samples x channels ever exists, neither forward nor backward.
* ``packed``: the same with the four corners of every texel side by side in one row: a quarter of the gathers, rows
  four times as long (with 32 channels a head they fill the 128 lanes of a TPU, which pads them to that anyway).
* ``matmul``: the samples become a sparse [queries, height x width] matrix that multiplies the map. No gather
  and no scatter, many more multiplications: for accelerators whose gathers are slow, or for tiny maps.
* ``pallas``: the same inside a kernel for TPUs that keeps the matrix on the chip; interpreted, very slowly, elsewhere.

``auto`` takes the one that was measured to be the fastest at the nearest shape (`choice.py`).

In ``matmul`` and ``pallas`` every query multiplies every texel, if by zero: an infinite or NaN texel spoils them all.

All keep the batch axes as axes of one program, so that they may be sharded. `benchmarks/deformable_attention.py` tells
what each costs.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pop3d_jax.ops.choice import fastest
from pop3d_jax.ops.deformable_attention_pallas import sample_map

Implementation = Literal["reference", "gather", "packed", "matmul", "pallas"]
SpatialShapes = tuple[tuple[int, int], ...]

# Corners read per step of the gather loop. More only costs memory; fewer makes the loop the cost.
_GROUP = 8
# Queries whose coefficient matrices exist at a time.
_MATMUL_QUERIES = 128


def deformable_attention(
    values: Float[Array, "*batch tokens heads channels"],
    spatial_shapes: SpatialShapes,
    sampling_locations: Float[Array, "*batch queries heads levels points 2"],
    attention_weights: Float[Array, "*batch queries heads levels points"],
    *,
    implementation: Implementation | Literal["auto"] = "auto",
) -> Float[Array, "*batch queries heads channels"]:
    """Weighted sum of bilinear samples; the function of mmcv's ``multi_scale_deformable_attn_pytorch``.

    Args:
        values: feature maps, the levels' tokens one after the other, each level row by row.
        spatial_shapes: static (height, width) of each level.
        sampling_locations: (x, y), where a map spans [0, 1]; texel centres lie at (index + 0.5) / size, outside
            is zero. Any finite or infinite value is safe.
        attention_weights: weight of each sample (the caller's softmax).
        implementation: see the module.

    Returns:
        One vector per query and head, in the type of ``values``; sums are made in float32.

    Raises:
        ValueError: the shapes do not add up to the number of tokens or levels, or an unknown implementation.
    """
    tokens, levels = values.shape[-3], sampling_locations.shape[-3]
    if sum(h * w for h, w in spatial_shapes) != tokens or len(spatial_shapes) != levels:
        raise ValueError(
            f"spatial_shapes {spatial_shapes} must describe the {tokens} tokens of values and the {levels} levels "
            "of sampling_locations"
        )
    implementation = resolve(implementation, tokens, attention_weights.shape[-4:])
    prepared = prepare_values(values, spatial_shapes, implementation)
    return attend_prepared(
        prepared, spatial_shapes, sampling_locations, attention_weights, implementation=implementation
    )


def resolve(
    implementation: Implementation | Literal["auto"], texels: int, weights_shape: tuple[int, ...]
) -> Implementation:
    """An implementation's name; for "auto" that of the fastest for [queries, heads, levels, points] on the platform."""
    if implementation != "auto":
        return implementation
    queries, *samples = weights_shape
    sizes = {"queries": queries, "texels": texels, "samples": math.prod(samples)}
    return fastest("deformable_attention", "gather", sizes)


def prepare_values(
    values: Float[Array, "*batch tokens heads channels"], spatial_shapes: SpatialShapes, implementation: Implementation
) -> Float[Array, "*batch rows heads row_channels"]:
    """What an implementation reads: the values themselves, or their corners packed. Once for many queries."""
    if implementation != "packed":
        return values
    start, packed = 0, []
    for height, width in spatial_shapes:
        level = values[..., start : start + height * width, :, :]
        level = level.reshape(*values.shape[:-3], height, width, *values.shape[-2:])
        frame = [(0, 0)] * len(values.shape[:-3]) + [(1, 1), (1, 1), (0, 0), (0, 0)]
        level = jnp.pad(level, frame)
        above, below = level[..., :-1, :, :, :], level[..., 1:, :, :, :]
        corners = [rows[..., side, :, :] for rows in (above, below) for side in (slice(None, -1), slice(1, None))]
        level = jnp.concatenate(corners, axis=-1)
        packed.append(level.reshape(*values.shape[:-3], -1, *level.shape[-2:]))
        start += height * width
    return jnp.concatenate(packed, axis=-3)


def attend_prepared(
    prepared: Float[Array, "*batch rows heads row_channels"],
    spatial_shapes: SpatialShapes,
    sampling_locations: Float[Array, "*batch queries heads levels points 2"],
    attention_weights: Float[Array, "*batch queries heads levels points"],
    *,
    implementation: Implementation,
) -> Float[Array, "*batch queries heads channels"]:
    """`deformable_attention` of values from `prepare_values`.

    Raises:
        ValueError: an unknown implementation.
    """
    if implementation not in _PER_ITEM:
        raise ValueError(f"unknown implementation {implementation!r} of deformable_attention: not in {list(_PER_ITEM)}")
    attend = functools.partial(_PER_ITEM[implementation], spatial_shapes)
    batch = prepared.shape[:-3]
    queries, heads = attention_weights.shape[-4:-2]
    if not queries:
        channels = prepared.shape[-1] // (4 if implementation == "packed" else 1)
        return jnp.zeros((*batch, queries, heads, channels), prepared.dtype)
    # Batch axes of size 1 are left out of the program: XLA's CPU backend (jax 0.10.2) has compiled gradients of
    # the gather loop, batched over one such axis and a larger one, to a program that crashes.
    real = tuple(n for n in batch if n != 1)
    for _ in real:
        attend = jax.vmap(attend)
    arguments = (prepared, sampling_locations.astype(jnp.float32), attention_weights.astype(jnp.float32))
    result = attend(*(x.reshape(real + x.shape[len(batch) :]) for x in arguments))
    return result.reshape(batch + result.shape[len(real) :]).astype(prepared.dtype)


def _attend_reference(
    spatial_shapes: SpatialShapes,
    values: Float[Array, "tokens heads channels"],
    locations: Float[Array, "queries heads levels points 2"],
    weights: Float[Array, "queries heads levels points"],
) -> Float[Array, "queries heads channels"]:
    """One item, by the definition."""
    total = jnp.float32(0.0)
    start = 0
    head = jnp.arange(locations.shape[1])[:, None]
    for level, (height, width) in enumerate(spatial_shapes):
        near_x, share_x = _split(_texel(locations[:, :, level, :, 0], width))
        near_y, share_y = _split(_texel(locations[:, :, level, :, 1], height))
        for y, weight_y in ((near_y, 1 - share_y), (near_y + 1, share_y)):
            for x, weight_x in ((near_x, 1 - share_x), (near_x + 1, share_x)):
                inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
                token = start + jnp.clip(y, 0, height - 1) * width + jnp.clip(x, 0, width - 1)
                rows = values[token, head].astype(jnp.float32)
                coefficient = weights[:, :, level] * jnp.where(inside, weight_x * weight_y, 0.0)
                total += jnp.einsum("qhp,qhpc->qhc", coefficient, rows, precision="highest")
        start += height * width
    return total


def _near(
    spatial_shapes: SpatialShapes,
    locations: Float[Array, "queries heads levels points 2"],
    weights: Float[Array, "queries heads levels points"],
) -> tuple[Array, Array, Array, np.ndarray]:
    """Samples outermost: [xy, level, point, query x head] upper left texel and fraction, weights, sizes of levels."""
    height, width = np.array(spatial_shapes, np.int32).T[:, :, None, None]
    size = np.stack([width, height])
    locations = jnp.transpose(locations, (4, 2, 3, 0, 1)).reshape(2, *locations.shape[2:4], -1)
    weights = jnp.transpose(weights, (2, 3, 0, 1)).reshape(locations.shape[1:])
    return *_split(_texel(locations, size)), weights, size


def _attend_by_gather(
    spatial_shapes: SpatialShapes,
    values: Float[Array, "tokens heads channels"],
    locations: Float[Array, "queries heads levels points 2"],
    weights: Float[Array, "queries heads levels points"],
) -> Float[Array, "queries heads channels"]:
    """One item: the four corners of every sample as rows of ``values`` with coefficients.

    All levels and corners are one array each: a loop over them would be the same work in many more operations.
    """
    near, fraction, weights, size = _near(spatial_shapes, locations, weights)
    start = np.cumsum([0] + [h * w for h, w in spatial_shapes[:-1]], dtype=np.int32)[:, None, None]
    corner = jnp.stack([near, near + 1])
    share = jnp.where((corner >= 0) & (corner < size), jnp.stack([1.0 - fraction, fraction]), 0.0)
    column, line = jnp.moveaxis(jnp.clip(corner, 0, size - 1), 1, 0)
    token = (start + line * size[0])[:, None] + column
    coefficients = weights * (share[:, 1][:, None] * share[:, 0])
    return _sum_of_rows(values, token, coefficients[None], locations.shape[0])


def _attend_by_packed_rows(
    spatial_shapes: SpatialShapes,
    packed: Float[Array, "rows heads row_channels"],
    locations: Float[Array, "queries heads levels points 2"],
    weights: Float[Array, "queries heads levels points"],
) -> Float[Array, "queries heads channels"]:
    """One item: every sample is one row that holds its four corners; the maps have a frame of zeros."""
    near, fraction, weights, size = _near(spatial_shapes, locations, weights)
    start = np.cumsum([0] + [(h + 1) * (w + 1) for h, w in spatial_shapes[:-1]], dtype=np.int32)[:, None, None]
    touches = jnp.all((near >= -1) & (near < size), axis=0)
    column, line = jnp.clip(near, -1, size - 1) + 1
    cell = start + line * (size[0] + 1) + column
    x, y = fraction
    shares = jnp.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x])
    return _sum_of_rows(packed, cell, jnp.where(touches, weights, 0.0) * shares, locations.shape[0])


def _sum_of_rows(
    values: Float[Array, "rows heads row_channels"],
    row: Int[Array, "*samples terms"],
    coefficients: Float[Array, "parts *samples terms"],
    queries: int,
) -> Float[Array, "queries heads channels"]:
    """Sums over samples; the last axis of ``row`` runs over queries and heads, heads fastest; a head reads its own."""
    heads = values.shape[1]
    row = row * heads + jnp.tile(jnp.arange(heads, dtype=jnp.int32), queries)
    terms = (-1, queries * heads)
    table = values.reshape(-1, values.shape[-1])
    result = _weighted_row_sum(table, row.reshape(terms), coefficients.reshape(len(coefficients), *terms))
    return result.reshape(queries, heads, -1)


def _attend_by_matmul(
    spatial_shapes: SpatialShapes,
    values: Float[Array, "tokens heads channels"],
    locations: Float[Array, "queries heads levels points 2"],
    weights: Float[Array, "queries heads levels points"],
) -> Float[Array, "queries heads channels"]:
    """One item: per level the matrix of bilinear coefficients, then a product with the map, some queries at a time.

    A sample's coefficients are the product of two triangles, along x and along y: their sum over the samples is a
    matrix product, too. The matrices are made again in the backward pass, not remembered.
    """

    @jax.checkpoint
    def attend(chunk):
        locations, weights = chunk
        result = jnp.float32(0.0)
        start = 0
        for level, (height, width) in enumerate(spatial_shapes):
            along_x = _bilinear_row(_texel(locations[:, :, level, :, 0], width), width)
            along_y = _bilinear_row(_texel(locations[:, :, level, :, 1], height), height)
            along_y = along_y * weights[:, :, level, :, None]
            coefficients = jnp.einsum("qhpy,qhpx->hqyx", along_y, along_x, precision="highest")
            feature_map = values[start : start + height * width].astype(jnp.float32)
            coefficients = coefficients.reshape(coefficients.shape[:2] + (height * width,))
            result += jnp.einsum("hqt,thc->qhc", coefficients, feature_map, precision="highest")
            start += height * width
        return result

    queries = locations.shape[0]
    chunks = -(-queries // _MATMUL_QUERIES)
    padding = chunks * _MATMUL_QUERIES - queries

    def chunked(array: Array) -> Array:
        padded = jnp.pad(array, ((0, padding),) + ((0, 0),) * (array.ndim - 1))
        return padded.reshape(chunks, _MATMUL_QUERIES, *array.shape[1:])

    if chunks == 1:
        return attend((locations, weights))
    results = jax.lax.map(attend, (chunked(locations), chunked(weights)))
    return results.reshape(-1, *results.shape[2:])[:queries]


def _attend_by_pallas(
    spatial_shapes: SpatialShapes,
    values: Float[Array, "tokens heads channels"],
    locations: Float[Array, "queries heads levels points 2"],
    weights: Float[Array, "queries heads levels points"],
) -> Float[Array, "queries heads channels"]:
    """One item: the levels' kernels, summed."""
    result = jnp.float32(0.0)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        feature_map = values[start : start + height * width].reshape(height, width, *values.shape[1:])
        x, y = (_texel(locations[:, :, level, :, axis], size) for axis, size in ((0, width), (1, height)))
        # The kernel finds no texel at a position that is not a number; it must not hide one.
        of_level = jnp.where(jnp.isnan(x + y), jnp.nan, weights[:, :, level])
        by_head = (jnp.swapaxes(array, 0, 1) for array in (x, y, of_level))
        result += sample_map(jnp.transpose(feature_map, (2, 0, 3, 1)), *by_head)
        start += height * width
    return jnp.swapaxes(result, 0, 1)


def _texel(location: Float[Array, "*shape"], size: int | Int[np.ndarray, "..."]) -> Float[Array, "*shape"]:
    """Location in [0, 1] to texels (centres at integers), clipped to a little more than the map.

    Clipped, because the cast to an integer of a coordinate near 1e9 (a point behind the camera) is undefined, and
    every sample so far outside is zero anyway. By way of [-1, 1], as the official ``grid_sample``, whose roundings
    decide on which side a sample on a texel's centre falls, and so its slope. The clips stand where a compiler
    would otherwise simplify these roundings away.
    """
    from_centre = jnp.clip(2.0 * location - 1.0, -9.0, 9.0)
    return jnp.clip((from_centre + 1.0) * np.float32(size / 2), -5.0 * size, 6.0 * size) - 0.5


def _split(position: Float[Array, "*shape"]) -> tuple[Int[Array, "*shape"], Float[Array, "*shape"]]:
    """Integer part and fraction; the slope with respect to the position is the fraction's, as officially."""
    floor = jnp.floor(position)
    return floor.astype(jnp.int32), position - jax.lax.stop_gradient(floor)


def _bilinear_row(position: Float[Array, "*shape"], size: int) -> Float[Array, "*shape {size}"]:
    """Coefficients of all ``size`` texels for a sample at ``position`` (in texels); zero where outside."""
    index, fraction = _split(position)
    texel = jnp.arange(size, dtype=jnp.int32)
    near, far = texel == index[..., None], texel == index[..., None] + 1
    return jnp.where(near, 1.0 - fraction[..., None], 0.0) + jnp.where(far, fraction[..., None], 0.0)


@jax.custom_vjp
def _weighted_row_sum(
    table: Float[Array, "rows row_channels"],
    index: Int[Array, "terms sums"],
    coefficient: Float[Array, "parts terms sums"],
) -> Float[Array, "sums channels"]:
    """``sum_pk coefficient[p, k] * part p of table[index[k]]`` in float32, a few k at a time; indices must be in range.

    A row is ``parts`` vectors of ``channels``, one after the other.
    """
    parts = coefficient.shape[0]
    channels = table.shape[1] // parts

    def add(total, group):
        group_index, group_coefficient = group
        for k in range(group_index.shape[0]):
            row = table.at[group_index[k]].get(mode="promise_in_bounds").astype(jnp.float32)
            for part in range(parts):
                vector = row[:, part * channels : (part + 1) * channels]
                total += group_coefficient[part, k][:, None] * vector
        return total, None

    total = jnp.zeros((index.shape[1], channels), jnp.float32)
    return jax.lax.scan(add, total, (_grouped(index, parts), _grouped_parts(coefficient)))[0]


def _weighted_row_sum_forward(table, index, coefficient):
    return _weighted_row_sum(table, index, coefficient), (table, index, coefficient)


def _weighted_row_sum_backward(saved, cotangent):
    """Reads the rows again instead of keeping them: what is saved are the arguments only."""
    table, index, coefficient = saved
    parts, terms, sums = coefficient.shape

    def step(table_cotangent, group):
        group_index, group_coefficient = group
        rows = table.at[group_index].get(mode="promise_in_bounds").astype(jnp.float32)
        rows = rows.reshape(*rows.shape[:2], parts, -1)
        coefficient_cotangent = jnp.einsum("kspc,sc->pks", rows, cotangent, precision="highest")
        update = jnp.moveaxis(group_coefficient, 0, -1)[..., None] * cotangent[:, None]
        update = update.reshape(*group_index.shape, -1)
        return table_cotangent.at[group_index].add(update, mode="promise_in_bounds"), coefficient_cotangent

    table_cotangent, coefficient_cotangent = jax.lax.scan(
        step, jnp.zeros(table.shape, jnp.float32), (_grouped(index, parts), _grouped_parts(coefficient))
    )
    coefficient_cotangent = jnp.moveaxis(coefficient_cotangent, 1, 0).reshape(parts, -1, sums)[:, :terms]
    return table_cotangent.astype(table.dtype), None, coefficient_cotangent


_weighted_row_sum.defvjp(_weighted_row_sum_forward, _weighted_row_sum_backward)


def _grouped(terms: Array, parts: int) -> Array:
    """[terms, sums] -> [steps, terms of a step, sums], padded with index 0 or coefficient 0 (which add nothing)."""
    size = max(_GROUP // parts, 1)
    padded = jnp.pad(terms, ((0, -terms.shape[0] % size), (0, 0)))
    return padded.reshape(-1, size, terms.shape[1])


def _grouped_parts(coefficient: Array) -> Array:
    """[parts, terms, sums] -> [steps, parts, terms of a step, sums]."""
    parts = coefficient.shape[0]
    return jnp.moveaxis(jax.vmap(lambda terms: _grouped(terms, parts))(coefficient), 0, 1)


_PER_ITEM: dict[str, Callable[..., Array]] = {
    "reference": _attend_reference,
    "gather": _attend_by_gather,
    "packed": _attend_by_packed_rows,
    "matmul": _attend_by_matmul,
    "pallas": _attend_by_pallas,
}

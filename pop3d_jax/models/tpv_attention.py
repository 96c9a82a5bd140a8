"""The two attentions of the TPV encoder (Huang et al. 2023, tri-perspective view)."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pop3d_jax.models.layers import dropout, xavier_uniform
from pop3d_jax.models.tpv_geometry import PlaneViews, cell_centres
from pop3d_jax.ops.deformable_attention import (
    Implementation,
    SpatialShapes,
    attend_prepared,
    deformable_attention,
    prepare_values,
    resolve,
)
from pop3d_jax.sharding import per_device, sum_over_views

# The hybrid attention's queue holds the same queries twice, each copy with its own samples.
_QUEUE = 2
# Samples (queries x heads x levels x points) per camera and step of the image attention: bounds its memory.
_SAMPLES_PER_STEP = 2**18
# At least so many steps, because steps in which no camera has a query left are skipped.
_MIN_STEPS = 8


def _star(heads: int) -> Float[np.ndarray, "heads 2"]:
    """One direction per head, spread over the circle and stretched to the unit square."""
    angle = np.arange(heads) * (2.0 * math.pi / heads)
    direction = np.stack([np.cos(angle), np.sin(angle)], -1)
    return direction / np.abs(direction).max(-1, keepdims=True)


def _offset_bias(heads: int, repeat: int, steps: int, copies: int) -> Float[np.ndarray, " size"]:
    """Initial sampling offsets [heads, repeat, copies, steps, xy]: a group goes outwards, 1, 2, ... texels."""
    offsets = _star(heads)[:, None, None, None] * np.arange(1, steps + 1)[:, None]
    return np.broadcast_to(offsets, (heads, repeat, copies, steps, 2)).reshape(-1).astype(np.float32)


def _constant_linear(in_dims: int, bias: Float[np.ndarray, " size"], rngs: nnx.Rngs) -> nnx.Linear:
    """Zero kernel, given bias. Always float32: its outputs are positions, or weights that are summed to one."""
    layer = nnx.Linear(in_dims, bias.size, kernel_init=nnx.initializers.zeros, dtype=jnp.float32, rngs=rngs)
    layer.bias[...] = jnp.asarray(bias)
    return layer


def _xavier_linear(dims: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(dims, dims, kernel_init=xavier_uniform, dtype=dtype, rngs=rngs)


class HybridSelfAttention(nnx.Module):
    """Deformable self-attention of one plane; the official ``TPVCrossViewHybridAttention``.

    Officially the queue is a batch of twice the same values whose outputs are averaged. The values being the same, it
    is one attention with the samples of both and half of each weight.
    """

    def __init__(
        self,
        embed_dims: int,
        heads: int,
        points: int,
        *,
        dropout_rate: float,
        implementation: Implementation | Literal["auto"],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.points = heads, points
        self.dropout_rate, self.implementation = dropout_rate, implementation
        joint = embed_dims * _QUEUE
        self.sampling_offsets = _constant_linear(joint, _offset_bias(heads, _QUEUE, points, 1), rngs)
        self.attention_weights = _constant_linear(joint, np.zeros(heads * _QUEUE * points, np.float32), rngs)
        self.value_proj = _xavier_linear(embed_dims, dtype, rngs)
        self.output_proj = _xavier_linear(embed_dims, dtype, rngs)

    def __call__(
        self,
        queries: Float[Array, "batch tokens channels"],
        position: Float[Array, "tokens channels"],
        shape: tuple[int, int],
        dropout_key: PRNGKeyArray | Array | None,
    ) -> Float[Array, "batch tokens channels"]:
        """Attends; the input is added to the output.

        Args:
            queries: the plane's tokens, row by row; also the values.
            position: its positional encoding.
            shape: (rows, columns) of the plane.
            dropout_key: None for inference.
        """
        batch, tokens, _ = queries.shape
        joint = jnp.concatenate([queries, queries + position.astype(queries.dtype)], -1)
        offsets = self.sampling_offsets(joint).reshape(batch, tokens, self.heads, 1, _QUEUE * self.points, 2)
        weights = self.attention_weights(joint).reshape(batch, tokens, self.heads, _QUEUE, self.points)
        weights = jax.nn.softmax(weights, axis=-1).reshape(offsets.shape[:-1]) / _QUEUE
        locations = cell_centres(shape)[:, None, None, None] + offsets / np.float32([shape[1], shape[0]])
        values = self.value_proj(queries).reshape(batch, tokens, self.heads, -1)
        attend = functools.partial(_attend_plane, shape, self.implementation)
        attended = per_device(attend, [("batch",)] * 3, ("batch",))(values, locations, weights).reshape(queries.shape)
        return dropout(self.output_proj(attended), self.dropout_rate, dropout_key) + queries


class ImageCrossAttention(nnx.Module):
    """Deformable attention of the planes' tokens into the images; the official ``TPVImageCrossAttention``.

    A token attends in every camera that sees any of its anchors, and the cameras' results are averaged. The camera
    axis is carried through as an axis and summed once, so it may be sharded.
    """

    def __init__(
        self,
        embed_dims: int,
        heads: int,
        levels: int,
        anchors: tuple[int, int, int],
        points: tuple[int, int, int],
        *,
        dropout_rate: float,
        implementation: Implementation | Literal["auto"],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.levels, self.points = heads, levels, points
        self.dropout_rate, self.implementation = dropout_rate, implementation
        self.sampling_offsets = nnx.List(
            [
                _constant_linear(embed_dims, _offset_bias(heads, levels, p // a, a), rngs)
                for p, a in zip(points, anchors, strict=True)
            ]
        )
        self.attention_weights = nnx.List(
            [_constant_linear(embed_dims, np.zeros(heads * levels * p, np.float32), rngs) for p in points]
        )
        self.value_proj = _xavier_linear(embed_dims, dtype, rngs)
        self.output_proj = _xavier_linear(embed_dims, dtype, rngs)

    def __call__(
        self,
        planes: tuple[Float[Array, "batch _ channels"], ...],
        features: Float[Array, "batch camera texels channels"],
        spatial_shapes: SpatialShapes,
        views: tuple[PlaneViews, ...],
        dropout_key: PRNGKeyArray | Array | None,
    ) -> Float[Array, "batch tokens channels"]:
        """Attends; the input is added to the output.

        Args:
            planes: tokens of hw, zh, wz.
            features: the images' feature maps, levels one after the other, embeddings added.
            spatial_shapes: (height, width) of the levels.
            views: where the tokens of each plane look.
            dropout_key: None for inference.

        Returns:
            The tokens of the three planes, one after the other.
        """
        values = self.value_proj(features)
        values = values.reshape(values.shape[:3] + (self.heads, -1))
        attended = []
        for i, (queries, view) in enumerate(zip(planes, views, strict=True)):
            batch, tokens, _ = queries.shape
            shape = (batch, tokens, self.heads, self.levels, self.points[i])
            offsets = self.sampling_offsets[i](queries).reshape(*shape, 2)
            # In texels up to here; the softmax runs over the samples of all levels together.
            offsets = offsets / np.float32([[w, h] for h, w in spatial_shapes])[:, None]
            weights = self.attention_weights[i](queries).reshape(batch, tokens, self.heads, -1)
            weights = jax.nn.softmax(weights, axis=-1).reshape(shape)
            attend = functools.partial(_attend_views, spatial_shapes, self.implementation)
            split = [("batch", "camera"), ("batch",), ("batch",), ("batch", "camera")]
            attended.append(per_device(attend, split, ("batch",))(values, offsets, weights, view))
        attended = jnp.concatenate(attended, axis=1).astype(values.dtype)
        planes = jnp.concatenate(planes, axis=1)
        return dropout(self.output_proj(attended), self.dropout_rate, dropout_key) + planes


def _attend_plane(
    shape: tuple[int, int],
    implementation: Implementation | Literal["auto"],
    values: Float[Array, "batch tokens heads head_channels"],
    locations: Float[Array, "batch tokens heads 1 points 2"],
    weights: Float[Array, "batch tokens heads 1 points"],
) -> Float[Array, "batch tokens heads head_channels"]:
    return deformable_attention(values, (shape,), locations, weights, implementation=implementation)


def _attend_views(
    spatial_shapes: SpatialShapes,
    implementation: Implementation | Literal["auto"],
    values: Float[Array, "batch camera texels heads head_channels"],
    offsets: Float[Array, "batch tokens heads levels points 2"],
    weights: Float[Array, "batch tokens heads levels points"],
    view: PlaneViews,
) -> Float[Array, "batch tokens channels"]:
    """Mean over the cameras that a token takes part in, all devices' cameras; zero where there is none.

    A loop over slices of the tokens, sorted for each camera so that those that take part come first: nothing of the
    size of all samples exists at a time, forward or backward, and slices in which no camera has a token left are
    skipped (most of plane hw: a camera sees a quarter of the ground).
    """
    batch, camera, tokens = view.hit.shape
    samples = math.prod(weights.shape[2:])
    size = max(1, min(_SAMPLES_PER_STEP // samples, -(-tokens // _MIN_STEPS)))
    steps = -(-tokens // size)
    order = jnp.pad(view.order, ((0, 0), (0, 0), (0, steps * size - tokens)))
    order = jnp.moveaxis(order.reshape(batch, camera, steps, size), 2, 0)
    needed = view.hit.sum(-1).max()
    per_anchor = weights.shape[-1] // view.anchors.shape[-2]

    implementation = resolve(implementation, values.shape[2], (size, *weights.shape[2:]))
    prepared = prepare_values(values, spatial_shapes, implementation)

    def attend(chosen: Array) -> Array:
        chosen_offsets = jax.vmap(lambda x, i: x[i])(offsets, chosen)
        chosen_weights = jax.vmap(lambda x, i: x[i])(weights, chosen)
        anchors = jax.vmap(jax.vmap(lambda x, i: x[i]))(view.anchors, chosen)
        anchors = jnp.repeat(anchors, per_anchor, axis=-2)[..., None, None, :, :]
        result = attend_prepared(
            prepared, spatial_shapes, anchors + chosen_offsets, chosen_weights, implementation=implementation
        )
        return result.reshape(batch, camera, size, -1)

    # Checkpointed outside the condition: what a branch remembers would be copied for every step.
    @jax.checkpoint
    def step(_, slice_):
        start, chosen = slice_
        nothing = jnp.zeros((batch, camera, size, values.shape[-2] * values.shape[-1]), values.dtype)
        return None, jax.lax.cond(start < needed, attend, lambda _: nothing, chosen)

    _, results = jax.lax.scan(step, None, (jnp.arange(steps) * size, order))
    results = jnp.moveaxis(results, 0, 2).reshape(batch, camera, steps * size, -1)
    results = jax.vmap(jax.vmap(lambda x, i: x[i]))(results, view.rank).astype(jnp.float32)
    total = jnp.where(view.hit[..., None], results, 0.0).sum(1)
    total, seen_by = sum_over_views((total, view.hit.sum(1)))
    return total / jnp.maximum(seen_by, 1)[..., None]

"""The TPV encoder: six cameras' feature pyramids into three planes through the volume (Huang et al. 2023)."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pop3d_jax.models.layers import dropout, linear, split_keys, xavier_uniform
from pop3d_jax.models.tpv_attention import HybridSelfAttention, ImageCrossAttention
from pop3d_jax.models.tpv_geometry import (
    PLANES,
    PlaneViews,
    plane_shapes,
    plane_views,
    reference_points,
    sample_points,
)
from pop3d_jax.ops.deformable_attention import Implementation, SpatialShapes

Capture = dict[str, Any] | None


class TPVPlanes(NamedTuple):
    """Features of the three planes as images."""

    hw: Float[Array, "batch y x channels"]
    zh: Float[Array, "batch z y channels"]
    wz: Float[Array, "batch x z channels"]


class PositionalEncoding(nnx.Module):
    """mmdet's ``LearnedPositionalEncoding``: half of the channels say the column, the other half the row."""

    def __init__(self, shape: tuple[int, int], embed_dims: int, *, rngs: nnx.Rngs) -> None:
        self.row_embed = nnx.Param(xavier_uniform(rngs.params(), (shape[0], embed_dims // 2)))
        self.col_embed = nnx.Param(xavier_uniform(rngs.params(), (shape[1], embed_dims // 2)))

    def __call__(self) -> Float[Array, "tokens channels"]:
        """The encoding of every token of the plane, row by row; column half first."""
        row, column = self.row_embed[...], self.col_embed[...]
        grid = (row.shape[0], column.shape[0], row.shape[1])
        both = [jnp.broadcast_to(column[None], grid), jnp.broadcast_to(row[:, None], grid)]
        return jnp.concatenate(both, -1).reshape(-1, 2 * grid[-1])


class FeedForward(nnx.Module):
    """mmcv's ``FFN``: two linear layers with a ReLU; the input is added to the output."""

    def __init__(
        self, embed_dims: int, hidden_dims: int, *, dropout_rate: float, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.dropout_rate = dropout_rate
        self.expand = linear(embed_dims, hidden_dims, kernel_init=xavier_uniform, dtype=dtype, rngs=rngs)
        self.contract = linear(hidden_dims, embed_dims, kernel_init=xavier_uniform, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*batch channels"], dropout_key: PRNGKeyArray | Array | None
    ) -> Float[Array, "*batch channels"]:
        """Applies the layers; ``dropout_key`` None for inference."""
        inner, outer = split_keys(dropout_key, 2)
        hidden = dropout(jax.nn.relu(self.expand(x)), self.dropout_rate, inner)
        return x + dropout(self.contract(hidden), self.dropout_rate, outer)


class TPVLayer(nnx.Module):
    """Self-attention on hw, image attention and feed-forward on all planes, each followed by a LayerNorm."""

    def __init__(
        self,
        embed_dims: int,
        heads: int,
        levels: int,
        self_attention_points: int,
        anchors: tuple[int, int, int],
        points: tuple[int, int, int],
        feedforward_dims: int,
        *,
        dropout_rate: float,
        implementation: Implementation | Literal["auto"],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        attention: dict[str, Any] = {
            "dropout_rate": dropout_rate,
            "implementation": implementation,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.self_attention = HybridSelfAttention(embed_dims, heads, self_attention_points, **attention)
        self.cross_attention = ImageCrossAttention(embed_dims, heads, levels, anchors, points, **attention)
        self.feed_forward = FeedForward(embed_dims, feedforward_dims, dropout_rate=dropout_rate, dtype=dtype, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(embed_dims, epsilon=1e-5, dtype=dtype, rngs=rngs) for _ in range(3)])

    def __call__(
        self,
        tokens: Float[Array, "batch tokens channels"],
        position: Float[Array, "hw_tokens channels"],
        features: Float[Array, "batch camera texels channels"],
        spatial_shapes: SpatialShapes,
        shapes: tuple[tuple[int, int], ...],
        views: tuple[PlaneViews, ...],
        dropout_key: PRNGKeyArray | Array | None,
        capture: Capture = None,
    ) -> Float[Array, "batch tokens channels"]:
        """One layer.

        Args:
            tokens: hw, zh, wz one after the other.
            position: positional encoding of hw; the other planes have none.
            features, spatial_shapes, views: see `ImageCrossAttention`.
            shapes: (rows, columns) of the planes.
            dropout_key: None for inference.
            capture: where given, receives the output of every part.
        """
        capture = {} if capture is None else capture
        self_key, cross_key, ffn_key = split_keys(dropout_key, 3)
        sizes = [rows * columns for rows, columns in shapes]
        hw = self.self_attention(tokens[:, : sizes[0]], position, shapes[0], self_key)
        capture["self_attention"] = hw
        tokens = jnp.concatenate([hw, tokens[:, sizes[0] :]], 1)
        tokens = capture["norm0"] = self.norms[0](tokens)
        planes = tuple(jnp.split(tokens, np.cumsum(sizes)[:-1], axis=1))
        tokens = capture["cross_attention"] = self.cross_attention(planes, features, spatial_shapes, views, cross_key)
        tokens = capture["norm1"] = self.norms[1](tokens)
        tokens = capture["feed_forward"] = self.feed_forward(tokens, ffn_key)
        tokens = capture["norm2"] = self.norms[2](tokens)
        return tokens


class TPVEncoder(nnx.Module):
    """The official ``TPVFormerHead``: learned planes that read the images, layer by layer."""

    def __init__(
        self,
        grid_size: tuple[int, int, int],
        volume_minimum: tuple[float, float, float],
        volume_maximum: tuple[float, float, float],
        *,
        num_cameras: int,
        num_levels: int,
        num_layers: int,
        embed_dims: int,
        num_heads: int,
        self_attention_points: int,
        cross_attention_anchors: tuple[int, int, int],
        cross_attention_points: tuple[int, int, int],
        feedforward_dims: int,
        dropout_rate: float,
        remat: bool,
        implementation: Implementation | Literal["auto"],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.grid_size, self.anchors = grid_size, cross_attention_anchors
        self.volume_minimum, self.volume_maximum = volume_minimum, volume_maximum
        self.remat, self.dtype = remat, dtype
        shapes = plane_shapes(grid_size)
        for plane, (rows, columns) in zip(PLANES, shapes, strict=True):
            embedding = xavier_uniform(rngs.params(), (rows * columns, embed_dims))
            setattr(self, f"tpv_embedding_{plane}", nnx.Param(embedding))
        self.positional_encoding = PositionalEncoding(shapes[0], embed_dims, rngs=rngs)
        self.level_embeds = nnx.Param(jax.random.normal(rngs.params(), (num_levels, embed_dims)))
        self.cams_embeds = nnx.Param(jax.random.normal(rngs.params(), (num_cameras, embed_dims)))
        self.layers = nnx.List(
            [
                TPVLayer(
                    embed_dims,
                    num_heads,
                    num_levels,
                    self_attention_points,
                    cross_attention_anchors,
                    cross_attention_points,
                    feedforward_dims,
                    dropout_rate=dropout_rate,
                    implementation=implementation,
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(num_layers)
            ]
        )

    def reference_points(self) -> tuple[Float[np.ndarray, "tokens anchors 3"], ...]:
        """Anchors of hw, zh, wz as shares of the volume."""
        low, high = self.volume_minimum, self.volume_maximum
        extent = tuple(b - a for a, b in zip(low, high, strict=True))
        return reference_points(self.grid_size, extent, self.anchors)

    def __call__(
        self,
        features: tuple[Float[Array, "batch camera _ _ channels"], ...],
        lidar_to_image: Float[Array, "batch camera 4 4"],
        image_hw: tuple[int, int],
        dropout_key: PRNGKeyArray | Array | None = None,
        capture: Capture = None,
    ) -> TPVPlanes:
        """Encodes.

        Args:
            features: one map per pyramid level, fine to coarse.
            lidar_to_image: metres to pixels of the padded images.
            image_hw: (height, width) of the padded images.
            dropout_key: None for inference.
            capture: where given, receives intermediate arrays by name (and nothing is rematerialised).
        """
        shapes = plane_shapes(self.grid_size)
        batch = lidar_to_image.shape[0]
        views = []
        for plane, reference in zip(PLANES, self.reference_points(), strict=True):
            anchors, visible = sample_points(
                reference, self.volume_minimum, self.volume_maximum, lidar_to_image, image_hw
            )
            views.append(plane_views(anchors, visible))
            if capture is not None:
                capture[f"anchors_{plane}"], capture[f"visible_{plane}"] = anchors, visible
        spatial_shapes = tuple(level.shape[2:4] for level in features)
        cameras = self.cams_embeds[...][:, None]
        flat = [
            level.reshape(level.shape[:2] + (-1, level.shape[-1])) + (cameras + level_embed).astype(level.dtype)
            for level, level_embed in zip(features, self.level_embeds[...], strict=True)
        ]
        flat = jnp.concatenate(flat, axis=2).astype(self.dtype)
        embeddings = [getattr(self, f"tpv_embedding_{plane}")[...] for plane in PLANES]
        tokens = jnp.concatenate(embeddings).astype(self.dtype)
        tokens = jnp.broadcast_to(tokens, (batch, *tokens.shape))
        position = self.positional_encoding().astype(self.dtype)
        for i, (layer, key) in enumerate(zip(self.layers, split_keys(dropout_key, len(self.layers)), strict=True)):
            inner: Capture = None if capture is None else {}
            run = _rematerialised if self.remat and capture is None else TPVLayer.__call__
            tokens = run(layer, tokens, position, flat, spatial_shapes, shapes, tuple(views), key, inner)
            if capture is not None:
                capture |= {f"layer{i}.{name}": value for name, value in inner.items()}
        sizes = [rows * columns for rows, columns in shapes]
        planes = jnp.split(tokens, np.cumsum(sizes)[:-1], axis=1)
        return TPVPlanes(*(p.reshape(batch, *shape, -1) for p, shape in zip(planes, shapes, strict=True)))


def _rematerialised(layer, tokens, position, features, spatial_shapes, shapes, views, dropout_key, _) -> Array:
    """The layer, computed a second time in the backward pass instead of being remembered."""
    graph, state = nnx.split(layer)

    @jax.checkpoint
    def run(state, tokens, position, features, views, dropout_key):
        layer = nnx.merge(graph, state)
        return layer(tokens, position, features, spatial_shapes, shapes, views, dropout_key)

    return run(state, tokens, position, features, views, dropout_key)

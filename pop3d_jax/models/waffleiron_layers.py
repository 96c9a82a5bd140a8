"""Parts of WaffleIron: projection of points to 2D grids and back, spatial and channel mixing, the embedding."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray, Shaped

from pop3d_jax.models.batch_norm import BatchNorm
from pop3d_jax.models.layers import fan_in_uniform, linear, split_keys
from pop3d_jax.sharding import per_device

_LAYER_NORM_EPSILON = 1e-5
_COUNT_EPSILON = 1e-6
# Points whose neighbours are embedded at a time in inference.
_BLOCK = 8192
# PyTorch's GELU is the exact one.
_ACTIVATIONS = {"relu": jax.nn.relu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


def cell_weights(
    cells: Int[Array, "batch points"], point_mask: Bool[Array, "batch points"], number_of_cells: int
) -> Float[Array, "batch points"]:
    """Share of each point in its cell's mean: 1 / (points of the cell + 1e-6), 0 where there is no point."""

    def one_cloud(cells: Array, present: Array) -> Array:
        counts = jnp.zeros(number_of_cells, jnp.float32).at[cells].add(present)
        return present / (counts[cells] + _COUNT_EPSILON)

    weights = per_device(jax.vmap(one_cloud), [("batch",), ("batch",)], ("batch",))
    return weights(cells, point_mask.astype(jnp.float32))


def flatten(
    tokens: Float[Array, "batch points channel"],
    cells: Int[Array, "batch points"],
    weights: Float[Array, "batch points"],
    grid_shape: tuple[int, int],
) -> Float[Array, "batch row column channel"]:
    """Sums of weighted tokens by cell, in float32: means, with the weights of `cell_weights`. Empty cells are zero."""
    rows, columns = grid_shape

    def one_cloud(tokens: Array, cells: Array, weights: Array) -> Array:
        weighted = tokens.astype(jnp.float32) * weights[:, None]
        return jnp.zeros((rows * columns, tokens.shape[-1]), jnp.float32).at[cells].add(weighted)

    sums = per_device(jax.vmap(one_cloud), [("batch",)] * 3, ("batch",))(tokens, cells, weights)
    return sums.reshape(-1, rows, columns, tokens.shape[-1])


def inflate(
    grid: Float[Array, "batch row column channel"], cells: Int[Array, "batch points"]
) -> Float[Array, "batch points channel"]:
    """The cell of each point."""
    return gather_rows(grid.reshape(grid.shape[0], -1, grid.shape[-1]), cells)


def gather_rows(
    rows: Float[Array, "batch rows channel"], indices: Int[Array, " batch *places"]
) -> Float[Array, "batch *places channel"]:
    """`rows[i, indices[i]]` for every example i, which stays on its device."""
    gather = jax.vmap(lambda rows, indices: rows[indices])
    return per_device(gather, [("batch",), ("batch",)], ("batch",))(rows, indices)


def counted_points(point_mask: Bool[Array, "batch points"]) -> Bool[Array, "batch points"]:
    """The points that statistics of a batch are of: as many of each cloud as its largest cloud has.

    The official batches are padded to their largest cloud, and BatchNorm counts that padding. Ours have a fixed size;
    what lies beyond the largest cloud must leave no trace.
    """
    place = jnp.arange(point_mask.shape[1])
    return jnp.broadcast_to(place < jnp.max(jnp.where(point_mask, place + 1, 0)), point_mask.shape)


class DepthwiseConv(nnx.Module):
    """A 3 x 3 convolution of each channel by itself, padded with zeros.

    Nine shifted products: on a CPU three times faster than XLA's grouped convolution, forward and backward, and
    elementwise work on any device.
    """

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        uniform = fan_in_uniform(9)
        self.kernel = nnx.Param(uniform(rngs.params(), (3, 3, channels)))
        self.bias = nnx.Param(uniform(rngs.params(), (channels,)))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "batch row column channel"]) -> Float[Array, "batch row column channel"]:
        """Convolves, in the layer's type."""
        rows, columns = x.shape[1:3]
        kernel = self.kernel[...].astype(self.dtype)
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = (padded[:, i : i + rows, j : j + columns] * kernel[i, j] for i in range(3) for j in range(3))
        return sum(taps) + self.bias[...].astype(self.dtype)


def drop_path(
    residual: Float[Array, "batch points channel"], rate: float, key: PRNGKeyArray | Array | None
) -> Float[Array, "batch points channel"]:
    """Sets whole clouds to zero, each with probability ``rate``, and scales up the others; without a key nothing."""
    if key is None or rate == 0.0:
        return residual
    keep = jax.random.bernoulli(key, 1.0 - rate, (residual.shape[0], 1, 1))
    return jnp.where(keep, residual / (1.0 - rate), jnp.zeros((), residual.dtype))


def _token_norm(kind: str, channels: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm | BatchNorm:
    if kind == "batchnorm":
        return BatchNorm(channels)
    return nnx.LayerNorm(channels, epsilon=_LAYER_NORM_EPSILON, use_fast_variance=False, dtype=dtype, rngs=rngs)


def _layer_scale(channels: int, rngs: nnx.Rngs) -> nnx.Param:
    """One factor for each channel; the official one is a depthwise 1 x 1 convolution: fan-in 1, uniform in [-1, 1]."""
    return nnx.Param(fan_in_uniform(1)(rngs.params(), (channels,)))


class SpatialMix(nnx.Module):
    """tokens + drop-path(inflate(scale(convolutions(flatten(norm(tokens))))))."""

    def __init__(self, channels: int, *, norm: str, activation: str, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = _token_norm(norm, channels, dtype, rngs)
        self.first_conv = DepthwiseConv(channels, dtype=dtype, rngs=rngs)
        self.second_conv = DepthwiseConv(channels, dtype=dtype, rngs=rngs)
        self.layer_scale = _layer_scale(channels, rngs)
        self.activation = activation
        self.dtype = jnp.dtype(dtype)

    def residual(
        self,
        tokens: Float[Array, "batch points channel"],
        cells: Int[Array, "batch points"],
        weights: Float[Array, "batch points"],
        grid_shape: tuple[int, int],
        training: bool,
        counted: Bool[Array, "batch points"],
    ) -> Float[Array, "batch points channel"]:
        """What is added to the tokens."""
        grid = flatten(_normalised(self.norm, tokens, training, counted), cells, weights, grid_shape)
        grid = self.second_conv(_ACTIVATIONS[self.activation](self.first_conv(grid)))
        return inflate(grid * self.layer_scale[...].astype(self.dtype), cells)


class ChannelMix(nnx.Module):
    """tokens + drop-path(scale(two dense layers(norm(tokens))))."""

    def __init__(self, channels: int, *, norm: str, activation: str, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = _token_norm(norm, channels, dtype, rngs)
        self.hidden = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.output = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.layer_scale = _layer_scale(channels, rngs)
        self.activation = activation
        self.dtype = jnp.dtype(dtype)

    def residual(
        self, tokens: Float[Array, "batch points channel"], training: bool, counted: Bool[Array, "batch points"]
    ) -> Float[Array, "batch points channel"]:
        """What is added to the tokens."""
        hidden = _ACTIVATIONS[self.activation](self.hidden(_normalised(self.norm, tokens, training, counted)))
        return self.output(hidden) * self.layer_scale[...].astype(self.dtype)


class Block(nnx.Module):
    """Spatial, then channel mixing. Which grid it works on is said with the call, so that all blocks are alike."""

    def __init__(
        self, channels: int, *, norm: str, activation: str, drop_path_rate: float, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.spatial_mix = SpatialMix(channels, norm=norm, activation=activation, dtype=dtype, rngs=rngs)
        self.channel_mix = ChannelMix(channels, norm=norm, activation=activation, dtype=dtype, rngs=rngs)
        self.drop_path_rate = drop_path_rate

    def __call__(
        self,
        tokens: Float[Array, "batch points channel"],
        cells: Int[Array, "batch points"],
        weights: Float[Array, "batch points"],
        key: PRNGKeyArray | Array | None,
        counted: Bool[Array, "batch points"],
        *,
        grid_shape: tuple[int, int],
        training: bool,
        watch: Callable[[str, jax.Array], None] = lambda name, tokens: None,
    ) -> Float[Array, "batch points channel"]:
        """New tokens, float32.

        Args:
          tokens: float32.
          cells: of this block's grid.
          weights: from `cell_weights`, for the same grid.
          key: of the two halves' drop-path; None for none.
          counted: see `counted_points`.
          grid_shape: rows and columns.
          training: whether BatchNorm takes the statistics of the batch.
          watch: is shown the tokens after each half.
        """
        keys = split_keys(key, 2)
        residual = self.spatial_mix.residual(tokens, cells, weights, grid_shape, training, counted)
        tokens = tokens + drop_path(residual.astype(jnp.float32), self.drop_path_rate, keys[0])
        watch("spatial_mix", tokens)
        residual = self.channel_mix.residual(tokens, training, counted)
        tokens = tokens + drop_path(residual.astype(jnp.float32), self.drop_path_rate, keys[1])
        watch("channel_mix", tokens)
        return tokens


class Embedding(nnx.Module):
    """A token for each point: its own features, and the maximum over its neighbours' features relative to them."""

    def __init__(self, input_channels: int, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = BatchNorm(input_channels)
        self.point = linear(input_channels, channels, dtype=dtype, rngs=rngs)
        self.neighbor_norm = BatchNorm(input_channels)
        self.neighbor_hidden = linear(input_channels, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.neighbor_hidden_norm = BatchNorm(channels)
        self.neighbor_output = linear(channels, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.merge = linear(2 * channels, channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        point_features: Float[Array, "batch points feature"],
        neighbors: Int[Array, "batch points neighbor"],
        counted: Bool[Array, "batch points"],
        *,
        training: bool,
    ) -> Float[Array, "batch points channel"]:
        """Tokens, float32; `neighbors` begins with the point itself, which is left out."""
        points = self.norm(point_features, training=training, counted=counted)
        relative = gather_rows(points, neighbors[..., 1:]) - points[:, :, None]
        if training:
            around = self._around(relative, counted, training=True)
        else:
            # No point depends on another one here: block by block, for whole sweeps make gigabytes of hidden features.
            around = _by_blocks(lambda *block: self._around(*block, training=False), relative, counted)
        return self.merge(jnp.concatenate([self.point(points), around], axis=-1)).astype(jnp.float32)

    def _around(
        self,
        relative: Float[Array, "batch points neighbor feature"],
        counted: Bool[Array, "batch points"],
        *,
        training: bool,
    ) -> Float[Array, "batch points channel"]:
        hidden = self.neighbor_hidden(self.neighbor_norm(relative, training=training, counted=counted))
        hidden = jax.nn.relu(self.neighbor_hidden_norm(hidden, training=training, counted=counted))
        return jnp.max(self.neighbor_output(hidden), axis=2)


def _by_blocks(function: Callable[..., Array], *arrays: Shaped[Array, "batch points ..."]) -> Array:
    """A function of points that do not depend on each other, applied to `_BLOCK` of them at a time."""
    points = arrays[0].shape[1]
    blocks = -(-points // _BLOCK)
    if blocks == 1:
        return function(*arrays)

    def split(array: Array) -> Array:
        padded = jnp.pad(array, ((0, 0), (0, blocks * _BLOCK - points), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(padded.reshape(array.shape[0], blocks, _BLOCK, *array.shape[2:]), 1, 0)

    result = jnp.moveaxis(jax.lax.map(lambda block: function(*block), tuple(map(split, arrays))), 0, 1)
    return result.reshape(result.shape[0], blocks * _BLOCK, -1)[:, :points]


def _normalised(
    norm: nnx.LayerNorm | BatchNorm, tokens: Float[Array, "batch points channel"], training: bool, counted: Array
) -> Float[Array, "batch points channel"]:
    return norm(tokens, training=training, counted=counted) if isinstance(norm, BatchNorm) else norm(tokens)

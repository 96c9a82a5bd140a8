"""WaffleIron (Puy et al., ICCV 2023): a backbone for point clouds made of dense layers only, as ScaLR distils into it.

Tokens of points are averaged into the cells of a 2D grid, mixed there by depthwise convolutions and handed back to the
points; then every token's channels are mixed by two dense layers. Three grids, along the three axes, take turns.
Channels last, batches of a fixed number of points, the missing ones masked.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray

from pop3d_jax.models.batch_norm import BatchNorm
from pop3d_jax.models.layers import linear
from pop3d_jax.models.waffleiron_layers import Block, Embedding, cell_weights, counted_points

_CHOICES = {
    "norm": ("layernorm", "batchnorm"),
    "activation": ("relu", "gelu"),
    "head": ("linear", "mlp", "probe"),
    "remat": ("none", "all"),
}

# What a call leaves for tests and studies: intermediate arrays by name.
Capture = dict[str, jax.Array] | None


@dataclasses.dataclass(frozen=True)
class WaffleIronConfig:
    """Sizes of the network; the defaults are WI-48-768 as ScaLR pretrains it (60.2 M parameters).

    ``grid_shapes`` and ``projection_axes`` belong together: the grid that a cloud is projected to along that axis;
    block d uses grid d modulo their number. ``norm`` is that of the blocks, the embedding always has BatchNorm.
    ``head``: "linear" is one layer, "mlp" has ``head_hidden`` channels and a ReLU between two, "probe" is BatchNorm and
    a layer that starts from zero. ``remat`` "all" computes the embedding and every block again in the backward pass.
    In ``compute_dtype`` are layers and grids; the tokens between the blocks, statistics and sums over a cell's points
    are float32.

    Raises:
        ValueError: values that do not fit together.
    """

    input_channels: int = 5
    channels: int = 768
    depth: int = 48
    grid_shapes: Sequence[Sequence[int]] = ((256, 256), (256, 32), (256, 32))
    projection_axes: Sequence[int] = (2, 1, 0)
    output_channels: int = 1024
    norm: str = "layernorm"
    activation: str = "relu"
    drop_path: float = 0.0
    head: str = "linear"
    head_hidden: int = 2048
    remat: str = "all"
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        # Config files and JSON have lists.
        object.__setattr__(self, "grid_shapes", tuple(tuple(int(n) for n in shape) for shape in self.grid_shapes))
        object.__setattr__(self, "projection_axes", tuple(self.projection_axes))
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name} = {getattr(self, name)!r} must be one of {', '.join(map(repr, known))}")
        if any(len(shape) != 2 or min(shape) < 1 for shape in self.grid_shapes) or not self.grid_shapes:
            raise ValueError(f"model.grid_shapes = {self.grid_shapes} must be pairs (rows, columns), at least one")
        if len(self.projection_axes) != len(self.grid_shapes) or not set(self.projection_axes) <= {0, 1, 2}:
            raise ValueError(
                f"model.projection_axes = {self.projection_axes} must name an axis (0, 1 or 2) for each of the "
                f"{len(self.grid_shapes)} model.grid_shapes"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"model.drop_path = {self.drop_path} must be at least 0 and below 1")
        for name in ("input_channels", "channels", "depth", "output_channels", "head_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)} must be at least 1")


class MLPHead(nnx.Module):
    """Two layers with a ReLU between, ScaLR+'s head."""

    def __init__(self, channels: int, hidden: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.hidden = linear(channels, hidden, dtype=dtype, rngs=rngs)
        self.output = linear(hidden, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "batch points channel"]) -> Float[Array, "batch points output"]:
        """Outputs, in the layers' type."""
        return self.output(jax.nn.relu(self.hidden(tokens)))


class ProbeHead(nnx.Module):
    """BatchNorm and a linear layer that starts from zero, for linear probing and fine-tuning."""

    def __init__(self, channels: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = BatchNorm(channels)
        zeros = nnx.initializers.zeros_init()
        self.output = nnx.Linear(channels, outputs, kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "batch points channel"], *, training: bool, counted: Bool[Array, "batch points"]
    ) -> Float[Array, "batch points output"]:
        """Outputs, in the layer's type."""
        return self.output(self.norm(tokens, training=training, counted=counted))


class WaffleIron(nnx.Module):
    """The whole network. Holds no random state: drop-path takes its key with the call.

    A training call updates the running statistics of BatchNorm (`nnx.BatchStat`) in place. Parameters start as
    PyTorch's defaults do: layers and convolutions uniform within 1/sqrt(fan-in), kernels and biases alike, which for
    LayerScale means [-1, 1]; norms at one and zero; "probe" heads at zero.
    """

    def __init__(self, config: WaffleIronConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = jnp.dtype(config.compute_dtype)
        self.embedding = Embedding(config.input_channels, config.channels, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            Block(
                config.channels,
                norm=config.norm,
                activation=config.activation,
                drop_path_rate=config.drop_path,
                dtype=dtype,
                rngs=rngs,
            )
            for _ in range(config.depth)
        )
        if config.head == "linear":
            self.head = linear(config.channels, config.output_channels, dtype=dtype, rngs=rngs)
        elif config.head == "mlp":
            self.head = MLPHead(config.channels, config.head_hidden, config.output_channels, dtype=dtype, rngs=rngs)
        else:
            self.head = ProbeHead(config.channels, config.output_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        point_features: Float[Array, "batch points feature"],
        neighbors: Int[Array, "batch points neighbor"],
        cells: Int[Array, "batch grid points"],
        point_mask: Bool[Array, "batch points"],
        *,
        training: bool = False,
        train_backbone: bool = True,
        dropout_key: PRNGKeyArray | Array | None = None,
    ) -> Float[Array, "batch points output"]:
        """Predicts for every point; what it says of points that are not there means nothing.

        Args:
            point_features: intensity, x, y, z and radius of ScaLR, or others; zero where there is no point.
            neighbors: row numbers of the nearest points, the point itself first.
            cells: row * columns + column of each point in each grid.
            point_mask: where there is a point; all points of a cloud come before the padding.
            training: whether BatchNorm takes the statistics of the batch and updates the running ones. They count
                padding up to the batch's largest cloud, as official (`counted_points`).
            train_backbone: False keeps everything but the head as in inference, and lets no gradient through.
            dropout_key: key of this step's drop-path; None for none.

        Returns:
            Head outputs, float32.

        Raises:
            ValueError: the arrays do not have the config's number of features or grids.
        """
        tokens = self.tokens(
            point_features,
            neighbors,
            cells,
            point_mask,
            training=training and train_backbone,
            dropout_key=dropout_key if train_backbone else None,
        )
        if not train_backbone:
            tokens = jax.lax.stop_gradient(tokens)
        if isinstance(self.head, ProbeHead):
            return self.head(tokens, training=training, counted=counted_points(point_mask)).astype(jnp.float32)
        return self.head(tokens).astype(jnp.float32)

    def tokens(
        self,
        point_features: Float[Array, "batch points feature"],
        neighbors: Int[Array, "batch points neighbor"],
        cells: Int[Array, "batch grid points"],
        point_mask: Bool[Array, "batch points"],
        *,
        training: bool = False,
        dropout_key: PRNGKeyArray | Array | None = None,
        capture: Capture = None,
    ) -> Float[Array, "batch points channel"]:
        """The backbone's output, before the head; see `__call__`.

        Args:
            point_features, neighbors, cells, point_mask, training, dropout_key: see `__call__`.
            capture: a dict that receives "embed" and, for every block, "spatial_mix_0", "channel_mix_0", ...: the
                tokens after each; nothing is rematerialised then.

        Returns:
            Tokens, float32.

        Raises:
            ValueError: the arrays do not have the config's number of features or grids.
        """
        config = self.config
        for name, found, expected in (
            ("point_features has", point_features.shape[-1], config.input_channels),
            ("cells has grids:", cells.shape[1], len(config.grid_shapes)),
        ):
            if found != expected:
                raise ValueError(f"{name} {found}, this network (config.model) needs {expected}")
        remat = config.remat == "all" and capture is None
        counted = counted_points(point_mask)
        weights = [
            cell_weights(cells[:, i], point_mask, rows * columns)
            for i, (rows, columns) in enumerate(config.grid_shapes)
        ]
        embed, state = _pure(self.embedding, remat, training=training)
        tokens, statistics = embed(state, point_features, neighbors, counted)
        nnx.update(self.embedding, statistics)
        keys = None if dropout_key is None else jax.random.split(dropout_key, config.depth)
        if capture is not None:
            capture["embed"] = tokens
            for d, block in enumerate(self.blocks):
                grid = d % len(config.grid_shapes)
                tokens = block(
                    tokens,
                    cells[:, grid],
                    weights[grid],
                    None if keys is None else keys[d],
                    counted,
                    grid_shape=config.grid_shapes[grid],
                    training=training,
                    watch=lambda name, tokens, d=d: capture.update({f"{name}_{d}": tokens}),
                )
            return tokens
        return self._blocks(tokens, cells, weights, keys, counted, training, remat)

    def _blocks(
        self,
        tokens: Float[Array, "batch points channel"],
        cells: Int[Array, "batch grid points"],
        weights: Sequence[Float[Array, "batch points"]],
        keys: Array | None,
        counted: Bool[Array, "batch points"],
        training: bool,
        remat: bool,
    ) -> Float[Array, "batch points channel"]:
        """All blocks, a loop over rounds of one block for each grid: a program of one round compiles much faster."""
        shapes, grids = self.config.grid_shapes, len(self.config.grid_shapes)
        rounds = self.config.depth // grids
        pure = [
            _pure(block, remat, grid_shape=shapes[d % grids], training=training) for d, block in enumerate(self.blocks)
        ]
        states = [state for _, state in pure]

        def one(d: int, tokens: Array, state: Any, key: Array | None) -> tuple[Array, Any]:
            return pure[d][0](state, tokens, cells[:, d % grids], weights[d % grids], key, counted)

        def one_round(tokens: Array, of_round: Any) -> tuple[Array, Any]:
            statistics = []
            for d, (state, key) in enumerate(of_round):
                tokens, new = one(d, tokens, state, key)
                statistics.append(new)
            return tokens, statistics

        whole = range(rounds * grids)
        stacked = [
            (
                jax.tree.map(lambda *arrays: jnp.stack(arrays), *(states[d] for d in whole[grid::grids])),
                None if keys is None else keys[: len(whole)][grid::grids],
            )
            for grid in range(grids if rounds else 0)
        ]
        tokens, statistics = jax.lax.scan(one_round, tokens, stacked, length=rounds)
        for d in whole:
            nnx.update(self.blocks[d], jax.tree.map(lambda array, d=d: array[d // grids], statistics[d % grids]))
        for d in range(len(whole), self.config.depth):
            tokens, new = one(d, tokens, states[d], None if keys is None else keys[d])
            nnx.update(self.blocks[d], new)
        return tokens


def _pure(module: nnx.Module, remat: bool, **settings: Any) -> tuple[Callable[..., tuple[Array, Any]], Any]:
    """A module as a function (state, *arrays) -> (result, new BatchNorm statistics), and its state.

    What is rematerialised or looped over must not change anything by itself.
    """
    graph, state = nnx.split(module)

    def apply(state: Any, *arrays: Any) -> tuple[Array, Any]:
        merged = nnx.merge(graph, state)
        result = merged(*arrays, **settings)
        return result, nnx.state(merged, nnx.BatchStat)

    return jax.checkpoint(apply) if remat else apply, state

"""The two towers of CLIP (Radford et al. 2021) as NNX modules, in the arithmetic of the `transformers` models.

Attention, MLP and the resizing of positions are DINOv2's too (`pop3d_jax.models.dinov2`).

Parameters are float32; `dtype` is what matrix products are computed in. Softmax and LayerNorm statistics stay
in float32. Pictures are channels-last, RGB, already normalised (see `pop3d_jax.models.maskclip.normalise`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image tower. `image_size` and `patch_size` are in pixels; other image sizes work too."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    embedding: int
    image_size: int
    patch_size: int
    activation: str = "quick_gelu"
    layer_norm_epsilon: float = 1e-5


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower. `end_token` closes every text and is where the text's vector is read."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    embedding: int
    vocabulary: int
    positions: int
    end_token: int
    activation: str = "quick_gelu"
    layer_norm_epsilon: float = 1e-5


# Queries that attend at once. The score matrix of a 900 x 1600 picture in patches of 16 has 32 million entries a
# head: computed whole, a batch of six such pictures would need gigabytes for nothing.
_QUERIES_AT_ONCE = 512
# So many tokens attend whole: DINOv2 sees 513 of a 224 x 448 picture, and one more than a part is no reason for two.
_WHOLE_UP_TO = 1024


class VisionOutput(NamedTuple):
    """All stages of the image tower; token 0 is the class token. What is not read costs nothing under jit.

    embeddings: `[b, 1 + patches, width]`, positions added; pre_layernorm: after the first LayerNorm;
    layers: output of every block; pooled: `[b, width]`, post-LayerNorm of the class token;
    image_features: `[b, embedding]`; patch_features: `[b, patches, embedding]`, ordinary patch tokens projected
    the same way (what CLIP says about patches without MaskCLIP's change).
    """

    embeddings: Array
    pre_layernorm: Array
    layers: tuple[Array, ...]
    pooled: Array
    image_features: Array
    patch_features: Array


class TextOutput(NamedTuple):
    """All stages of the text tower: token and position embeddings, blocks, final LayerNorm `[b, length, width]`,
    the vector at the first end token `[b, width]` and its projection `[b, embedding]`."""

    embeddings: Array
    layers: tuple[Array, ...]
    last_hidden_state: Array
    pooled: Array
    text_features: Array


def bicubic_matrix(inputs: int, outputs: int, offset: float = 0.0) -> Float[np.ndarray, "outputs inputs"]:
    """Weights of PyTorch's bicubic resizing of one axis: a = -0.75, half-pixel centres, clamped border, no antialias.

    `jax.image.resize` differs in all three (a = -0.5, renormalised border, antialias), so this is our own.

    Args:
      inputs, outputs: cells before and after.
      offset: the step from cell to cell is inputs / (outputs + offset), as where PyTorch is given the scale factor
        (outputs + offset) / inputs in place of the size.
    """
    a = -0.75
    centres = (np.arange(outputs) + 0.5) * inputs / (outputs + offset) - 0.5
    first = np.floor(centres).astype(int)
    weights = np.zeros((outputs, inputs))
    for tap in range(-1, 3):
        distance = np.abs(centres - (first + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        index = np.clip(first + tap, 0, inputs - 1)
        np.add.at(weights, (np.arange(outputs), index), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)


def resize_position_embedding(
    table: Float[Array, "positions width"], grid: tuple[int, int], *, offset: float = 0.0, antialias: bool = False
) -> Float[Array, "resized width"]:
    """Position embedding for another patch grid: bicubic over the square grid, class row untouched.

    Args:
      table: class row first, then a square grid in row-major order.
      grid: (rows, columns) wanted.
      offset: see `bicubic_matrix`; not together with antialias.
      antialias: PyTorch's antialiased bicubic resizing, which is JAX's.

    Raises:
      ValueError: the table without its class row is no square.
    """
    side = round((table.shape[0] - 1) ** 0.5)
    if side * side + 1 != table.shape[0]:
        raise ValueError(f"a position embedding of {table.shape[0]} rows is no class row and a square grid")
    if grid == (side, side):
        return table
    patches = table[1:].reshape(side, side, -1)
    if antialias:
        resized = jax.image.resize(patches, (*grid, table.shape[1]), "cubic")
    else:
        rows, columns = (jnp.asarray(bicubic_matrix(side, size, offset)) for size in grid)
        resized = jnp.einsum("ri,cj,ijw->rcw", rows, columns, patches, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([table[:1], resized.reshape(grid[0] * grid[1], -1)])


def embed_patches(
    images: Float[Array, "batch height width 3"], kernel: Float[Array, "patch patch 3 dim"]
) -> Float[Array, "batch rows columns dim"]:
    """Every patch of the pictures as one token, without positions.

    Raises:
      ValueError: height or width is no multiple of the patch size.
    """
    patch = kernel.shape[0]
    batch, height, width, _ = images.shape
    if height % patch or width % patch:
        raise ValueError(f"image of {height} x {width} pixels is no multiple of the patch size {patch}")
    # A convolution whose stride is its kernel is one matrix product; XLA's convolution is slower here.
    patches = images.reshape(batch, height // patch, patch, width // patch, patch, 3)
    return jnp.einsum("bhpwqc,pqcd->bhwd", patches, kernel)


def layer_norm(width: int, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last axis, in two passes."""
    # The fast variance (mean of squares minus squared mean) cancels for tokens with a large mean.
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)


class SelfAttention(nnx.Module):
    """Multi-head self-attention with separate query, key, value and output projections."""

    def __init__(
        self, width: int, heads: int, *, causal: bool, qkv_bias: bool = True, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        if width % heads:
            raise ValueError(f"{heads} heads do not divide the width {width}")
        self.heads, self.causal = heads, causal
        self.q_proj = nnx.Linear(width, width, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.k_proj = nnx.Linear(width, width, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.v_proj = nnx.Linear(width, width, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        query, key, value = (
            projection(x).reshape(*x.shape[:2], self.heads, -1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.causal or x.shape[1] <= _WHOLE_UP_TO:
            mixed = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        else:
            mixed = _attend_in_parts(query, key, value)
        return self.out_proj(mixed.reshape(x.shape))


def _attend_in_parts(
    query: Float[Array, "batch tokens heads dim"],
    key: Float[Array, "batch tokens heads dim"],
    value: Float[Array, "batch tokens heads dim"],
) -> Float[Array, "batch tokens heads dim"]:
    """Full attention, a part of the queries at a time; the backward pass computes each part's scores again."""
    batch, tokens, heads, dim = query.shape
    count = -(-tokens // _QUERIES_AT_ONCE)
    padded = jnp.pad(query, ((0, 0), (0, -tokens % count), (0, 0), (0, 0)))
    parts = padded.reshape(batch, count, -1, heads, dim).swapaxes(0, 1)
    attend = jax.checkpoint(lambda part: jax.nn.dot_product_attention(part, key, value))
    mixed = jax.lax.map(attend, parts).swapaxes(0, 1).reshape(batch, -1, heads, dim)
    return mixed[:, :tokens]


class MLP(nnx.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, hidden: int, activation: str, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        if activation not in _ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r} in a config: known are {sorted(_ACTIVATIONS)}")
        self.activation = activation
        self.fc1 = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig | TextConfig, *, causal: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, epsilon = config.width, config.layer_norm_epsilon
        self.layer_norm1 = layer_norm(width, epsilon, dtype, rngs)
        self.self_attn = SelfAttention(width, config.heads, causal=causal, dtype=dtype, rngs=rngs)
        self.layer_norm2 = layer_norm(width, epsilon, dtype, rngs)
        self.mlp = MLP(width, config.mlp_width, config.activation, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nnx.Module):
    """CLIP's image tower: patches, class token, positions, blocks, projection."""

    def __init__(self, config: VisionConfig, *, dtype: str = "float32", rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        width, patch = config.width, config.patch_size
        positions = 1 + (config.image_size // patch) ** 2
        normal = nnx.initializers.normal(0.02)
        self.class_embedding = nnx.Param(normal(rngs.params(), (width,)))
        self.patch_embedding = nnx.Param(
            nnx.initializers.lecun_normal(in_axis=(0, 1, 2))(rngs.params(), (patch, patch, 3, width))
        )
        self.position_embedding = nnx.Param(normal(rngs.params(), (positions, width)))
        compute = jnp.dtype(dtype)
        self.pre_layernorm = layer_norm(width, config.layer_norm_epsilon, compute, rngs)
        self.layers = nnx.List(Block(config, causal=False, dtype=compute, rngs=rngs) for _ in range(config.layers))
        self.post_layernorm = layer_norm(width, config.layer_norm_epsilon, compute, rngs)
        self.projection = nnx.Linear(width, config.embedding, use_bias=False, dtype=compute, rngs=rngs)

    def embed(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch tokens dim"]:
        """Class token and patch tokens with positions, before the first LayerNorm.

        Raises:
          ValueError: height or width is no multiple of the patch size.
        """
        dtype = jnp.dtype(self.dtype)
        tokens = embed_patches(images.astype(dtype), self.patch_embedding[...].astype(dtype))
        batch, rows, columns, width = tokens.shape
        tokens = tokens.reshape(batch, rows * columns, width)
        first = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (batch, 1, width))
        positions = resize_position_embedding(self.position_embedding[...], (rows, columns))
        return jnp.concatenate([first, tokens], axis=1) + positions.astype(dtype)

    def __call__(self, images: Float[Array, "batch height width 3"]) -> VisionOutput:
        """All stages for normalised RGB pictures whose sides are multiples of the patch size."""
        embeddings = self.embed(images)
        hidden = pre_layernorm = self.pre_layernorm(embeddings)
        layers = []
        for layer in self.layers:
            hidden = layer(hidden)
            layers.append(hidden)
        normed = self.post_layernorm(hidden)
        features = self.projection(normed)
        return VisionOutput(embeddings, pre_layernorm, tuple(layers), normed[:, 0], features[:, 0], features[:, 1:])


class TextTower(nnx.Module):
    """CLIP's text tower: causal blocks, read at the first end token, projection."""

    def __init__(self, config: TextConfig, *, dtype: str = "float32", rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        normal = nnx.initializers.normal(0.02)
        self.token_embedding = nnx.Param(normal(rngs.params(), (config.vocabulary, config.width)))
        self.position_embedding = nnx.Param(normal(rngs.params(), (config.positions, config.width)))
        compute = jnp.dtype(dtype)
        self.layers = nnx.List(Block(config, causal=True, dtype=compute, rngs=rngs) for _ in range(config.layers))
        self.final_layer_norm = layer_norm(config.width, config.layer_norm_epsilon, compute, rngs)
        self.projection = nnx.Linear(config.width, config.embedding, use_bias=False, dtype=compute, rngs=rngs)

    def __call__(self, tokens: Int[Array, "batch length"]) -> TextOutput:
        """All stages for token rows that start with the start token and are padded after the end token.

        The tower is causal, so what follows the end token cannot change the text's vector: no mask is needed
        and rows may be cut anywhere after it.

        Raises:
          ValueError: more tokens than positions.
        """
        if tokens.shape[1] > self.config.positions:
            raise ValueError(f"{tokens.shape[1]} tokens, but this text tower has {self.config.positions} positions")
        dtype = jnp.dtype(self.dtype)
        embeddings = self.token_embedding[...][tokens] + self.position_embedding[: tokens.shape[1]]
        hidden = embeddings = embeddings.astype(dtype)
        layers = []
        for layer in self.layers:
            hidden = layer(hidden)
            layers.append(hidden)
        last = self.final_layer_norm(hidden)
        # argmax finds the first of equal values.
        end = jnp.argmax(tokens == self.config.end_token, axis=1)
        pooled = last[jnp.arange(tokens.shape[0]), end]
        return TextOutput(embeddings, tuple(layers), last, pooled, self.projection(pooled))

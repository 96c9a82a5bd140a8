"""DINOv2 (Oquab et al., TMLR 2024) as an NNX module, and what ScaLR reads of it: the teacher of its distillation.

All published sizes: small, base, large, giant (SwiGLU), without and with registers (Darcet et al., ICLR 2024). The
arithmetic is that of the original code and of `transformers`, which differ in how they resize the positions.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from pop3d_jax.models.clip_towers import MLP, SelfAttention, embed_patches, layer_norm, resize_position_embedding
from pop3d_jax.models.maskclip import sample_cells
from pop3d_jax.models.maskclip_plus import containing_pixel, normalise

# What the original code adds to the wanted number of rows and columns before it divides by those of the table
# (`interpolate_pos_encoding`); `transformers` asks for the size. Networks with registers were trained without it, and
# antialiased: for them both rules are the same.
POSITION_RULES = {"official": 0.1, "transformers": 0.0}
# ScaLR's names of what its teacher may read (`image_backbone.feat`): the last block's output, before and after the
# final LayerNorm. The published teacher reads the former.
FEATURES = ("x_pre_norm", "x")


@dataclasses.dataclass(frozen=True)
class DINOv2Config:
    """Sizes. `image_size` of the position table and `patch_size` are in pixels; pictures may have other sizes."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    image_size: int
    patch_size: int
    registers: int = 0
    swiglu: bool = False
    qkv_bias: bool = True
    activation: str = "gelu"
    layer_norm_epsilon: float = 1e-6


class DINOv2Output(NamedTuple):
    """All stages, `[b, 1 + registers + patches, width]`: class token, registers, patches. What is not read costs
    nothing under jit.

    embeddings: positions added; layers: output of every block, the last of which is official "x_pre_norm";
    normed: after the final LayerNorm.
    """

    embeddings: Array
    layers: tuple[Array, ...]
    normed: Array


class SwiGLU(nnx.Module):
    """The giant's feed-forward part: a linear layer gated by the SiLU of another, and one back."""

    def __init__(self, width: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate_proj = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.up_proj = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down_proj = nnx.Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DINOv2Block(nnx.Module):
    """Pre-norm transformer block with a learned scale of each channel of both branches."""

    def __init__(self, config: DINOv2Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, epsilon = config.width, config.layer_norm_epsilon
        self.layer_norm1 = layer_norm(width, epsilon, dtype, rngs)
        self.self_attn = SelfAttention(
            width, config.heads, causal=False, qkv_bias=config.qkv_bias, dtype=dtype, rngs=rngs
        )
        self.layer_scale1 = nnx.Param(jnp.ones(width))
        self.layer_norm2 = layer_norm(width, epsilon, dtype, rngs)
        if config.swiglu:
            self.mlp = SwiGLU(width, config.mlp_width, dtype=dtype, rngs=rngs)
        else:
            self.mlp = MLP(width, config.mlp_width, config.activation, dtype=dtype, rngs=rngs)
        self.layer_scale2 = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        x = x + self.self_attn(self.layer_norm1(x)) * self.layer_scale1[...].astype(x.dtype)
        return x + self.mlp(self.layer_norm2(x)) * self.layer_scale2[...].astype(x.dtype)


class DINOv2(nnx.Module):
    """The network.

    Args of the constructor:
      config: sizes.
      position_rule: a key of `POSITION_RULES`.
      dtype: what matrix products are computed in; parameters are float32.

    Raises:
      ValueError: unknown rule.
    """

    def __init__(
        self, config: DINOv2Config, position_rule: str = "official", *, dtype: str = "float32", rngs: nnx.Rngs
    ):
        if position_rule not in POSITION_RULES:
            raise ValueError(f"unknown position rule {position_rule!r} of DINOv2: known are {sorted(POSITION_RULES)}")
        self.config, self.position_rule, self.dtype = config, position_rule, dtype
        width, patch = config.width, config.patch_size
        normal = nnx.initializers.normal(0.02)
        self.class_token = nnx.Param(normal(rngs.params(), (1, 1, width)))
        if config.registers:
            self.register_tokens = nnx.Param(normal(rngs.params(), (1, config.registers, width)))
        self.position_embedding = nnx.Param(normal(rngs.params(), (1, 1 + (config.image_size // patch) ** 2, width)))
        self.patch_embedding = nnx.Param(
            nnx.initializers.lecun_normal(in_axis=(0, 1, 2))(rngs.params(), (patch, patch, 3, width))
        )
        self.patch_bias = nnx.Param(jnp.zeros(width))
        compute = jnp.dtype(dtype)
        self.layers = nnx.List(DINOv2Block(config, dtype=compute, rngs=rngs) for _ in range(config.layers))
        self.final_layer_norm = layer_norm(width, config.layer_norm_epsilon, compute, rngs)

    def positions(self, grid: tuple[int, int]) -> Float[Array, "tokens width"]:
        """Position embedding of the class token and of a grid of patches, resized by the rule."""
        registers = self.config.registers > 0
        offset = 0.0 if registers else POSITION_RULES[self.position_rule]
        return resize_position_embedding(self.position_embedding[0], grid, offset=offset, antialias=registers)

    def embed(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch tokens dim"]:
        """Class token, registers and patch tokens, positions added to all but the registers.

        Raises:
          ValueError: height or width is no multiple of the patch size.
        """
        dtype = jnp.dtype(self.dtype)
        tokens = embed_patches(images.astype(dtype), self.patch_embedding[...].astype(dtype))
        batch, rows, columns, width = tokens.shape
        positions = self.positions((rows, columns)).astype(dtype)
        tokens = tokens.reshape(batch, rows * columns, width) + self.patch_bias[...].astype(dtype) + positions[1:]
        first = self.class_token[...].astype(dtype) + positions[0]
        if self.config.registers:
            first = jnp.concatenate([first, self.register_tokens[...].astype(dtype)], axis=1)
        return jnp.concatenate([jnp.broadcast_to(first, (batch, *first.shape[1:])), tokens], axis=1)

    def __call__(self, images: Float[Array, "batch height width 3"]) -> DINOv2Output:
        """All stages for normalised RGB pictures whose sides are multiples of the patch size."""
        hidden = embeddings = self.embed(images)
        layers = []
        for layer in self.layers:
            hidden = layer(hidden)
            layers.append(hidden)
        return DINOv2Output(embeddings, tuple(layers), self.final_layer_norm(hidden))


class DINOv2Teacher(nnx.Module):
    """DINOv2 as ScaLR's teacher of points (`models/image_teacher.py` of ScaLR).

    Args of the constructor:
      network: where the weights come from; they are shared, not copied.
      feature: one of `FEATURES`.

    Raises:
      ValueError: unknown feature.
    """

    def __init__(self, network: DINOv2, feature: str = "x_pre_norm"):
        if feature not in FEATURES:
            raise ValueError(f"unknown feature {feature!r} of DINOv2: known are {FEATURES}")
        self.network, self.feature = network, feature

    def dense_features(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch rows columns dim"]:
        """Features of normalised RGB pictures, one per patch, not normalised.

        Raises:
          ValueError: height or width is no multiple of the patch size.
        """
        config = self.network.config
        output = self.network(images)
        tokens = output.normed if self.feature == "x" else output.layers[-1]
        batch, height, width, _ = images.shape
        grid = (height // config.patch_size, width // config.patch_size)
        return tokens[:, 1 + config.registers :].reshape(batch, *grid, -1).astype(jnp.float32)

    def features_at(
        self,
        images: UInt8[Array, "image height width 3"],
        picture: Int[Array, " points"],
        pixel: Float[Array, "points 2"],
    ) -> Float[Array, "points dim"]:
        """Official features at pixels of RGB pictures (0..255).

        Args:
          images: sides must be multiples of the patch size. Official: 224 x 448, whatever the picture's ratio was.
          picture: which picture each point is read from; must be a valid index.
          pixel: (row, column) of the pixel's centre as shares of the picture.

        Raises:
          ValueError: height or width is no multiple of the patch size.
        """
        image_hw, patch = images.shape[1:3], self.network.config.patch_size
        if image_hw[0] % patch or image_hw[1] % patch:
            fitting = tuple(max(side // patch, 1) * patch for side in image_hw)
            raise ValueError(
                f"the DINOv2 teacher reads patches of {patch} x {patch} pixels, into which pictures of {image_hw[0]} x "
                f"{image_hw[1]} do not divide: set --config.data.teacher_image_hw={fitting} (of a lidar network: "
                "--config.points.image_hw)"
            )
        return sample_upsampled(self.dense_features(normalise(images)), image_hw, picture, pixel)


def sample_upsampled(
    features: Float[Array, "image rows columns dim"],
    image_hw: tuple[int, int],
    picture: Int[Array, " points"],
    pixel: Float[Array, "points 2"],
) -> Float[Array, "points dim"]:
    """Reads patch features at pixels, as from maps upsampled to the whole picture, which are never built.

    The upsampling is bilinear with align_corners=True: the first and last pixel are the first and last cell's centres.

    Args:
      features: one grid per picture.
      image_hw: height and width of the pictures, in pixels.
      picture: which picture each point is read from; must be a valid index.
      pixel: (row, column) as shares of the picture; the pixel that contains the position is read.
    """
    pixels = jnp.stack(containing_pixel(pixel, image_hw), axis=1).astype(jnp.float32)
    steps = [(cells - 1) / max(side - 1, 1) for cells, side in zip(features.shape[1:3], image_hw, strict=True)]
    return sample_cells(features, picture, pixels * jnp.array(steps, jnp.float32))

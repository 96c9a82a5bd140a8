"""The image backbone: a caffe-style ResNet with deformable convolutions, as mmsegmentation's `ResNet` builds it.

Names of the parts are those of the official state dict, so that converting weights is renaming.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from pop3d_jax.models.batch_norm import FrozenBatchNorm
from pop3d_jax.ops.deformable_conv import Implementation, deformable_conv2d

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_EXPANSION = 4  # a block's output has four times the channels of its middle
# He et al. 2015, for the ReLU that follows; the official initialisation where there is no checkpoint.
_he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(
    channels: int, out_channels: int, size: int, *, stride: int = 1, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Conv:
    """A convolution without bias that pads by half its size on both sides, as PyTorch does."""
    return nnx.Conv(
        channels,
        out_channels,
        (size, size),
        strides=(stride, stride),
        padding=((size // 2, size // 2),) * 2,
        use_bias=False,
        kernel_init=_he_normal,
        dtype=dtype,
        rngs=rngs,
    )


def _max_pool(x: jax.Array) -> jax.Array:
    """Maximum over 3 x 3 cells, stride 2, padding 1.

    Written as maxima of strided slices, first along the width, then along the height: the gradient of XLA's own
    pooling is some fifteen times slower on a CPU.
    """
    for axis in (2, 1):
        extent = (x.shape[axis] - 1) // 2 * 2 + 1
        frame = [(0, 0)] * 4
        frame[axis] = (1, 1)
        padded = jnp.pad(x, frame, constant_values=-jnp.inf)
        first, second, third = (jax.lax.slice_in_dim(padded, i, i + extent, 2, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


class DeformableConv(nnx.Module):
    """A 3 x 3 deformable convolution that predicts its own offsets and masks: mmcv's `ModulatedDeformConv2dPack`.

    The 27 channels of `conv_offset` are (dy, dx) of the nine taps, interleaved, and nine mask logits; the mask is
    their sigmoid. They start at zero, so that training starts from a plain convolution of half the weight.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        implementation: Implementation | Literal["auto"] = "auto",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.stride = stride
        self.implementation = implementation
        self.dtype = dtype
        self.kernel = nnx.Param(_he_normal(rngs.params(), (3, 3, channels, out_channels)))
        self.conv_offset = nnx.Conv(
            channels,
            27,
            (3, 3),
            strides=(stride, stride),
            padding=((1, 1), (1, 1)),
            kernel_init=nnx.initializers.zeros,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "image height width channel"]
    ) -> Float[Array, "image out_height out_width out_channel"]:
        """Convolves `x` where its content tells it to."""
        predicted = self.conv_offset(x)
        offset = predicted[..., :18].reshape(*predicted.shape[:3], 9, 2)
        mask = jax.nn.sigmoid(predicted[..., 18:])
        kernel = self.kernel[...].astype(self.dtype)
        return deformable_conv2d(
            x.astype(self.dtype),
            offset,
            mask,
            kernel,
            stride=self.stride,
            padding=1,
            implementation=self.implementation,
        )


class Bottleneck(nnx.Module):
    """A residual block, caffe style: the stride is on the first 1 x 1 convolution, not on the 3 x 3 one."""

    def __init__(
        self,
        channels: int,
        middle: int,
        *,
        stride: int = 1,
        deformable: bool = False,
        implementation: Implementation | Literal["auto"] = "auto",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        out_channels = middle * _EXPANSION
        self.conv1 = _conv(channels, middle, 1, stride=stride, dtype=dtype, rngs=rngs)
        self.bn1 = FrozenBatchNorm(middle)
        if deformable:
            self.conv2 = DeformableConv(middle, middle, implementation=implementation, dtype=dtype, rngs=rngs)
        else:
            self.conv2 = _conv(middle, middle, 3, dtype=dtype, rngs=rngs)
        self.bn2 = FrozenBatchNorm(middle)
        self.conv3 = _conv(middle, out_channels, 1, dtype=dtype, rngs=rngs)
        self.bn3 = FrozenBatchNorm(out_channels)
        if stride != 1 or channels != out_channels:
            projection = _conv(channels, out_channels, 1, stride=stride, dtype=dtype, rngs=rngs)
            self.downsample = nnx.List([projection, FrozenBatchNorm(out_channels)])
        else:
            self.downsample = None

    def __call__(
        self, x: Float[Array, "image height width channel"], calibrate: bool = False
    ) -> Float[Array, "image out_height out_width out_channel"]:
        """The block.

        Args:
          x: the maps.
          calibrate: see `calibrate_batch_norm`.

        Returns:
          The maps, strided.
        """
        identity = x
        if self.downsample is not None:
            convolution, norm = self.downsample
            identity = norm(convolution(x), calibrate)
        x = jax.nn.relu(self.bn1(self.conv1(x), calibrate))
        x = jax.nn.relu(self.bn2(self.conv2(x), calibrate))
        return jax.nn.relu(self.bn3(self.conv3(x), calibrate) + identity)


def _rematerialised(block: Bottleneck, x: jax.Array) -> jax.Array:
    """The block, computed a second time in the backward pass instead of being remembered."""
    graph, state = nnx.split(block)
    return jax.checkpoint(lambda state, x: nnx.merge(graph, state)(x))(state, x)


class ResNet(nnx.Module):
    """ResNet-50 or -101, caffe style, with frozen BatchNorm and DCNv2 in the stages that ask for it.

    Attributes:
      out_channels: channels of the three outputs.
    """

    def __init__(
        self,
        depth: int = 101,
        *,
        blocks: Sequence[int] | None = None,
        width: int = 64,
        deformable_stages: Sequence[bool] = (False, False, True, True),
        dtype: DTypeLike = jnp.float32,
        remat: Sequence[bool] = (False, False, False, False),
        implementation: Implementation | Literal["auto"] = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        """Builds the network.

        Args:
          depth: 50 or 101.
          blocks: residual blocks of the four stages, instead of those of `depth`, for smaller networks.
          width: channels of the stem; every other number of channels follows it.
          deformable_stages: which of the four stages use deformable convolutions.
          dtype: type of the computation; parameters are float32.
          remat: in which of the four stages every block is computed again in the backward pass: less memory, a third
            more time.
          implementation: of the deformable convolutions.
          rngs: for the initial weights.

        Raises:
          ValueError: if the depth is unknown or a sequence has not four entries.
        """
        if blocks is None:
            if depth not in BLOCKS:
                raise ValueError(
                    f"ResNet of depth {depth} is not known: choose one of {sorted(BLOCKS)}, or give blocks"
                )
            blocks = BLOCKS[depth]
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"blocks {tuple(blocks)}: a ResNet has four stages of at least one block")
        for name, stages in (("deformable_stages", deformable_stages), ("remat", remat)):
            if len(stages) != 4:
                raise ValueError(f"{name} {tuple(stages)}: a ResNet has four stages")
        self.dtype = dtype
        self.remat = tuple(remat)
        self.out_channels = tuple(width * 2**stage * _EXPANSION for stage in (1, 2, 3))
        self.conv1 = _conv(3, width, 7, stride=2, dtype=dtype, rngs=rngs)
        self.bn1 = FrozenBatchNorm(width)
        channels = width
        for stage, (count, deformable) in enumerate(zip(blocks, deformable_stages, strict=True)):
            middle = width * 2**stage
            layer = []
            for index in range(count):
                layer.append(
                    Bottleneck(
                        channels,
                        middle,
                        stride=2 if stage > 0 and index == 0 else 1,
                        deformable=deformable,
                        implementation=implementation,
                        dtype=dtype,
                        rngs=rngs,
                    )
                )
                channels = middle * _EXPANSION
            setattr(self, f"layer{stage + 1}", nnx.List(layer))

    def __call__(
        self, images: Float[Array, "image height width 3"], calibrate: bool = False
    ) -> tuple[
        Float[Array, "image height8 width8 channel8"],
        Float[Array, "image height16 width16 channel16"],
        Float[Array, "image height32 width32 channel32"],
    ]:
        """Features of the images.

        Args:
          images: BGR minus the mean (see `nuscenes.IMAGE_MEAN_BGR`), any size; multiples of 32 are usual.
          calibrate: whether every BatchNorm takes its statistics from this batch; see `calibrate_batch_norm`.

        Returns:
          Features at strides 8, 16 and 32, of `out_channels` channels.
        """
        x = images.astype(self.dtype)
        x = _max_pool(jax.nn.relu(self.bn1(self.conv1(x), calibrate)))
        outputs = []
        for layer, remat in zip((self.layer1, self.layer2, self.layer3, self.layer4), self.remat, strict=True):
            for block in layer:
                # A checkpointed function must be pure, and calibration changes the block.
                x = _rematerialised(block, x) if remat and not calibrate else block(x, calibrate)
            outputs.append(x)
        return tuple(outputs[1:])

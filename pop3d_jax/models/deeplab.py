"""The student network of MaskCLIP+ (Zhou et al., ECCV 2022): DeepLabV2 on a dilated ResNet.

Its features are the published targets of POP-3D. Inference only: BatchNorm is frozen and nothing is initialised for
training. Official code: mmsegmentation's `ResNetV1c` and `ASPPHeadV2`, `MaskClipPlusHead` of the MaskCLIP fork in
POP-3D. Names of the parts follow the official state dict (see `maskclip_plus_weights.official_key`).
"""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from pop3d_jax.models.batch_norm import FrozenBatchNorm
from pop3d_jax.models.resnet import BLOCKS

_EXPANSION = 4  # a block's output has four times the channels of its middle


def _conv(
    channels: int, out_channels: int, size: int, *, stride: int = 1, dilation: int = 1, rngs: nnx.Rngs
) -> nnx.Conv:
    """A convolution without bias that pads by half its dilated size on both sides, as PyTorch does."""
    margin = dilation * (size // 2)
    return nnx.Conv(
        channels,
        out_channels,
        (size, size),
        strides=(stride, stride),
        padding=((margin, margin),) * 2,
        kernel_dilation=(dilation, dilation),
        use_bias=False,
        rngs=rngs,
    )


class ConvNorm(nnx.Module):
    """A 3 x 3 convolution without bias, frozen BatchNorm, ReLU: mmcv's `ConvModule`."""

    def __init__(self, channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1, rngs: nnx.Rngs) -> None:
        self.conv = _conv(channels, out_channels, 3, stride=stride, dilation=dilation, rngs=rngs)
        self.bn = FrozenBatchNorm(out_channels)

    def __call__(
        self, x: Float[Array, "image height width channel"]
    ) -> Float[Array, "image out_height out_width out_channel"]:
        """Convolves, normalises and rectifies."""
        return jax.nn.relu(self.bn(self.conv(x)))


class DilatedBottleneck(nnx.Module):
    """A residual block, pytorch style: stride and dilation are on the 3 x 3 convolution."""

    def __init__(self, channels: int, middle: int, *, stride: int = 1, dilation: int = 1, rngs: nnx.Rngs) -> None:
        out_channels = middle * _EXPANSION
        self.conv1 = _conv(channels, middle, 1, rngs=rngs)
        self.bn1 = FrozenBatchNorm(middle)
        self.conv2 = _conv(middle, middle, 3, stride=stride, dilation=dilation, rngs=rngs)
        self.bn2 = FrozenBatchNorm(middle)
        self.conv3 = _conv(middle, out_channels, 1, rngs=rngs)
        self.bn3 = FrozenBatchNorm(out_channels)
        if stride != 1 or channels != out_channels:
            projection = _conv(channels, out_channels, 1, stride=stride, rngs=rngs)
            self.downsample = nnx.List([projection, FrozenBatchNorm(out_channels)])
        else:
            self.downsample = None

    def __call__(
        self, x: Float[Array, "image height width channel"]
    ) -> Float[Array, "image out_height out_width out_channel"]:
        """The block."""
        identity = x
        if self.downsample is not None:
            convolution, norm = self.downsample
            identity = norm(convolution(x))
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        x = jax.nn.relu(self.bn2(self.conv2(x)))
        return jax.nn.relu(self.bn3(self.conv3(x)) + identity)


class DilatedResNet(nnx.Module):
    """ResNetV1c: a stem of three 3 x 3 convolutions, and dilation in place of stride where the stages ask for it."""

    def __init__(
        self,
        depth: int,
        *,
        stem_channels: int,
        base_channels: int,
        strides: Sequence[int],
        dilations: Sequence[int],
        first_dilations: Sequence[int],
        rngs: nnx.Rngs,
    ) -> None:
        """Builds the network; see `DeepLabV2` for the arguments and errors."""
        if depth not in BLOCKS:
            raise ValueError(f"ResNet of depth {depth} is not known: choose one of {sorted(BLOCKS)}")
        for name, values in (("strides", strides), ("dilations", dilations), ("first_dilations", first_dilations)):
            if len(values) != 4:
                raise ValueError(f"{name} {tuple(values)}: a ResNet has four stages")
        half = stem_channels // 2
        self.stem = nnx.List(
            [
                ConvNorm(3, half, stride=2, rngs=rngs),
                ConvNorm(half, half, rngs=rngs),
                ConvNorm(half, stem_channels, rngs=rngs),
            ]
        )
        channels = stem_channels
        for stage, count in enumerate(BLOCKS[depth]):
            middle = base_channels * 2**stage
            layer = []
            for index in range(count):
                first = index == 0
                layer.append(
                    DilatedBottleneck(
                        channels,
                        middle,
                        stride=strides[stage] if first else 1,
                        dilation=first_dilations[stage] if first else dilations[stage],
                        rngs=rngs,
                    )
                )
                channels = middle * _EXPANSION
            setattr(self, f"layer{stage + 1}", nnx.List(layer))
        self.out_channels = channels

    def __call__(
        self, images: Float[Array, "image height width 3"]
    ) -> Float[Array, "image out_height out_width out_channel"]:
        """Maps of the last stage, `out_channels` wide."""
        x = images
        for part in self.stem:
            x = part(x)
        x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = block(x)
        return x


class DilatedHead(nnx.Module):
    """ASPPHeadV2: 3 x 3 convolutions of several dilations, each with BatchNorm and ReLU, summed."""

    def __init__(self, channels: int, out_channels: int, dilations: Sequence[int], *, rngs: nnx.Rngs) -> None:
        self.aspp_modules = nnx.List(
            [ConvNorm(channels, out_channels, dilation=dilation, rngs=rngs) for dilation in dilations]
        )

    def __call__(self, x: Float[Array, "image rows columns channel"]) -> Float[Array, "image rows columns out_channel"]:
        """The sum of the branches, hence never negative."""
        first, *others = self.aspp_modules
        total = first(x)
        for branch in others:
            total = total + branch(x)
        return total


class DeepLabV2(nnx.Module):
    """DeepLabV2 with the official MaskCLIP+ settings as defaults: a feature cell per 8 x 8 pixels.

    Attributes:
      feature_dim: channels of the features.
    """

    def __init__(
        self,
        depth: int = 50,
        *,
        stem_channels: int = 64,
        base_channels: int = 64,
        aspp_channels: int = 512,
        strides: Sequence[int] = (1, 2, 1, 1),
        dilations: Sequence[int] = (1, 1, 2, 4),
        first_dilations: Sequence[int] = (1, 1, 1, 2),
        aspp_dilations: Sequence[int] = (6, 12, 18, 24),
        rngs: nnx.Rngs,
    ) -> None:
        """Builds the network.

        Args:
          depth: 50 or 101. Published file names say "r101", the configuration that made them builds 50.
          stem_channels: of the stem's last convolution; the other two have half of it.
          base_channels: middle channels of the first stage's blocks; every later stage has twice as many.
          aspp_channels: channels of the features.
          strides: of the first block of the four stages.
          dilations: of the other blocks of the four stages.
          first_dilations: of their first blocks: half as much, where a stage is dilated (`contract_dilation`).
          aspp_dilations: one branch of the head each.
          rngs: for the initial weights, which serve only until official ones are loaded.

        Raises:
          ValueError: if the depth is unknown or a sequence about the stages has not four entries.
        """
        self.backbone = DilatedResNet(
            depth,
            stem_channels=stem_channels,
            base_channels=base_channels,
            strides=strides,
            dilations=dilations,
            first_dilations=first_dilations,
            rngs=rngs,
        )
        self.head = DilatedHead(self.backbone.out_channels, aspp_channels, aspp_dilations, rngs=rngs)
        self.feature_dim = aspp_channels

    def __call__(self, images: Float[Array, "image height width 3"]) -> Float[Array, "image rows columns feature_dim"]:
        """Features of RGB images normalised with ImageNet's statistics, as float32.

        Not normalised and never negative. Sides need no padding: a side of n pixels gives ceil(n / 8) cells.
        """
        return self.head(self.backbone(images))

"""The neck: a feature pyramid as mmsegmentation's `FPN` builds it, without normalisation or activation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float


def _conv(
    channels: int, out_channels: int, size: int, *, stride: int = 1, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Conv:
    return nnx.Conv(
        channels,
        out_channels,
        (size, size),
        strides=(stride, stride),
        padding=((size // 2, size // 2),) * 2,
        kernel_init=nnx.initializers.xavier_uniform(),
        dtype=dtype,
        rngs=rngs,
    )


def upsample_nearest(x: Float[Array, "image height width channel"], size: tuple[int, int]) -> jax.Array:
    """Doubles a map by repetition and cuts it to an exact size: nearest interpolation between levels of a pyramid.

    Args:
      x: the coarse map.
      size: (height, width) of the finer level; each is twice the coarse one, or one less.

    Returns:
      [image, *size, channel].

    Raises:
      ValueError: if the sizes are not those of neighbouring levels.
    """
    coarse = x.shape[1:3]
    if any(small != (large + 1) // 2 for small, large in zip(coarse, size, strict=True)):
        raise ValueError(f"FPN: a level of {coarse} cells cannot follow one of {size}: each must be half, rounded up")
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, : size[0], : size[1]]


class FPN(nnx.Module):
    """Feature pyramid: the same number of channels at every level, coarse content added to the finer levels."""

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Builds the neck.

        Args:
          in_channels: channels of the backbone's outputs, fine to coarse.
          out_channels: channels of every level.
          num_outs: number of levels: as many as inputs, or one more.
          dtype: type of the computation; parameters are float32.
          rngs: for the initial weights.

        Raises:
          ValueError: if there would be more than one extra level.
        """
        if num_outs - len(in_channels) not in (0, 1):
            raise ValueError(f"FPN: {num_outs} levels from {len(in_channels)} inputs; at most one extra is supported")
        self.lateral_convs = nnx.List(
            [_conv(channels, out_channels, 1, dtype=dtype, rngs=rngs) for channels in in_channels]
        )
        self.fpn_convs = nnx.List(
            [
                _conv(out_channels, out_channels, 3, stride=1 if i < len(in_channels) else 2, dtype=dtype, rngs=rngs)
                for i in range(num_outs)
            ]
        )

    def __call__(
        self, features: Sequence[Float[Array, "image _ _ _"]]
    ) -> tuple[Float[Array, "image _ _ channel"], ...]:
        """The levels of the pyramid.

        The extra level is a strided convolution of the last level itself: the official `relu_before_extra_convs`
        acts only from the second extra level on.

        Args:
          features: the backbone's outputs, fine to coarse, each half the size of the one before, rounded up.

        Returns:
          `num_outs` maps, fine to coarse.
        """
        levels = [convolution(x) for convolution, x in zip(self.lateral_convs, features, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + upsample_nearest(levels[i], levels[i - 1].shape[1:3])
        outputs = [convolution(level) for convolution, level in zip(self.fpn_convs, levels, strict=False)]
        if len(self.fpn_convs) > len(levels):
            outputs.append(self.fpn_convs[-1](outputs[-1]))
        return tuple(outputs)

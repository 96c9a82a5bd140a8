"""Batch normalisation that never updates its statistics, and a way to set them where there are none."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

EPSILON = 1e-5


class FrozenBatchNorm(nnx.Module):
    """`BatchNorm2d` in eval mode: one scale and one shift per channel, computed from four arrays.

    The official training keeps all of them fixed. Here `mean` and `var` are fixed statistics (`nnx.BatchStat`);
    `scale` and `bias` are parameters, and it is for the optimiser to leave them alone.
    """

    def __init__(self, channels: int) -> None:
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))

    def __call__(
        self, x: Float[Array, "image height width channel"], calibrate: bool = False
    ) -> Float[Array, "image height width channel"]:
        """Normalises.

        Args:
          x: the maps.
          calibrate: whether `mean` and `var` are first set to the statistics of `x`, over images and space.

        Returns:
          The normalised maps, in the type of `x`.
        """
        if calibrate:
            exact = x.astype(jnp.float32)
            self.mean[...] = jnp.mean(exact, axis=(0, 1, 2))
            self.var[...] = jnp.var(exact, axis=(0, 1, 2))
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + EPSILON)
        shift = self.bias[...] - self.mean[...] * scale
        return x * scale.astype(x.dtype) + shift.astype(x.dtype)


def calibrate_batch_norm(network: nnx.Module, images: Float[Array, "image height width channel"]) -> None:
    """Sets the statistics of every frozen BatchNorm from a batch of images, in place.

    For runs without pretrained weights, where mean 0 and variance 1 would normalise nothing. One forward pass, layer
    by layer: each layer sees inputs that the layers before it already normalise with their new statistics.

    Args:
      network: a network whose call takes `calibrate`, such as `ResNet`.
      images: its input; a few training images are enough.
    """
    graph, state = nnx.split(network)

    @jax.jit
    def statistics(state: Any, images: jax.Array) -> Any:
        calibrated = nnx.merge(graph, state)
        calibrated(images, calibrate=True)
        return nnx.state(calibrated, nnx.BatchStat)

    nnx.update(network, statistics(state, images))

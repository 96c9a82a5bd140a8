"""Batch normalisation: one that never updates its statistics, a way to set them where there are none, and one that does
as PyTorch's in training."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

EPSILON = 1e-5
# Share of a batch's statistics in the new running ones; PyTorch's default, and its meaning of the word.
MOMENTUM = 0.1


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


class BatchNorm(nnx.Module):
    """PyTorch's `BatchNorm1d` or `BatchNorm2d` over the last axis, with statistics of the batch in training.

    Not `nnx.BatchNorm`, whose running variance is that of the batch: PyTorch's is the unbiased estimate (divided by
    count - 1), while the batch itself is normalised by the other one. On a mesh the statistics are those of the whole
    batch.
    """

    def __init__(self, channels: int) -> None:
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))

    def __call__(
        self,
        x: Float[Array, "*positions channel"],
        *,
        training: bool = False,
        counted: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "*positions channel"]:
        """Normalises, in float32.

        Args:
          x: one row of channels for each position.
          training: whether to normalise with the statistics of `x`; `mean` and `var` then move towards them.
          counted: which positions the statistics are of, by the leading axes of `x`; None counts all.

        Returns:
          The normalised rows, all of them, in the type of `x`.
        """
        exact = x.astype(jnp.float32)
        if training:
            mean, var = self._of_batch(exact, counted)
        else:
            mean, var = self.mean[...], self.var[...]
        scale = self.scale[...] * jax.lax.rsqrt(var + EPSILON)
        return ((exact - mean) * scale + self.bias[...]).astype(x.dtype)

    def _of_batch(
        self, x: Float[Array, "*positions channel"], counted: Bool[Array, "..."] | None
    ) -> tuple[Float[Array, " channel"], Float[Array, " channel"]]:
        """Mean and variance of the counted rows; the running ones are updated."""
        axes = tuple(range(x.ndim - 1))
        if counted is None:
            counted = jnp.ones((), bool)
        # A bool for each row, at whatever axes `counted` has.
        counted = jnp.broadcast_to(counted.reshape(counted.shape + (1,) * (x.ndim - counted.ndim)), (*x.shape[:-1], 1))
        # None counted: zeros, not NaN, which would stay in the running statistics for good.
        count = jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)
        mean = jnp.sum(jnp.where(counted, x, 0.0), axes) / count
        squares = jnp.sum(jnp.where(counted, jnp.square(x - mean), 0.0), axes)
        # Running statistics are no way for gradients.
        fixed_mean, unbiased = jax.lax.stop_gradient((mean, squares / jnp.maximum(count - 1.0, 1.0)))
        self.mean[...] = (1.0 - MOMENTUM) * self.mean[...] + MOMENTUM * fixed_mean
        self.var[...] = (1.0 - MOMENTUM) * self.var[...] + MOMENTUM * unbiased
        return mean, squares / count


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

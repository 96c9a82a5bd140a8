"""Small parts that the encoder and the heads share."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

xavier_uniform = nnx.initializers.xavier_uniform()


def fan_in_uniform(fan_in: int) -> nnx.Initializer:
    """PyTorch's default for kernels and biases of linear layers and convolutions: uniform within 1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)

    def uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, out_sharding=None) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return uniform


def linear(
    in_dims: int,
    out_dims: int,
    *,
    use_bias: bool = True,
    kernel_init: nnx.Initializer | None = None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear layer that starts as PyTorch's does: kernel (unless given) and bias uniform within 1/sqrt(in_dims)."""
    uniform = fan_in_uniform(in_dims)
    return nnx.Linear(
        in_dims,
        out_dims,
        use_bias=use_bias,
        kernel_init=kernel_init or uniform,
        bias_init=uniform,
        dtype=dtype,
        rngs=rngs,
    )


def dropout(x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | Array | None) -> Float[Array, "*shape"]:
    """Sets a share ``rate`` of the numbers to zero and scales up the rest; without a key (inference) does nothing."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def split_keys(key: PRNGKeyArray | Array | None, count: int) -> list[Array | None]:
    """``count`` independent keys, or as many None in inference."""
    return [None] * count if key is None else list(jax.random.split(key, count))

"""Deterministic stand-in weights for parity tests (numpy only, nothing stored).

``reference_weight(name, shape)`` returns the same float32 array everywhere: the
generator is a Philox counter keyed with ``zlib.crc32(name)``, only its raw
64-bit words are used (that stream is frozen by numpy), and the top 53 bits of
each word become one uniform number u in [-1, 1), in C order.  ``name`` is the
parameter's key in the PyTorch ``state_dict`` and ``shape`` its PyTorch shape.

Value rules, first match wins (u is the uniform array described above):
  *num_batches_tracked            0
  *running_mean                   0.2 u
  *running_var                    1 + 0.3 u                  (0.7 .. 1.3)
  *scale.weight, *gamma, *lambda1 0.55 + 0.45 u              (LayerScale, 0.1 .. 1)
  *logit_scale                    ln(1 / 0.07)
  *bias                           0.1 u
  *class_embedding, *cls_token, *mask_token   0.5 u
  *pos_embed, *position_embeddings, *position_embedding.weight,
  *token_embedding.weight         0.5 u
  other 1-D arrays                1 + 0.2 u                  (norm weights)
  everything else                 sqrt(3 / fan_in) u, fan_in = prod(shape[1:])
                                  (so the standard deviation is 1/sqrt(fan_in))
"""

import zlib

import numpy as np

_HALF = (
    "class_embedding",
    "cls_token",
    "mask_token",
    "pos_embed",
    "position_embeddings",
    "position_embedding.weight",
    "token_embedding.weight",
)


def uniform_pm1(name, shape):
    """Uniform float64 numbers in [-1, 1) that depend on `name` and `shape` only."""
    count = int(np.prod(shape, dtype=np.int64)) if len(shape) else 1
    words = np.random.Philox(key=zlib.crc32(name.encode("utf-8"))).random_raw(count)
    unit = (np.asarray(words, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (2.0 * unit - 1.0).reshape(tuple(shape))


def reference_weight(name, shape):
    shape = tuple(int(s) for s in shape)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.float32)
    if name.endswith("logit_scale"):
        return np.full(shape, np.log(1.0 / 0.07), np.float32)
    u = uniform_pm1(name, shape)
    if name.endswith("running_mean"):
        value = 0.2 * u
    elif name.endswith("running_var"):
        value = 1.0 + 0.3 * u
    elif name.endswith(("scale.weight", "gamma", "lambda1")):
        value = 0.55 + 0.45 * u
    elif name.endswith("bias"):
        value = 0.1 * u
    elif name.endswith(_HALF):
        value = 0.5 * u
    elif len(shape) <= 1:
        value = 1.0 + 0.2 * u
    else:
        value = np.sqrt(3.0 / np.prod(shape[1:])) * u
    return value.astype(np.float32)

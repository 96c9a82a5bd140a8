"""Deterministic reference weights: a pure function of (parameter name, shape), numpy only."""

import math
import zlib

import numpy as np

COMPUTED_BUFFERS = ("ref_3d_", "ref_2d_", "tpv_mask_hw")  # keep the values the model computes itself


def is_computed_buffer(name):
    return any(tag in name for tag in COMPUTED_BUFFERS)


def _unit_uniform(name, shape):
    """Zero mean, unit variance, in (-sqrt(3), sqrt(3)); from raw 64-bit words, so independent of numpy's samplers."""
    n = int(np.prod(shape, dtype=np.int64))
    raw = np.random.Philox(zlib.crc32(name.encode("utf-8"))).random_raw(n)
    u = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return ((2.0 * u - 1.0) * math.sqrt(3.0)).reshape(shape)


def reference_weight(name, shape):
    shape = tuple(int(s) for s in shape)
    if is_computed_buffer(name):
        raise ValueError(f"{name} is computed by the model, not drawn")
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    r = _unit_uniform(name, shape)
    if leaf == "running_mean":
        w = 0.1 * r
    elif leaf == "running_var":
        w = 1.0 + 0.3 * r  # in (0.48, 1.52)
    elif "embed" in name:  # tpv / positional / level / camera embeddings
        w = 0.5 * r
    elif leaf == "weight" and len(shape) == 1:  # BatchNorm / LayerNorm scale
        w = 1.0 + 0.1 * r
    elif leaf == "bias":
        w = (1.0 if "sampling_offsets" in name else 0.5 if "conv_offset" in name else 0.1) * r
    else:  # convolution or linear weight
        gain = 1.0
        if name.startswith("img_backbone."):
            gain = math.sqrt(2.0)
            if name == "img_backbone.conv1.weight":
                gain /= 64.0  # the image is in 0..255 minus its mean
            elif ".conv3." in name or "conv_offset" in name:
                gain = 0.5
        elif name.startswith("img_neck."):
            gain = 0.5
        w = r * gain / math.sqrt(int(np.prod(shape[1:], dtype=np.int64)))
        if "aggregator.decoder" in name and name.endswith(".2.weight"):
            w = w - w.mean(axis=1, keepdims=True)  # cancels the common softplus offset: balanced logits
    return w.astype(np.float32)

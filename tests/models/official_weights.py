"""Gives a module the deterministic reference weights of the golden data, by the official names of its parameters."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def reference_weight_function(path: Path):
    """The function `reference_weight(name, shape)` of a golden set's reference_weights.py."""
    spec = importlib.util.spec_from_file_location("reference_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reference_weight


def load_official(build, get_weight, *, convolution_prefix: str = "") -> tuple[nnx.Module, list[str]]:
    """A module filled with official weights, and the official names that were asked for.

    Args:
      build: makes the module, whose parts are named as the official ones; its initial weights are never computed.
      get_weight: (official name, official shape) -> array.
      convolution_prefix: what the official name has between a convolution and its leaf ("conv." in the FPN).
    """
    module = nnx.eval_shape(build)
    names, filled = [], {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        *parents, leaf = path
        name = ".".join(str(part) for part in parents) + "." + convolution_prefix + _LEAVES[leaf]
        shape = variable.shape
        if len(shape) == 4:
            weight = np.transpose(get_weight(name, tuple(shape[i] for i in (3, 2, 0, 1))), (2, 3, 1, 0))
        else:
            weight = get_weight(name, shape)
        assert weight.shape == shape, f"{name}: {weight.shape} for {shape}"
        names.append(name)
        filled[path] = variable.replace(jnp.asarray(weight))
    nnx.update(module, nnx.from_flat_state(filled))
    return module, names

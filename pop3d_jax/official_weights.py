"""Between the official state dict and our parameters, strictly: every key has its place, or there is an error."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from pop3d_jax.models.pop3d import Pop3D
from pop3d_jax.models.tpv_geometry import PLANES, cell_centres, plane_shapes

# Names of modules, ours -> official. The order matters: the first lines are the more special ones.
_RENAMES = (
    (r"^backbone\.", "img_backbone."),
    (r"^neck\.(\w+)\.(\d+)\.", r"img_neck.\1.\2.conv."),
    (r"^encoder\.layers\.(\d+)\.self_attention\.", r"tpv_head.encoder.layers.\1.attentions.0."),
    (
        r"^encoder\.layers\.(\d+)\.cross_attention\.output_proj\.",
        r"tpv_head.encoder.layers.\1.attentions.1.output_proj.",
    ),
    (r"^encoder\.layers\.(\d+)\.cross_attention\.", r"tpv_head.encoder.layers.\1.attentions.1.deformable_attention."),
    (r"^encoder\.layers\.(\d+)\.feed_forward\.expand\.", r"tpv_head.encoder.layers.\1.ffns.0.layers.0.0."),
    (r"^encoder\.layers\.(\d+)\.feed_forward\.contract\.", r"tpv_head.encoder.layers.\1.ffns.0.layers.1."),
    (r"^encoder\.layers\.(\d+)\.norms\.", r"tpv_head.encoder.layers.\1.norms."),
    (r"^encoder\.(tpv_embedding_\w+|positional_encoding\.\w+)$", r"tpv_head.\1.weight"),
    (r"^encoder\.", "tpv_head."),
    (r"^heads\.occupancy\.classifier\.", "tpv_aggregator.classifier."),
    (r"^heads\.features\.classifier\.", "tpv_aggregator.classifier_ft."),
)
_DECODERS = {"occupancy": "decoder", "features": "decoder_ft"}
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def official_key(path: tuple[str | int, ...]) -> str:
    """Official name of one of our arrays: ("encoder", "level_embeds") -> "tpv_head.level_embeds".

    Raises:
        ValueError: for an array that the official network does not have.
    """
    *modules, leaf = (str(part) for part in path)
    name = ".".join([*modules, _LEAVES.get(leaf, leaf)])
    # The official decoder counts its activations too.
    decoder = re.match(r"^heads\.(\w+)\.layers\.(\d+)\.", name)
    if decoder:
        return f"tpv_aggregator.{_DECODERS[decoder[1]]}.{2 * int(decoder[2])}.{name[decoder.end() :]}"
    for pattern, replacement in _RENAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise ValueError(f"{name} has no official name")


def model_to_state_dict(model: Pop3D) -> dict[str, np.ndarray]:
    """All parameters and buffers under their official names and in their official layouts (OIHW, [out, in])."""
    state = {}
    for path, value in _flat_state(model).items():
        key = official_key(path)
        state[key] = _to_official(path, np.asarray(value))
        if path[-1] == "mean":
            state[key.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    return state | computed_buffers(model)


def state_dict_to_model(state_dict: Mapping[str, np.ndarray], model: Pop3D) -> None:
    """Loads official weights into ``model``, in place.

    Buffers that the network computes (anchors, the positional encoding's mask) are compared and not stored; the
    counters of BatchNorm are ignored. The prefix ``module.`` of distributed training is accepted.

    Raises:
        ValueError: unknown, missing or misshapen keys, or computed buffers of another network, all listed.
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    paths = {official_key(path): (path, value) for path, value in _flat_state(model).items()}
    buffers = computed_buffers(model)
    shapes = official_shapes(model)
    problems = [f"unknown: {key}" for key in state_dict if key not in shapes]
    problems += [f"missing: {key}" for key in shapes if key not in state_dict]
    for key, shape in shapes.items():
        if key not in state_dict:
            continue
        found = np.asarray(state_dict[key])
        if found.shape != shape:
            problems.append(f"shape of {key}: {found.shape}, the model needs {shape}")
        elif key in buffers and not np.allclose(found, buffers[key], rtol=0, atol=1e-5):
            problems.append(f"{key} differs from what this model computes: another volume or grid")
        elif key in paths and not np.all(np.isfinite(found)):
            problems.append(f"{key} is not finite")
    if problems:
        raise ValueError(
            f"the state dict does not fit this model ({len(problems)} problems; check the config):\n  "
            + "\n  ".join(problems)
        )
    flat = {
        path: jnp.asarray(_from_official(path, np.asarray(state_dict[key])), value.dtype)
        for key, (path, value) in paths.items()
    }
    nnx.update(model, traverse_util.unflatten_dict(flat))


def official_shapes(model: Pop3D) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of everything in the state dict; the model may be abstract (`nnx.eval_shape`)."""
    shapes = {}
    for path, value in _flat_state(model).items():
        key = official_key(path)
        shape = tuple(value.shape)
        if path[-1] == "kernel":
            shape = shape[::-1] if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])
        shapes[key] = shape
        if path[-1] == "mean":
            shapes[key.replace("running_mean", "num_batches_tracked")] = ()
    return shapes | {key: value.shape for key, value in computed_buffers(model).items()}


def computed_buffers(model: Pop3D) -> dict[str, np.ndarray]:
    """The official buffers that hold no weights: anchor points, plane coordinates, and a mask of zeros."""
    shapes = plane_shapes(model.config.grid_size)
    buffers = {"tpv_head.tpv_mask_hw": np.zeros((1, *shapes[0]), np.float32)}
    references = model.encoder.reference_points()
    for plane, shape, reference in zip(PLANES, shapes, references, strict=True):
        buffers[f"tpv_head.encoder.ref_3d_{plane}"] = reference.swapaxes(0, 1)[None]
        buffers[f"tpv_head.encoder.ref_2d_{plane}"] = cell_centres(shape)[None, :, None]
    return buffers


def _flat_state(model: Pop3D) -> dict[tuple[str | int, ...], Any]:
    """All arrays (of an abstract model: their shapes) by path."""
    return traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)))


def _to_official(path: tuple[str | int, ...], value: np.ndarray) -> np.ndarray:
    """Kernels: HWIO -> OIHW, [in, out] -> [out, in]."""
    if path[-1] != "kernel":
        return value
    return np.ascontiguousarray(value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1))


def _from_official(path: tuple[str | int, ...], value: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return value
    return value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)

"""Official WaffleIron and ScaLR weights into `WaffleIron` and back, strictly: every array has its place."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx, traverse_util

from pop3d_jax.models.waffleiron import WaffleIron

# Names of modules, ours -> official.
_RENAMES = (
    (r"^embedding\.norm\.", "embed.norm."),
    (r"^embedding\.point\.", "embed.conv1."),
    (r"^embedding\.neighbor_norm\.", "embed.conv2.0."),
    (r"^embedding\.neighbor_hidden\.", "embed.conv2.1."),
    (r"^embedding\.neighbor_hidden_norm\.", "embed.conv2.2."),
    (r"^embedding\.neighbor_output\.", "embed.conv2.4."),
    (r"^embedding\.merge\.", "embed.final."),
    (r"^blocks\.(\d+)\.(spatial_mix|channel_mix)\.layer_scale$", r"waffleiron.\2.\1.scale.weight"),
    (r"^blocks\.(\d+)\.(spatial_mix|channel_mix)\.norm\.", r"waffleiron.\2.\1.norm."),
    (r"^blocks\.(\d+)\.spatial_mix\.first_conv\.", r"waffleiron.spatial_mix.\1.ffn.0."),
    (r"^blocks\.(\d+)\.spatial_mix\.second_conv\.", r"waffleiron.spatial_mix.\1.ffn.2."),
    (r"^blocks\.(\d+)\.channel_mix\.hidden\.", r"waffleiron.channel_mix.\1.mlp.0."),
    (r"^blocks\.(\d+)\.channel_mix\.output\.", r"waffleiron.channel_mix.\1.mlp.2."),
)
_HEADS = {
    "linear": ((r"^head\.", "classif."),),
    "mlp": ((r"^head\.hidden\.", "classif.0."), (r"^head\.output\.", "classif.2.")),
    "probe": ((r"^head\.norm\.", "classif.0."), (r"^head\.output\.", "classif.1.")),
}
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_HEAD = "classif."


def official_key(path: tuple[str | int, ...], head: str) -> str:
    """Official name of one of our arrays: ("blocks", 3, "spatial_mix", "norm", "bias") ->
    "waffleiron.spatial_mix.3.norm.bias".

    Args:
        path: of the array in the model's state.
        head: `WaffleIronConfig.head`, which decides the names of its layers.

    Raises:
        ValueError: for an array that the official network does not have.
    """
    *modules, leaf = (str(part) for part in path)
    name = ".".join([*modules, _LEAVES.get(leaf, leaf)])
    for pattern, replacement in (*_RENAMES, *_HEADS[head]):
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise ValueError(f"{name} has no official name")


def official_shapes(model: WaffleIron) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of the state dict, counters included; the model may be abstract (`nnx.eval_shape`)."""
    shapes = {}
    for path, value in _flat_state(model).items():
        key = official_key(path, model.config.head)
        shapes[key] = _official_shape(path, tuple(value.shape))
        if path[-1] == "mean":
            shapes[_counter(key)] = ()
    return shapes


def waffleiron_to_state_dict(model: WaffleIron) -> dict[str, np.ndarray]:
    """All parameters and statistics under their official names and in their official layouts.

    The counters of BatchNorm, which we do not keep, are zero.
    """
    state = {}
    for path, value in _flat_state(model).items():
        key = official_key(path, model.config.head)
        state[key] = _to_official(path, np.asarray(value))
        if path[-1] == "mean":
            state[_counter(key)] = np.zeros((), np.int64)
    return state


def state_dict_to_waffleiron(
    state_dict: Mapping[str, np.ndarray], model: WaffleIron, *, with_head: bool = True
) -> None:
    """Loads official weights into ``model``, in place.

    Counters of BatchNorm may be there or not and are not kept. The prefix ``module.`` of distributed training is
    accepted.

    Args:
        state_dict: arrays by official name.
        model: a network of the same sizes.
        with_head: False leaves the model's head as it is and the file's head aside, whatever it is.

    Raises:
        ValueError: unknown, missing, repeated, misshapen or non-finite arrays, all listed.
    """
    arrays: dict[str, np.ndarray] = {}
    problems = []
    for name, value in state_dict.items():
        key = name.removeprefix("module.")
        if key in arrays:
            problems.append(f"twice, with and without module.: {key}")
        arrays[key] = np.asarray(value)
    paths = {official_key(path, model.config.head): path for path in _flat_state(model)}
    shapes = official_shapes(model)
    if not with_head:
        arrays, paths, shapes = (
            {key: value for key, value in entries.items() if not key.startswith(_HEAD)}
            for entries in (arrays, paths, shapes)
        )
    problems += [f"unknown: {key}" for key in arrays if key not in shapes]
    problems += [f"missing: {key}" for key in paths if key not in arrays]
    for key in paths.keys() & arrays.keys():
        if arrays[key].shape != shapes[key]:
            problems.append(f"shape of {key}: {arrays[key].shape}, the model needs {shapes[key]}")
        elif not np.issubdtype(arrays[key].dtype, np.floating):
            problems.append(f"type of {key}: {arrays[key].dtype}, needed are floating point numbers")
        elif not np.all(np.isfinite(arrays[key])):
            problems.append(f"not finite: {key}")
    if problems:
        raise ValueError(
            f"the state dict does not fit this WaffleIron ({len(problems)} problems; check config.model):\n  "
            + "\n  ".join(sorted(problems))
        )
    flat = {path: jnp.asarray(_from_official(path, arrays[key]), jnp.float32) for key, path in paths.items()}
    nnx.update(model, traverse_util.unflatten_dict(flat))


def load_waffleiron(path: epath.PathLike, model: WaffleIron, *, with_head: bool = True) -> None:
    """Loads a checkpoint of the official code (`model_point`, `model_points` or `net` in a .pth), or the same arrays as
    .safetensors, into ``model``, in place.

    Args:
        path: of the file.
        model, with_head: see `state_dict_to_waffleiron`.

    Raises:
        ValueError: the arrays do not fit; the message names the file. See `pop3d_jax.torch_files.read_state_dict` for
            what files that cannot be read raise.
    """
    # Here, not above: whoever brings arrays of their own needs no reader of files.
    from pop3d_jax.torch_files import read_state_dict

    try:
        state_dict_to_waffleiron(read_state_dict(path), model, with_head=with_head)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _flat_state(model: WaffleIron) -> dict[tuple[str | int, ...], Any]:
    """All arrays (of an abstract model: their shapes) by path."""
    return traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)))


def _counter(mean_key: str) -> str:
    return mean_key.removesuffix("running_mean") + "num_batches_tracked"


def _axes_of_ones(path: tuple[str | int, ...]) -> int:
    """How many axes of length one an official kernel ends with: layers are convolutions over points there."""
    return 2 if path[-2] in ("neighbor_hidden", "neighbor_output") else 1


def _official_shape(path: tuple[str | int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    if path[-1] == "layer_scale":
        return (*shape, 1, 1)
    if path[-1] != "kernel":
        return shape
    return (shape[2], 1, *shape[:2]) if len(shape) == 3 else shape[::-1] + (1,) * _axes_of_ones(path)


def _to_official(path: tuple[str | int, ...], value: np.ndarray) -> np.ndarray:
    shape = _official_shape(path, value.shape)
    if path[-1] == "kernel":
        value = value.transpose(2, 0, 1) if value.ndim == 3 else value.T
    return np.ascontiguousarray(value).reshape(shape)


def _from_official(path: tuple[str | int, ...], value: np.ndarray) -> np.ndarray:
    """The inverse; the shape is the official one."""
    if path[-1] == "layer_scale":
        return value[:, 0, 0]
    if path[-1] != "kernel":
        return value
    depthwise = path[-2] in ("first_conv", "second_conv")
    return value[:, 0].transpose(1, 2, 0) if depthwise else value.reshape(value.shape[:2]).T

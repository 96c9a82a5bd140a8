"""Official MaskCLIP+ weights into `DeepLabV2`, strictly: every array has its place, or there is an error."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from pop3d_jax.models.deeplab import DeepLabV2
from pop3d_jax.models.resnet import BLOCKS

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# In the file, without use for the features: the CLIP that taught the network, the text rows, a counter of steps.
_UNUSED = re.compile(r"decode_head\.(clip\..+|proj\.weight|text_embeddings|_iter_counter)")
# Where the sizes of a network are told from, by a dimension of an array.
_SIZE_KEYS = {
    "stem_channels": "backbone.stem.7.weight",
    "base_channels": "backbone.layer1.0.bn1.weight",
    "aspp_channels": "decode_head.decode_module.aspp_modules.0.bn.weight",
}


def official_key(path: tuple[str | int, ...]) -> str:
    """Official name of one of our arrays: ("backbone", "stem", 1, "conv", "kernel") -> "backbone.stem.3.weight"."""
    *modules, leaf = (str(part) for part in path)
    name = ".".join([*modules, _LEAVES[leaf]])
    # The official stem is one sequence, which counts its activations too.
    stem = re.match(r"backbone\.stem\.(\d+)\.(conv|bn)\.", name)
    if stem:
        place = 3 * int(stem[1]) + (stem[2] == "bn")
        return f"backbone.stem.{place}.{name[stem.end() :]}"
    return re.sub(r"^head\.", "decode_head.decode_module.", name)


def official_shapes(network: DeepLabV2) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of what the features need, without counters; the network may be abstract."""
    return {key: _official_shape(variable.shape) for key, (_, variable) in _named_arrays(network).items()}


def network_sizes(state_dict: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Which network a state dict is of: the depth and channels of `DeepLabV2`, told from keys and shapes.

    Raises:
      ValueError: the arrays that tell the channels are not there.
    """
    absent = [key for key in _SIZE_KEYS.values() if key not in state_dict or state_dict[key].ndim != 1]
    if absent:
        raise ValueError(
            "the state dict is not of a MaskCLIP+ network: without the vectors " + ", ".join(absent) + ". Expected is "
            "the file that POP-3D names maskclip_plus_vit16_deeplabv2_r101-d8_512x512_8k_coco-stuff164k.pth"
        )
    blocks = [re.match(r"backbone\.layer3\.(\d+)\.", key) for key in state_dict]
    last = max((int(block[1]) for block in blocks if block), default=0)
    # A network of depth 50 ends at block 5; also part of a deeper one is one of depth 101, with missing arrays.
    depth = 50 if last < BLOCKS[50][2] else 101
    return {"depth": depth} | {name: state_dict[key].shape[0] for name, key in _SIZE_KEYS.items()}


def network_from_state_dict(state_dict: Mapping[str, np.ndarray], **settings: Any) -> DeepLabV2:
    """The network of an official state dict.

    Accepted and left aside are a `module.` prefix, counters of BatchNorm, and what has no use for the features: the
    CLIP teacher, the text embeddings (171 rows as published, 28 in the extraction model) and the step counter.

    Args:
      state_dict: arrays in PyTorch's layout.
      settings: of `DeepLabV2`, instead of what the arrays tell: strides and dilations leave no trace in them.

    Raises:
      ValueError: unknown, missing, misshapen or non-finite arrays, all listed.
    """
    state_dict, problems = _without_prefix(state_dict)
    sizes = network_sizes(state_dict) | settings
    network = nnx.eval_shape(lambda: DeepLabV2(**sizes, rngs=nnx.Rngs(0)))
    arrays = _named_arrays(network)
    shapes = official_shapes(network)
    counters = {re.sub("running_mean$", "num_batches_tracked", key) for key in shapes}
    problems += [
        f"unknown: {key}"
        for key in state_dict
        if key not in shapes and key not in counters and not _UNUSED.fullmatch(key)
    ]
    problems += [f"missing: {key}" for key in shapes if key not in state_dict]
    for key in shapes.keys() & state_dict.keys():
        found = state_dict[key]
        if found.shape != shapes[key]:
            problems.append(f"shape of {key}: {found.shape}, this network needs {shapes[key]}")
        elif not jnp.issubdtype(found.dtype, jnp.floating):
            problems.append(f"type of {key}: {found.dtype}, needed are floating point numbers")
        elif not np.all(np.isfinite(found.astype(np.float32))):
            problems.append(f"not finite: {key}")
    if problems:
        told = ", ".join(f"{name} {value}" for name, value in sizes.items())
        raise ValueError(
            f"the state dict is not of a whole MaskCLIP+ network ({told}, as its keys and shapes tell): "
            f"{len(problems)} problems; download the file again\n  " + "\n  ".join(sorted(problems))
        )
    nnx.update(
        network,
        nnx.from_flat_state(
            {
                path: variable.replace(jnp.asarray(_from_official(state_dict[key]), jnp.float32))
                for key, (path, variable) in arrays.items()
            }
        ),
    )
    return network


def load_network(path: epath.PathLike) -> DeepLabV2:
    """The network of a published .pth file, or of the same arrays as .safetensors.

    Raises:
      ValueError: the arrays are not those of a MaskCLIP+ network; the message names the file. See
        `pop3d_jax.torch_files.read_state_dict` for what files that cannot be read raise.
    """
    # Here, not above: whoever brings arrays of their own needs no reader of files.
    from pop3d_jax.torch_files import read_state_dict

    try:
        return network_from_state_dict(read_state_dict(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _without_prefix(state_dict: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays by their names without `module.`, and which of them the file has twice."""
    stripped: dict[str, np.ndarray] = {}
    twice = []
    for key, value in state_dict.items():
        name = key.removeprefix("module.")
        if name in stripped:
            twice.append(f"twice, with and without module.: {name}")
        stripped[name] = np.asarray(value)
    return stripped, twice


def _named_arrays(network: DeepLabV2) -> dict[str, tuple[tuple[Any, ...], nnx.Variable]]:
    """Path and variable of every array by its official name."""
    return {official_key(path): (path, variable) for path, variable in nnx.to_flat_state(nnx.state(network))}


def _official_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Kernels: HWIO -> OIHW."""
    return tuple(shape[axis] for axis in (3, 2, 0, 1)) if len(shape) == 4 else tuple(shape)


def _from_official(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array

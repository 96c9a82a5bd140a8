"""Reads and writes weights in files of the PyTorch world, without running what a file may carry.

A `.pth` file is a pickle, and a pickle can hold a program. Only tensors, numbers, text and containers are accepted
(`torch.load(weights_only=True)`); anything else is an error before it runs. `.safetensors` files need no PyTorch.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

# Under which names training scripts keep the weights beside epoch, optimiser and scores; the last three are ScaLR's.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "model_point", "model_points", "net")


class WeightFileError(Exception):
    """A weight file is missing, damaged, hostile or of another kind; the message names the file and the way out."""


def read_state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The weights of a checkpoint, by name.

    Args:
      path: `.safetensors`, or what `torch.save` wrote: a state dict, or a checkpoint that holds one as `state_dict`,
        `model_state_dict`, `model`, or, as ScaLR's do, `model_point`, `model_points` or `net`. Half precision becomes
        float32; a `module.` prefix of every name (distributed training) is taken off.

    Raises:
      WeightFileError: no such file, damaged, with objects that are not weights, or without a state dict.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except (SafetensorError, TypeError, KeyError) as error:
            raise WeightFileError(f"{path} is no whole safetensors file of float32 ({error}): get it again") from error
    else:
        state = read_torch(path)
        for name in _CONTAINERS:
            if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
                state = state[name]
                break
    arrays = {}
    others = []
    if isinstance(state, Mapping):
        arrays = {str(key): value for key, value in state.items() if isinstance(value, np.ndarray)}
        others = sorted(str(key) for key in state if str(key) not in arrays)
    if not arrays or others:
        found = f"entries that are no tensors: {others[:10]}" if arrays else f"a {type(state).__name__} without tensors"
        raise WeightFileError(
            f"{path} holds no state dict but {found}. Expected are tensors by name, bare or under one of {_CONTAINERS}"
        )
    if all(key.startswith("module.") for key in arrays):
        arrays = {key.removeprefix("module."): value for key, value in arrays.items()}
    return arrays


def read_torch(path: epath.PathLike) -> Any:
    """Whatever `torch.save` wrote, with its tensors as NumPy arrays.

    Raises:
      WeightFileError: no such file, damaged, or with objects that are not weights; PyTorch is not installed.
    """
    path = _existing(path)
    torch = _torch()
    try:
        # Scores in checkpoints are often NumPy scalars; they are data, and PyTorch does not know that by itself.
        with torch.serialization.safe_globals(_numpy_scalars()):
            return _to_numpy(torch.load(str(path), map_location="cpu", weights_only=True), torch)
    except Exception as error:  # damage shows as whatever the unpickler stumbles over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "Weights only load failed" in str(error) and "GLOBAL" in str(error):
            unsafe = str(error).partition("GLOBAL ")[2].split()[0]
            raise WeightFileError(
                f"{path} holds the object {unsafe}, which is no weight, and was not read: loading it could run a "
                "program. Save only the state dict, from a place where you trust the file"
            ) from error
        raise WeightFileError(
            f"{path} ({path.stat().length} bytes) is no whole file of torch.save ({reason}): download it again, and "
            "compare its size and checksum with its source"
        ) from error


def write_state_dict(path: epath.PathLike, state: Mapping[str, np.ndarray]) -> None:
    """Writes weights as `.safetensors`, or, under any other suffix, as `torch.save` does.

    Raises:
      WeightFileError: PyTorch is needed and not installed.
    """
    path = epath.Path(path)
    partial = path.parent / f"{path.name}.partial"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        # Not ascontiguousarray, which gives scalars an axis.
        save_file({key: np.asarray(value, order="C") for key, value in state.items()}, partial)
    else:
        torch = _torch()
        tensors = {key: torch.from_numpy(np.array(value, order="C")) for key, value in state.items()}
        torch.save({"state_dict": tensors}, str(partial))
    partial.replace(path)


def _existing(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    if not path.is_file():
        raise WeightFileError(f"{path} does not exist or is no file: check the path")
    return path


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise WeightFileError(
            "this file format needs PyTorch, an extra: pip install torch (the CPU build is enough), or convert the "
            "file to .safetensors elsewhere"
        ) from error
    return torch


def _numpy_scalars() -> list[Any]:
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    # Files written with NumPy 1 name the module by its old path.
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]


def _to_numpy(value: Any, torch: Any) -> Any:
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()
    if isinstance(value, Mapping):
        return {key: _to_numpy(item, torch) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_numpy(item, torch) for item in value)
    return value

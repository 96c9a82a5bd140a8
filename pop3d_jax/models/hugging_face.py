"""Folders in Hugging Face format, without PyTorch: where they are, their config, and their weights into NNX modules.

Configs are read by `transformers`, weights from safetensors (one file or shards with an index), tensor by tensor: no
more than the model and one tensor are held at a time. Strict: every tensor has its place, or there is an error.
"""

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

# Before transformers is imported: it would advise to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_CONVERSION_AUTHOR, _CONVERSION_TITLE = "SFconvertbot", "Adding `safetensors` variant of this model"

ParameterPath = tuple[Any, ...]
Model = TypeVar("Model", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a file keeps one of our parameters: the `part`-th of `parts` equal parts of a tensor's first axis."""

    key: str
    part: int = 0
    parts: int = 1


def find_folder(name: str, kind: str) -> Path:
    """A local folder, or one fetched from the hub into the Hugging Face cache; `name@revision` picks a revision.

    Args:
      name: path or hub name.
      kind: what it should hold, for messages: "CLIP".

    Raises:
      FileNotFoundError: neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if (name.count("/") > 1 and "@" not in name) or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such folder: {name}")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name, _, revision = name.partition("@")
    patterns = ["*.json", "*.txt", "model*.safetensors"]
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
        if not any(folder.glob("model*.safetensors")) and not revision:
            # Older repositories have safetensors only in a pull request of the hub's conversion bot.
            pulls = HfApi().get_repo_discussions(name, author=_CONVERSION_AUTHOR, discussion_type="pull_request")
            for pull in pulls:
                if pull.title == _CONVERSION_TITLE:
                    return Path(snapshot_download(name, revision=pull.git_reference, allow_patterns=patterns))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise FileNotFoundError(
            f"{name} is neither a folder here nor a model that could be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {error}). Check the name and the network, or give a local {kind} folder"
        ) from error


def read_config(folder: Path, name: str, kind: str, model_types: Collection[str]) -> Any:
    """The `transformers` config of a folder.

    Args:
      folder: in Hugging Face format.
      name: as the user gave it, for messages.
      kind: what it should hold, for messages.
      model_types: what its config may say it is.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: not readable, or of another kind of model.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} is no {kind} folder: it has no config.json (Hugging Face format)")
    from transformers import AutoConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # transformers leaves the file for the garbage collector
        try:
            config = AutoConfig.from_pretrained(folder)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{name} is no {kind} folder: transformers cannot read its config.json: {error}"
            ) from error
    if config.model_type not in model_types:
        raise ValueError(f"{name} is no {kind}: its config.json says model_type {config.model_type!r}")
    return config


def weight_files(folder: Path, name: str, transformers_class: str) -> dict[str, Path]:
    """Which file of a folder holds which tensor.

    Args:
      folder: in Hugging Face format.
      name: as the user gave it, for messages.
      transformers_class: whose weights they are, for the way out of PyTorch's format.

    Raises:
      FileNotFoundError: no weights, or shards are missing.
      ValueError: a damaged file, or weights in PyTorch's format only.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = json.loads(index.read_text())["weight_map"]
        absent = sorted({file for file in places.values() if not (folder / file).is_file()})
        if absent:
            raise FileNotFoundError(f"{name}: shards named by {index.name} are missing: {', '.join(absent)}")
        return {key: folder / file for key, file in places.items()}
    single = folder / "model.safetensors"
    if single.is_file():
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ValueError(
            f"{name} has weights in PyTorch's format only. Convert them once, where torch is installed: python -c "
            f"\"from transformers import {transformers_class}; {transformers_class}.from_pretrained('{name}')"
            ".save_pretrained('OUT')\", copy the other files of the folder beside them, and name OUT"
        )
    raise FileNotFoundError(f"{name} has no weights: neither model.safetensors nor {index.name}")


@contextlib.contextmanager
def open_tensors(
    files: Mapping[str, Path],
) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]]:
    """Shapes of the tensors, and a function that reads one by its name.

    Raises:
      ValueError: a damaged file.
    """
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(_opened(file)) for file in set(files.values())}
        held = {file: set(handle.keys()) for file, handle in opened.items()}
        shapes = {
            key: tuple(opened[file].get_slice(key).get_shape()) for key, file in files.items() if key in held[file]
        }
        yield shapes, lambda key: opened[files[key]].get_tensor(key)


def with_tensors(
    abstract: Model,
    places: Mapping[ParameterPath, Place],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    *,
    unused: Collection[str],
    name: str,
) -> Model:
    """The model with the tensors of a file, as float32.

    Args:
      abstract: from `nnx.eval_shape`.
      places: of every parameter, by its path in the model.
      shapes: of all tensors of the file, in PyTorch's layouts.
      read: gives a tensor by its name; called once for each.
      unused: tensors that the file may have without need.
      name: of the file, for messages.

    Raises:
      ValueError: missing, unknown or misshapen tensors, all listed.
    """
    parameters = dict(nnx.to_flat_state(nnx.state(abstract, nnx.Param)))
    wanted = {}
    members: dict[str, list[tuple[ParameterPath, Place]]] = {}
    for path, place in places.items():
        shape = _published_shape(parameters[path].shape, path)
        wanted[place.key] = (shape[0] * place.parts, *shape[1:]) if place.parts > 1 else shape
        members.setdefault(place.key, []).append((path, place))
    missing = sorted(set(wanted) - set(shapes))
    unknown = sorted(set(shapes) - set(wanted) - set(unused))
    misshapen = [
        f"{key}: {shapes[key]}, the config says {shape}"
        for key, shape in sorted(wanted.items())
        if key in shapes and shapes[key] != shape
    ]
    problems = [
        f"{len(keys)} {title}:\n    " + "\n    ".join(keys)
        for title, keys in (("missing", missing), ("unknown", unknown), ("misshapen", misshapen))
        if keys
    ]
    if problems:
        raise ValueError(f"{name}: the tensors are not those of its config\n  " + "\n  ".join(problems))
    flat = []
    for key, owners in members.items():
        tensor = read(key)
        for path, place in owners:
            part = np.split(tensor, place.parts)[place.part] if place.parts > 1 else tensor
            # A copy of JAX's own: a part must not keep the whole alive.
            array = jnp.array(from_published(part, path), jnp.float32)
            flat.append((path, parameters[path].replace(array)))
    return nnx.merge(nnx.graphdef(abstract), nnx.from_flat_state(flat))


def to_published(array: np.ndarray, path: ParameterPath) -> np.ndarray:
    """Our layout to PyTorch's: linear [in, out] to [out, in], patches HWIO to OIHW. `from_published` undoes it."""
    if path[-1] == "kernel":
        return array.T
    return array.transpose(3, 2, 0, 1) if path[-1] == "patch_embedding" else array


def from_published(array: np.ndarray, path: ParameterPath) -> np.ndarray:
    """PyTorch's layout to ours."""
    if path[-1] == "kernel":
        return array.T
    return array.transpose(2, 3, 1, 0) if path[-1] == "patch_embedding" else array


def _published_shape(shape: tuple[int, ...], path: ParameterPath) -> tuple[int, ...]:
    return to_published(np.broadcast_to(np.float32(0), shape), path).shape


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    with file:
        yield file

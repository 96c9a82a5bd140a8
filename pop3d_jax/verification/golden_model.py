"""Golden files, and the networks that golden sets describe by a config and reference weights.

`reference_weights` executes the Python file of that name in the golden set: use sets that you trust.
"""

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pop3d_jax.models.pop3d import Pop3D, Pop3DConfig
from pop3d_jax.official_weights import computed_buffers, official_key, state_dict_to_model

# From the name of a golden file or folder in its set to its path.
GoldenFile = Callable[[str], Path]


class MissingGoldenFileError(FileNotFoundError):
    """The golden set has no such file. Attribute `name`: the file's name in the set."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(f"{folder} has no {name}")
        self.name = name


def golden_set(folder: Path) -> GoldenFile:
    """The files of a folder; asking for one that is not there raises `MissingGoldenFileError`."""

    def find(name: str) -> Path:
        path = folder / name
        if not path.exists():
            raise MissingGoldenFileError(folder, name)
        return path

    return find


def golden_arrays(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a golden .npz file whose names begin with `prefix`, which is taken off."""
    # Opened here: NumPy leaves a file open that is no archive.
    with path.open("rb") as file, np.load(file) as arrays:
        return {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}


def golden_json(path: Path) -> Any:
    """Content of a golden .json file."""
    return json.loads(path.read_text(encoding="utf-8"))


def reference_weights(golden_file: GoldenFile, folder: str = "pop3d") -> ModuleType:
    """The golden set's own `reference_weights.py`, executed.

    Args:
      golden_file: finds files of the set.
      folder: part of the set it belongs to.
    """
    path = golden_file(f"{folder}/reference_weights.py")
    spec = importlib.util.spec_from_file_location("reference_weights", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_from_official(official: Mapping[str, Any]) -> Pop3DConfig:
    """Our config of an official one, as `tiny_config.json` writes it."""
    model = official["model"]
    head, aggregator, backbone = model["tpv_head"], model["tpv_aggregator"], model["img_backbone"]
    encoder = head["encoder"]
    layers = encoder["transformerlayers"]
    images = layers["attn_cfgs"][1]["deformable_attention"]
    return Pop3DConfig(
        backbone_depth=backbone["depth"],
        deformable_stages=tuple(backbone["stage_with_dcn"]),
        grid_size=(head["tpv_w"], head["tpv_h"], head["tpv_z"]),
        volume_minimum=tuple(head["pc_range"][:3]),
        volume_maximum=tuple(head["pc_range"][3:]),
        num_cameras=head["num_cams"],
        num_levels=head["num_feature_levels"],
        embed_dims=head["embed_dims"],
        num_heads=official["num_heads"],
        num_layers=encoder["num_layers"],
        self_attention_points=official["self_attention"]["num_points"],
        cross_attention_anchors=tuple(images["num_z_anchors"]),
        cross_attention_points=tuple(images["num_points"]),
        feedforward_dims=layers["feedforward_channels"],
        dropout=layers["ffn_dropout"],
        occupancy_classes=aggregator["nbr_classes"],
        hidden_dims=aggregator["hidden_dims"],
        out_dims=aggregator["out_dims"],
        decoder_layers=aggregator["dec_layers_occupancy"],
        feature_dim=aggregator["feature_dim"],
        feature_hidden_dims=aggregator["hidden_dims_ft"],
        feature_out_dims=aggregator["out_dims_ft"],
        feature_decoder_layers=aggregator["dec_layers_features"],
        upscale=(aggregator["scale_w"], aggregator["scale_h"], aggregator["scale_z"]),
        grid_mask=model["use_grid_mask"],
        remat="none",
    )


def reference_state(
    weights: ModuleType, inventory: Iterable[Sequence[Any]], buffers: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A whole official state dict: drawn weights, and the buffers that the network computes.

    Args:
      weights: from `reference_weights`.
      inventory: pairs of key and shape.
      buffers: from `computed_buffers`.
    """
    return {
        key: buffers[key] if weights.is_computed_buffer(key) else weights.reference_weight(key, shape)
        for key, shape in inventory
    }


def tiny_model(golden_file: GoldenFile) -> Pop3D:
    """The network of `tiny_model.npz`, reference weights loaded."""
    official = json.loads(golden_file("pop3d/tiny_config.json").read_text())
    model = nnx.eval_shape(lambda: Pop3D(config_from_official(official), rngs=nnx.Rngs(0)))
    weights = reference_weights(golden_file)
    state_dict_to_model(reference_state(weights, official["state_dict"], computed_buffers(model)), model)
    return model


def filled_module(
    build: Callable[[], nnx.Module], place: tuple[str, ...], weight: Callable[[str, tuple[int, ...]], np.ndarray]
) -> nnx.Module:
    """A part of the network alone, with official weights.

    Args:
      build: makes the part; its initial weights are never computed.
      place: where it stands in the network, e.g. ("heads",); official names follow from it.
      weight: array of an official name and shape (kernels [out, in, ...]).

    Raises:
      ValueError: an array of another shape.
    """
    module = nnx.eval_shape(build)
    filled = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        # Official kernels: [out, in] and [out, in, height, width].
        axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(len(variable.shape), (0,))
        key = official_key((*place, *path))
        array = weight(key, tuple(variable.shape[axis] for axis in axes))
        array = np.transpose(array, {2: (1, 0), 4: (2, 3, 1, 0)}.get(array.ndim, (0,)))
        if array.shape != variable.shape:
            raise ValueError(f"{key}: {array.shape} in our layout, needed is {variable.shape}")
        filled[path] = variable.replace(jnp.asarray(array, jnp.float32))
    nnx.update(module, nnx.from_flat_state(filled))
    return module

"""The MaskCLIP+ network with small channels, and at full width on a small picture.

Tolerances follow the golden sets' own measure: how far an official float32 run lies from float64 (largest element).
Ours is another float32 run with another order of summation: four times the measured noise.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pop3d_jax.models.batch_norm import EPSILON
from pop3d_jax.models.deeplab import DeepLabV2
from pop3d_jax.models.maskclip_plus import normalise, sample_resized
from pop3d_jax.models.maskclip_plus_weights import network_from_state_dict, network_sizes, official_shapes
from pop3d_jax.verification.checks import Check, absolute, exact, exact_where_clear
from pop3d_jax.verification.golden_model import GoldenFile, golden_arrays, golden_json, reference_weights

NOISE_FACTOR = 4.0
_FOLDER = "maskclip_plus"


def tiny_network(golden_file: GoldenFile) -> Iterator[Check]:
    """Every array of `tiny_model.npz`: all layers, resized features and logits, classes."""
    golden = golden_arrays(golden_file(f"{_FOLDER}/tiny_model.npz"))
    info = golden_json(golden_file(f"{_FOLDER}/tiny_info.json"))
    weight = reference_weights(golden_file, _FOLDER).reference_weight
    settings = {
        "strides": info["strides"],
        "dilations": info["dilations"],
        "first_dilations": info["first_block_dilations"],
        "aspp_dilations": info["aspp_dilations"],
    }
    yield exact("batch_norm_eps", np.asarray(EPSILON), np.asarray(info["batch_norm_eps"]))
    sizes = inventory_sizes(info["state_dict"])
    texts = jnp.asarray(golden["text_embeddings"])
    for run in sorted({key.rsplit("/", 1)[0] for key in golden if key.startswith("depth")}):
        depth, size = re.fullmatch(r"depth(\d+)/(\d+x\d+)", run).groups()
        network = reference_network(weight, sizes | {"depth": int(depth)}, settings)
        pictures = golden[f"image/{size}"]
        maps = nnx.jit(intermediates)(network, jnp.asarray(np.moveaxis(pictures, 1, -1)))
        maps["logits"] = maps["features"] @ texts.T
        resizes = {"input_size": [pictures.shape[2:]]}
        resizes["original_size"] = [*resizes["input_size"], tuple(info["original_sizes"][size])]
        for name in ("features", "logits"):
            for ending, steps in resizes.items():
                maps[f"{name}_{ending}"] = _resized(maps[name], steps)
        maps["probabilities_original_size"] = jax.nn.softmax(maps["logits_original_size"], axis=-1)
        noise = info["float32_minus_float64"]
        for key, expected in golden.items():
            if not key.startswith(f"{run}/"):
                continue
            name = key.removeprefix(f"{run}/")
            if name == "classes_original_size":
                margin = 2 * NOISE_FACTOR * noise[f"{run}/logits"]["max_abs"]
                yield _classes(key, _channels_first(maps["logits_original_size"]), expected, margin)
            else:
                yield absolute(key, _channels_first(maps[name]), expected, NOISE_FACTOR * noise[key]["max_abs"])


def full_width(golden_file: GoldenFile) -> Iterator[Check]:
    """The network of official widths on a window of the real picture, in both depths."""
    golden = golden_arrays(golden_file(f"{_FOLDER}/full_width_crop.npz"))
    noise = golden_json(golden_file(f"{_FOLDER}/full_info.json"))["crop_float32_minus_float64"]
    inventory = golden_json(golden_file(f"{_FOLDER}/full_state_dict_inventory.json"))
    weight = reference_weights(golden_file, _FOLDER).reference_weight
    crop = jnp.asarray(golden["crop_rgb_uint8"])
    sizes = inventory_sizes(inventory["state_dict"])
    for run in sorted({key.split("/")[0] for key in golden if key.startswith("depth")}):
        network = reference_network(weight, sizes | {"depth": int(run.removeprefix("depth"))}, {})
        maps = nnx.jit(intermediates)(network, normalise(crop)[None])
        for layer in [name for name in maps if f"{run}/{name}" in golden]:
            key, values = f"{run}/{layer}", np.asarray(maps[layer][0])
            tolerance = NOISE_FACTOR * noise[key]["max_abs"]
            if layer == "features":
                found = values[tuple(golden["positions/features_row_col"].T)]
            else:
                channel, row, column = golden[f"positions/{layer}"].T
                found = values[row, column, channel]
            yield absolute(key, found, golden[key], tolerance)
            key = f"{key}/mean_std_min_max"
            found = [values.mean(dtype=np.float64), values.std(dtype=np.float64), values.min(), values.max()]
            yield absolute(key, np.array(found), golden[key], tolerance)


def inventory_sizes(inventory: Iterable[Sequence[Any]]) -> dict[str, int]:
    """Sizes of a network, told from names and shapes alone: the arrays take no memory."""
    return network_sizes({key: np.broadcast_to(np.float32(1), shape) for key, shape, *_ in inventory})


def reference_network(
    weight: Callable[..., np.ndarray], sizes: Mapping[str, int], settings: Mapping[str, Sequence[int]]
) -> DeepLabV2:
    """A network whose weights are the golden set's own.

    Args:
      weight: array of an official name and shape, see `reference_weights`.
      sizes: from `inventory_sizes`.
      settings: further arguments of `DeepLabV2`.
    """
    shapes = official_shapes(nnx.eval_shape(lambda: DeepLabV2(**sizes, **settings, rngs=nnx.Rngs(0))))
    return network_from_state_dict({key: weight(key, shape) for key, shape in shapes.items()}, **settings)


def intermediates(network: DeepLabV2, images: Float[Array, "image height width 3"]) -> dict[str, jax.Array]:
    """Every map that the golden sets have, by their names: the forward pass written out once more."""
    maps = {}
    x = images
    for part in network.backbone.stem:
        x = part(x)
    maps["stem"] = x
    maps["stem_pool"] = x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage in (1, 2, 3, 4):
        for index, block in enumerate(getattr(network.backbone, f"layer{stage}")):
            x = block(x)
            if index == 0:
                maps[f"layer{stage}_block0"] = x
        maps[f"layer{stage}"] = x
    for index, branch in enumerate(network.head.aspp_modules):
        maps[f"aspp_{index}_conv"] = branch.conv(x)
        maps[f"aspp_{index}"] = branch(x)
    return maps | {"features": network(images)}


def _resized(maps: jax.Array, sizes: Sequence[tuple[int, int]]) -> jax.Array:
    """Whole maps after successive resizes, read pixel by pixel."""
    height, width = sizes[-1]
    picture, row, column = (axis.ravel() for axis in np.indices((maps.shape[0], height, width)).astype(np.int32))
    values = jax.jit(lambda maps, *at: sample_resized(maps, sizes, *at))(maps, picture, row, column)
    return values.reshape(maps.shape[0], height, width, -1)


def _classes(name: str, logits: np.ndarray, expected: np.ndarray, margin: float) -> Check:
    """Classes where the best two texts are further apart than float32 noise can move them."""
    best, second = np.sort(logits, axis=1)[:, -1], np.sort(logits, axis=1)[:, -2]
    return exact_where_clear(name, logits.argmax(1), expected, best - second > margin)


def _channels_first(array: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(array), -1, 1)

"""DINOv2 and ScaLR's teacher against `tiny_dinov2.npz`."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pop3d_jax.models.clip_towers import resize_position_embedding
from pop3d_jax.models.dinov2 import POSITION_RULES, DINOv2Teacher, sample_upsampled
from pop3d_jax.models.dinov2_weights import load_dinov2, places
from pop3d_jax.models.maskclip_plus import normalise
from pop3d_jax.verification.checks import Check, absolute, exact
from pop3d_jax.verification.golden_model import GoldenFile, MissingGoldenFileError, golden_arrays, golden_json

# Values of order 1 after a handful of layers.
_TOLERANCE = 1e-5
_ARRAYS, _INFO, _FOLDER = "clip/tiny_dinov2.npz", "clip/tiny_dinov2_info.json", "clip/tiny_dinov2"
# By which names the two interpolations of the large grid go.
_GRIDS = {"official": "official", "transformers": "size_based"}


def stages(golden_file: GoldenFile) -> Iterator[Check]:
    """Every stage by both position rules, at every stored picture size, and the large position grid."""
    golden, info = golden_arrays(golden_file(_ARRAYS)), golden_json(golden_file(_INFO))
    for rule, offset in POSITION_RULES.items():
        network = load_dinov2(golden_file(_FOLDER), position_rule=rule)
        for size in info["sizes"]:
            height, width = map(int, size.split("x"))
            patch = network.config.patch_size
            found = {"position_embedding": network.positions((height // patch, width // patch))[None]}
            pixels = golden.get(f"{size}/pixel_values")
            if pixels is not None:
                output = nnx.jit(lambda network, images: network(images))(network, _channels_last(pixels))
                blocks = {f"block_{number}": layer for number, layer in enumerate(output.layers)}
                found |= {"tokens_with_position": output.embeddings, "x_norm": output.normed, **blocks}
                found["x_pre_norm"] = output.layers[-1]
            for name, ours in found.items():
                key = f"{size}/{rule}/{name}"
                if key in golden:  # a set may hold a part of them
                    yield _close(key, ours, golden[key])
        name = info["position_grid_resize"]
        if f"{name}/input" in golden:
            table = golden[f"{name}/input"]
            rows, columns = map(int, re.findall(r"\d+", name)[-2:])
            flat = np.concatenate([np.zeros((1, len(table)), np.float32), table.reshape(len(table), -1).T])
            resized = resize_position_embedding(jnp.asarray(flat), (rows, columns), offset=offset)[1:]
            key = f"{name}/{_GRIDS[rule]}"
            yield _close(key, resized.T.reshape(-1, rows, columns), golden[key])
    ours = {place.key for place in places(network, original=True).values()}
    official = set(info["official_state_dict"]) - {"mask_token"}
    yield exact("official_state_dict: names", np.array(sorted(ours)), np.array(sorted(official)))


def teacher(golden_file: GoldenFile) -> Iterator[Check]:
    """The official teacher's map of a picture, read at every pixel."""
    path = golden_file(_ARRAYS)
    golden = golden_arrays(path, "teacher/")
    if not golden:  # the copy in this repository leaves the large map out
        raise MissingGoldenFileError(path, "clip/tiny_dinov2.npz: teacher/feature_map")
    images = _channels_last(golden["image_0_1"])
    # Pictures here are of 8 bits, that one is not: the last step before the network is compared on its own numbers.
    normalised = _channels_last(golden["normalised_image"])
    grey = np.arange(256, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    by_channel = normalise(jnp.asarray(grey))[:, 0, 0]
    slope, offset = by_channel[255] - by_channel[0], by_channel[0]
    yield _close("teacher/normalised_image", images * slope + offset, np.asarray(normalised))

    model = DINOv2Teacher(load_dinov2(golden_file(_FOLDER)))
    features = nnx.jit(lambda model, images: model.dense_features(images))(model, normalised)
    dim = features.shape[-1]
    yield _close("teacher/patch_tokens", features.reshape(len(features), -1, dim), golden["patch_tokens"][:, 1:])
    expected = golden["feature_map"].transpose(0, 2, 3, 1)
    pictures, height, width, _ = expected.shape
    picture, row, column = (index.reshape(-1) for index in np.indices((pictures, height, width)))
    pixels = (np.stack([row, column], axis=1) + 0.5) / [height, width]
    read = jax.jit(sample_upsampled, static_argnums=1)
    found = read(features, (height, width), jnp.asarray(picture), jnp.asarray(pixels, jnp.float32))
    yield _close("teacher/feature_map", found.reshape(expected.shape), expected)


def _close(name: str, ours: jax.Array, expected: np.ndarray) -> Check:
    """Absolute difference; the tolerance grows with the largest element, where that is above 1."""
    return absolute(name, np.asarray(ours), expected, _TOLERANCE * max(1.0, float(np.abs(expected).max())))


def _channels_last(images: np.ndarray) -> jax.Array:
    return jnp.asarray(images.transpose(0, 2, 3, 1))

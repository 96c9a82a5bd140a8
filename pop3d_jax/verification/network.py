"""The small network of the golden set: every array on the way from the images to voxels and points."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from pop3d_jax.models.heads import Pop3DOutput
from pop3d_jax.models.pop3d import Pop3D, Pop3DConfig
from pop3d_jax.models.tpv_geometry import PLANES
from pop3d_jax.official_weights import computed_buffers, model_to_state_dict, official_shapes
from pop3d_jax.verification.checks import Check, absolute, exact
from pop3d_jax.verification.golden_model import (
    GoldenFile,
    golden_arrays,
    golden_json,
    reference_state,
    reference_weights,
    tiny_model,
)

# Float32 arrays of two implementations differ by the noise of both: `max_abs` of tiny_float32_noise.json is one
# float32 run against float64.
NOISE_FACTOR = 4.0
# For encoder sub-layers and calibration, which the noise file does not list; values are of the order of 1.
UNLISTED_TOLERANCE = 8e-6

_SUBLAYERS = {
    "self_attention": "self",
    "norm0": "norm0",
    "cross_attention": "cross",
    "norm1": "norm1",
    "feed_forward": "ffn",
    "norm2": "norm2",
}
# Arrays of the training call, which `pop3d_jax.verification.training` compares.
_OTHERS = ("loss_", "grad", "adamw")
_INPUTS = ("img", "img_shape", "lidar2img", "points", "feature_points")


def tiny_network(golden_file: GoldenFile) -> Iterator[Check]:
    """Every array of `tiny_model.npz`: its samples in one batch, and one by one as the official runs took them."""
    golden = golden_arrays(golden_file("pop3d/tiny_model.npz"))
    noise = golden_json(golden_file("pop3d/tiny_float32_noise.json"))["outputs"]
    expected = {name: array for name, array in golden.items() if name not in _INPUTS and not name.startswith(_OTHERS)}
    model, samples = tiny_model(golden_file), len(golden["img"])
    for size in sorted({samples, 1}, reverse=True):
        how = f", batch {size}"
        ours = _forward(model, golden, size)
        yield exact(f"names of the arrays{how}", np.asarray(sorted(ours)), np.asarray(sorted(expected)))
        for name, array in expected.items():
            if name not in ours:
                continue
            if array.dtype == bool:
                yield exact(f"{name}{how}", ours[name], array)
                continue
            tolerance = NOISE_FACTOR * noise[name]["max_abs"] if name in noise else UNLISTED_TOLERANCE
            if name.startswith("ref_cam") and ours[name].shape == array.shape:
                # Behind the camera the numbers are huge and mean nothing.
                visible = expected[name.replace("cam", "mask")]
                yield absolute(f"{name}{how}", ours[name][visible], array[visible], tolerance, "where visible")
            else:
                yield absolute(f"{name}{how}", ours[name], array, tolerance, _worst_sample(ours[name], array))


def state_dicts(golden_file: GoldenFile) -> Iterator[Check]:
    """Official names, shapes and values of the weights: the small network both ways, the full inventory."""
    official = golden_json(golden_file("pop3d/tiny_config.json"))
    model = tiny_model(golden_file)
    expected = reference_state(reference_weights(golden_file), official["state_dict"], computed_buffers(model))
    state = model_to_state_dict(model)
    differing = set(state) ^ set(expected)
    differing |= {key for key in state.keys() & expected.keys() if not np.array_equal(state[key], expected[key])}
    yield Check("small state dict", 0.0, float(len(differing)), "entries that differ after loading")
    inventory = golden_json(golden_file("pop3d/full_state_dict_inventory.json"))
    published = official_shapes(nnx.eval_shape(lambda: Pop3D(Pop3DConfig(), rngs=nnx.Rngs(0))))
    differing = published.items() ^ {key: tuple(shape) for key, shape in inventory}.items()
    yield Check("full state dict inventory", 0.0, float(len(differing)), "names and shapes that differ")


def official_intermediates(
    capture: Mapping[str, Shaped[jax.Array, "..."]], plane_sizes: tuple[int, ...]
) -> dict[str, Shaped[jax.Array, "..."]]:
    """What the network captured under its official names and in official layouts (channels first).

    Args:
      capture: filled by `Pop3D.__call__`.
      plane_sizes: tokens of the three planes, in the order of `PLANES`.
    """
    arrays = {}
    for name, value in capture.items():
        kind, _, rest = name.partition(".")
        if kind == "backbone":
            arrays[f"c{int(rest) + 3}"] = jnp.moveaxis(value, -1, 2)
        elif kind == "neck":
            arrays[f"fpn{rest}"] = jnp.moveaxis(value, -1, 2)
        elif kind.startswith("layer"):
            layer = kind.removeprefix("layer")
            arrays[f"enc{layer}_{_SUBLAYERS[rest]}"] = value
            if rest == "norm2":
                planes = jnp.split(value, np.cumsum(plane_sizes)[:-1], axis=1)
                arrays |= {f"plane_{p}_layer{layer}": tokens for p, tokens in zip(PLANES, planes, strict=True)}
        else:
            arrays[f"ref_{'mask' if kind.startswith('visible') else 'cam'}_{name.rpartition('_')[2]}"] = value
    return arrays


def _forward(model: Pop3D, golden: Mapping[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    """All arrays of all samples, computed `batch_size` at a time."""
    graph, state = nnx.split(model)
    x, y, z = model.config.grid_size

    @jax.jit
    def run(state, *inputs):
        capture = {}
        output = nnx.merge(graph, state)(*inputs, capture=capture)
        return _official_output(output) | official_intermediates(capture, (y * x, z * y, x * z))

    inputs = (
        golden["img"].transpose(0, 1, 3, 4, 2),
        golden["lidar2img"].astype(np.float32),
        golden["points"],
        golden["feature_points"],
    )
    parts = [
        run(state, *(jnp.asarray(array[start : start + batch_size]) for array in inputs))
        for start in range(0, len(inputs[0]), batch_size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _official_output(output: Pop3DOutput) -> dict[str, jax.Array]:
    return {
        "voxel_logits": jnp.moveaxis(output.occupancy_logits, -1, 1),
        "voxel_features": jnp.moveaxis(output.voxel_features, -1, 1),
        "point_logits": jnp.moveaxis(output.point_occupancy_logits, -1, 1)[..., None, None],
        "point_features": output.point_features,
    }


def _worst_sample(ours: np.ndarray, official: np.ndarray) -> str:
    """In which sample the difference is largest."""
    if ours.shape != official.shape:
        return ""
    differences = np.abs(ours - official).reshape(len(official), -1).max(1)
    return f"largest in sample {differences.argmax()} of {len(official)}"

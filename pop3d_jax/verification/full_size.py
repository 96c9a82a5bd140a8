"""The published network at full size, with reference weights, on the real key frame: minutes and gigabytes."""

import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, UInt8

from pop3d_jax.data.pipeline import decode_image
from pop3d_jax.images import network_images
from pop3d_jax.models.heads import Pop3DOutput
from pop3d_jax.models.pop3d import Pop3D, Pop3DConfig
from pop3d_jax.models.tpv_geometry import PLANES
from pop3d_jax.nuscenes import CAMERAS
from pop3d_jax.official_weights import computed_buffers, state_dict_to_model
from pop3d_jax.verification.checks import Check, absolute, exact, exact_where_clear, relative
from pop3d_jax.verification.golden_model import (
    GoldenFile,
    golden_arrays,
    golden_json,
    reference_state,
    reference_weights,
)
from pop3d_jax.voxels import Volume, grid_coordinates_float64

# The noise file compares two float32 runs of one implementation; ours sums in another order than both.
NOISE_FACTOR = 8.0
# Of features, whose noise is below 1e-5.
_FEATURE_TOLERANCE = 2e-5

_Capture = Mapping[str, np.ndarray]


def full_size(golden_file: GoldenFile) -> Iterator[Check]:
    """Inputs from pictures and sweep, then everything of which `full_model_slices.npz` keeps a part."""
    golden = golden_arrays(golden_file("pop3d/full_model_slices.npz"))
    noise = golden_json(golden_file("pop3d/full_float32_noise.json"))["arrays"]
    samples = golden_file("nuscenes/nuscenes_keyframe/samples")
    volume = Volume(Pop3DConfig().volume_minimum, Pop3DConfig().volume_maximum, Pop3DConfig().grid_size)

    pictures = _decoded(samples)
    images = np.asarray(network_images(jnp.asarray(np.stack(pictures))))
    (sweep_file,) = sorted((samples / "LIDAR_TOP").glob("*.bin"))
    sweep = sweep_file.read_bytes()
    points = np.frombuffer(sweep, np.float32).reshape(int(golden["n_points"]), -1)[:, :3]
    coordinates = grid_coordinates_float64(points, volume)

    yield from _inputs(golden, pictures, images)
    checksum = np.asarray(binascii.crc32(sweep), np.uint32)
    yield exact("points_crc32", checksum, golden["points_crc32"])
    yield exact("point_grid", coordinates[golden["point_index"]], golden["point_grid"])
    output, kept = _forward(golden_file, golden, images, coordinates)

    def tolerance(name: str) -> float:
        return NOISE_FACTOR * noise[name]["max_abs"]

    for name, ours in _stored_slices(golden, output, kept).items():
        yield absolute(name, ours, golden[name], tolerance(name))
    for plane in PLANES:
        shape = tuple(golden[f"refcam_mask_{plane}_shape"])
        mask = np.unpackbits(golden[f"refcam_mask_{plane}"], count=int(np.prod(shape))).reshape(shape)
        yield exact(f"refcam_mask_{plane}", kept[f"visible_{plane}"][0], mask.astype(bool))
    yield from _features(golden, output)
    yield from _occupancy(golden, output)


def _decoded(samples: Path) -> list[UInt8[np.ndarray, "height width 3"]]:
    """The pictures as RGB, in the order of the cameras."""
    pictures = []
    for camera in CAMERAS:
        (path,) = sorted((samples / camera).glob("*.jpg"))
        pixels, _ = decode_image(path.read_bytes(), (10**5, 10**5), path.name)
        pictures.append(pixels)
    return pictures


def _inputs(
    golden: Mapping[str, np.ndarray],
    pictures: list[UInt8[np.ndarray, "height width 3"]],
    images: Float32[np.ndarray, "camera height width 3"],
) -> Iterator[Check]:
    bgr = [np.ascontiguousarray(picture[..., ::-1]) for picture in pictures]
    checksums = np.array([binascii.crc32(picture.tobytes()) for picture in bgr], np.uint32)
    yield exact("img_crc32_raw_bgr_uint8", checksums, golden["img_crc32_raw_bgr_uint8"], "pictures that differ")
    rows, columns = golden["img_probe_yx"].T
    probe = np.stack([picture[rows, columns] for picture in bgr])
    yield exact("img_probe_raw_bgr", probe, golden["img_probe_raw_bgr"])
    yield exact("img_input_probe", images[:, rows, columns].transpose(0, 2, 1), golden["img_input_probe"])
    means = images.mean((1, 2), np.float64)
    yield relative("img_input_channel_mean", means, golden["img_input_channel_mean"], 1e-7)


def _forward(
    golden_file: GoldenFile, golden: Mapping[str, np.ndarray], images: np.ndarray, coordinates: np.ndarray
) -> tuple[Pop3DOutput, _Capture]:
    """Output and captured arrays of the network; the lidar's points are points and feature points."""
    inventory = golden_json(golden_file("pop3d/full_state_dict_inventory.json"))
    model = nnx.eval_shape(lambda: Pop3D(Pop3DConfig(), rngs=nnx.Rngs(0)))
    weights = reference_state(reference_weights(golden_file), inventory, computed_buffers(model))
    weights |= {name.removeprefix("override:"): golden[name] for name in golden if name.startswith("override:")}
    state_dict_to_model(weights, model)
    graph, state = nnx.split(model)
    # Held twice otherwise: gigabytes beside those of the forward pass.
    del weights, model

    @jax.jit
    def forward(state, images, lidar_to_image, points):
        capture = {}
        output = nnx.merge(graph, state)(images, lidar_to_image, points, points, capture=capture)
        # Only what is compared leaves the program: the sub-layers would be gigabytes.
        kept = {k: v for k, v in capture.items() if k.startswith(("backbone", "neck", "visible")) or "norm2" in k}
        return output, kept

    matrices = jnp.asarray(golden["lidar2img"], jnp.float32)[None]
    arguments = (state, jnp.asarray(images)[None], matrices, jnp.asarray(coordinates, jnp.float32)[None])
    # The other checks are compiled in haste, for programs that run for milliseconds.
    compiled = forward.lower(*arguments).compile(compiler_options={"xla_backend_optimization_level": 3})
    return jax.device_get(compiled(*arguments))


def _stored_slices(golden: Mapping[str, np.ndarray], output: Pop3DOutput, kept: _Capture) -> dict[str, np.ndarray]:
    """The parts of our arrays that are stored, by name."""
    arrays = {}
    for kind, prefix, first in (("backbone", "c", 3), ("neck", "fpn", 0)):
        for i, captured in enumerate(sorted(name for name in kept if name.startswith(kind))):
            name, maps = f"{prefix}{i + first}", kept[captured][0]
            arrays[f"{name}_mean"] = maps.mean((1, 2), np.float64)
            arrays[f"{name}_std"] = maps.std((1, 2), dtype=np.float64)
            if f"{name}_probe" in golden:
                rows, columns = golden[f"{name}_probe_yx"].T
                step = -(-maps.shape[-1] // golden[f"{name}_probe"].shape[1])
                arrays[f"{name}_probe"] = maps[:, rows, columns, ::step].transpose(0, 2, 1)
    x, y, z = Pop3DConfig().grid_size
    sizes = (y * x, z * y, x * z)
    for layer, captured in enumerate(sorted(name for name in kept if name.endswith("norm2"))):
        planes = np.split(kept[captured][0], np.cumsum(sizes)[:-1])
        for plane, size, tokens in zip(PLANES, sizes, planes, strict=True):
            name = f"plane_{plane}_layer{layer}"
            # Of hw the file has a list of rows; of earlier layers every few of them.
            rows = golden["plane_hw_rows"] if plane == "hw" else np.arange(size)
            arrays[name] = tokens[rows[:: -(-len(rows) // len(golden[name]))]]
    features = output.voxel_features.reshape(-1, output.voxel_features.shape[-1])
    arrays["voxel_logits"] = output.occupancy_logits.reshape(len(features), -1)[golden["voxel_index"]]
    arrays["point_logits"] = output.point_occupancy_logits[0][golden["point_index"]]
    arrays["voxel_features_channel_mean"] = features.mean(0, np.float64)
    arrays["voxel_features_channel_std"] = features.std(0, dtype=np.float64)
    return arrays


def _features(golden: Mapping[str, np.ndarray], output: Pop3DOutput) -> Iterator[Check]:
    logits = output.occupancy_logits.reshape(-1, output.occupancy_logits.shape[-1])
    means = np.array([logits.mean(0), logits.std(0)])
    yield absolute("voxel_logits_mean_std", means, golden["voxel_logits_mean_std"], 1e-5)
    for kind, features in (
        ("voxel", output.voxel_features.reshape(len(logits), -1)),
        ("point", output.point_features[0]),
    ):
        # The name ends in how many there are.
        (name,) = (key for key in golden if key.startswith(f"{kind}_features_f32_first"))
        found = features[golden[f"{kind}_index"]]
        yield absolute(name, found[: len(golden[name])], golden[name], _FEATURE_TOLERANCE)
        # Stored in half precision: its rounding is all that remains (rtol 1e-3, atol 3e-5).
        yield relative(f"{kind}_features", found, golden[f"{kind}_features"], 1e-3, 0.03)


def _occupancy(golden: Mapping[str, np.ndarray], output: Pop3DOutput) -> Iterator[Check]:
    shape = tuple(golden["occupancy_shape"])
    expected = np.unpackbits(golden["occupancy_packed"], count=int(np.prod(shape)))
    occupied = output.occupancy_logits[0].argmax(-1).reshape(-1)
    clear = np.ones(expected.shape, bool)
    prefix, suffix = "occupancy_margin_lt_", "_index"
    (name,) = (key for key in golden if key.startswith(prefix))
    clear[golden[name]] = False
    yield exact_where_clear("occupancy_packed", occupied, expected, clear)
    logits = output.point_occupancy_logits[0]
    clear = np.abs(logits[:, 1] - logits[:, 0]) >= float(name.removeprefix(prefix).removesuffix(suffix))
    expected = np.unpackbits(golden["point_occupancy_packed"])[: len(logits)]
    yield exact_where_clear("point_occupancy_packed", logits.argmax(-1), expected, clear)

"""The published network at full size, with reference weights, on the real key frame: minutes and gigabytes."""

import binascii
import json
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pop3d_jax.data.pipeline import decode_image
from pop3d_jax.images import network_images
from pop3d_jax.models.pop3d import Pop3D, Pop3DConfig
from pop3d_jax.nuscenes import CAMERAS
from pop3d_jax.official_weights import computed_buffers, state_dict_to_model
from pop3d_jax.verification.golden_model import reference_state, reference_weights
from pop3d_jax.voxels import Volume, grid_coordinates_float64

PLANES = ("hw", "zh", "wz")
# The noise file compares two float32 runs of one implementation; ours sums in another order than both.
NOISE_FACTOR = 8.0


@pytest.fixture(scope="module")
def golden(golden_file):
    with np.load(golden_file("pop3d/full_model_slices.npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def decoded(golden_file):
    """The six pictures as RGB, in the order of the cameras."""
    samples = golden_file("nuscenes/nuscenes_keyframe/samples")
    pictures = []
    for camera in CAMERAS:
        (path,) = sorted((samples / camera).glob("*.jpg"))
        pixels, _ = decode_image(path.read_bytes(), (10**5, 10**5), path.name)
        pictures.append(pixels)
    return np.stack(pictures)


@pytest.fixture(scope="module")
def images(decoded, golden):
    padded = np.asarray(network_images(jnp.asarray(decoded)))
    assert padded.shape[1:3] == tuple(golden["img_input_shape"][-2:])
    return padded


@pytest.fixture(scope="module")
def sweep(golden_file, golden):
    (path,) = sorted(golden_file("nuscenes/nuscenes_keyframe/samples/LIDAR_TOP").glob("*.bin"))
    raw = path.read_bytes()
    assert binascii.crc32(raw) == int(golden["points_crc32"])
    points = np.frombuffer(raw, np.float32).reshape(int(golden["n_points"]), -1)
    return points[:, :3]


@pytest.mark.golden
def test_pictures_are_decoded_as_official(decoded, golden):
    rows, columns = golden["img_probe_yx"].T
    for i, pixels in enumerate(decoded):
        bgr = np.ascontiguousarray(pixels[..., ::-1])
        assert binascii.crc32(bgr.tobytes()) == int(golden["img_crc32_raw_bgr_uint8"][i]), CAMERAS[i]
        np.testing.assert_allclose(bgr.mean((0, 1)), golden["img_mean_raw_bgr"][i], rtol=1e-12)
        np.testing.assert_array_equal(bgr[rows, columns], golden["img_probe_raw_bgr"][i])


@pytest.mark.golden
def test_network_input_equals_the_official_one(images, golden):
    rows, columns = golden["img_probe_yx"].T
    # Official arrays are [batch, camera, channel, height, width].
    assert images[None].transpose(0, 1, 4, 2, 3).shape == tuple(golden["img_input_shape"])
    np.testing.assert_array_equal(images[:, rows, columns].transpose(0, 2, 1), golden["img_input_probe"])
    np.testing.assert_allclose(images.mean((1, 2), np.float64), golden["img_input_channel_mean"], rtol=1e-7)


@pytest.mark.golden
def test_points_in_cells_equal_the_official_ones(sweep, golden):
    config = Pop3DConfig()
    volume = Volume(config.volume_minimum, config.volume_maximum, config.grid_size)
    ours = np.asarray(grid_coordinates_float64(sweep, volume))
    np.testing.assert_array_equal(ours[golden["point_index"]], golden["point_grid"])


@pytest.fixture(scope="module")
def outputs(golden_file, golden, images, sweep):
    """Everything that the golden file keeps something of, and what it took beyond what the tests before left behind."""
    status, marks = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def gibibytes(field):
        return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1]) / 2**20

    before = gibibytes("VmRSS") if status.exists() else 0.0
    config = Pop3DConfig()
    inventory = json.loads(golden_file("pop3d/full_state_dict_inventory.json").read_text())
    model = nnx.eval_shape(lambda: Pop3D(config, rngs=nnx.Rngs(0)))
    weights = reference_state(reference_weights(golden_file), inventory, computed_buffers(model))
    weights |= {name.removeprefix("override:"): golden[name] for name in golden if name.startswith("override:")}
    state_dict_to_model(weights, model)
    graph, state = nnx.split(model)
    del weights, model
    volume = Volume(config.volume_minimum, config.volume_maximum, config.grid_size)
    coordinates = jnp.asarray(grid_coordinates_float64(sweep, volume), jnp.float32)[None]

    @jax.jit
    def forward(state, images, lidar_to_image, points):
        capture = {}
        output = nnx.merge(graph, state)(images, lidar_to_image, points, points, capture=capture)
        # Only what is compared leaves the program: the sub-layers would be gigabytes.
        kept = {k: v for k, v in capture.items() if k.startswith(("backbone", "neck", "visible")) or "norm2" in k}
        return output, kept

    arguments = (state, jnp.asarray(images)[None], jnp.asarray(golden["lidar2img"], jnp.float32)[None], coordinates)
    # The suite compiles without optimisation, which is for programs that run for milliseconds.
    compiled = forward.lower(*arguments).compile(compiler_options={"xla_backend_optimization_level": 3})
    if marks.exists():
        marks.write_text("5")  # forget the peak of the tests before
    start = time.monotonic()
    output, kept = jax.device_get(compiled(*arguments))
    seconds = time.monotonic() - start
    peak = float("nan")
    if status.exists():
        peak = gibibytes("VmHWM") - before
    print(f"\nfull-size forward pass: {seconds:.1f} s, peak memory {peak:.2f} GiB above the {before:.2f} GiB before")
    return output, kept, peak


@pytest.fixture(scope="module")
def close(golden, golden_file):
    noise = json.loads(golden_file("pop3d/full_float32_noise.json").read_text())["arrays"]

    def compare(name, ours, atol=None):
        tolerance = NOISE_FACTOR * noise[name]["max_abs"] if atol is None else atol
        assert ours.shape == golden[name].shape, name
        np.testing.assert_allclose(ours, golden[name], rtol=0, atol=tolerance, err_msg=name)

    return compare


@pytest.mark.golden
@pytest.mark.slow
def test_memory_stays_below_eight_gigabytes(outputs):
    if np.isnan(outputs[2]):
        pytest.skip("this system does not tell the peak memory of a process: no /proc")
    assert outputs[2] < 8


@pytest.mark.golden
@pytest.mark.slow
def test_backbone_and_neck(outputs, golden, close):
    kept = outputs[1]
    for kind, prefix in (("backbone", "c"), ("neck", "fpn")):
        names = sorted(name for name in kept if name.startswith(kind))
        assert names
        for i, name in enumerate(names):
            official = f"{prefix}{i + 3 if kind == 'backbone' else i}"
            maps = kept[name][0]
            close(f"{official}_mean", maps.mean((1, 2), np.float64))
            close(f"{official}_std", maps.std((1, 2), dtype=np.float64))
            if f"{official}_probe" in golden:
                rows, columns = golden[f"{official}_probe_yx"].T
                step = -(-maps.shape[-1] // golden[f"{official}_probe"].shape[1])
                close(f"{official}_probe", maps[:, rows, columns, ::step].transpose(0, 2, 1))


@pytest.mark.golden
@pytest.mark.slow
def test_visibility_bit_for_bit(outputs, golden):
    for plane in PLANES:
        shape = tuple(golden[f"refcam_mask_{plane}_shape"])
        expected = np.unpackbits(golden[f"refcam_mask_{plane}"], count=int(np.prod(shape))).reshape(shape)
        np.testing.assert_array_equal(outputs[1][f"visible_{plane}"][0], expected.astype(bool), err_msg=plane)


@pytest.mark.golden
@pytest.mark.slow
def test_planes_after_every_layer(outputs, golden, close):
    x, y, z = Pop3DConfig().grid_size
    sizes = {"hw": y * x, "zh": z * y, "wz": x * z}
    layers = sorted(name for name in outputs[1] if name.endswith("norm2"))
    assert layers
    for layer, name in enumerate(layers):
        planes = np.split(outputs[1][name][0], np.cumsum(list(sizes.values()))[:-1])
        for plane, tokens in zip(PLANES, planes, strict=True):
            official = f"plane_{plane}_layer{layer}"
            # Of hw the file has a list of rows; of earlier layers every few of them.
            rows = golden["plane_hw_rows"] if plane == "hw" else np.arange(sizes[plane])
            close(official, tokens[rows[:: -(-len(rows) // len(golden[official]))]])


def first_features(golden, kind):
    """Name of the unrounded features, which ends in how many there are."""
    (name,) = (key for key in golden if key.startswith(f"{kind}_features_f32_first"))
    return name


@pytest.mark.golden
@pytest.mark.slow
def test_voxels(outputs, golden, close):
    output = outputs[0]
    logits = output.occupancy_logits[0].reshape(-1, output.occupancy_logits.shape[-1])
    features = output.voxel_features[0].reshape(len(logits), -1)
    index = golden["voxel_index"]
    name = first_features(golden, "voxel")
    first = len(golden[name])
    close("voxel_logits", logits[index])
    close(name, features[index[:first]], 2e-5)
    # Stored in half precision: its rounding is all that remains.
    np.testing.assert_allclose(features[index], golden["voxel_features"], rtol=1e-3, atol=3e-5)
    np.testing.assert_allclose([logits.mean(0), logits.std(0)], golden["voxel_logits_mean_std"], rtol=0, atol=1e-5)
    close("voxel_features_channel_mean", features.mean(0, np.float64))
    close("voxel_features_channel_std", features.std(0, dtype=np.float64))


@pytest.mark.golden
@pytest.mark.slow
def test_occupancy_of_every_voxel_and_point(outputs, golden):
    output = outputs[0]
    shape = tuple(golden["occupancy_shape"])
    expected = np.unpackbits(golden["occupancy_packed"], count=int(np.prod(shape))).reshape(shape)
    occupied = output.occupancy_logits[0].argmax(-1)
    assert occupied.shape == shape
    differing = np.flatnonzero(occupied != expected)
    (name,) = (key for key in golden if key.startswith("occupancy_margin_lt_"))
    assert np.isin(differing, golden[name]).all()
    points = np.unpackbits(golden["point_occupancy_packed"])[: int(golden["n_points"])]
    point_logits = output.point_occupancy_logits[0]
    margin = float(name.removeprefix("occupancy_margin_lt_").removesuffix("_index"))
    clear = np.abs(point_logits[:, 1] - point_logits[:, 0]) >= margin
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(point_logits.argmax(-1)[clear], points[clear])


@pytest.mark.golden
@pytest.mark.slow
def test_points(outputs, golden, close):
    index = golden["point_index"]
    features = outputs[0].point_features[0][index]
    close("point_logits", outputs[0].point_occupancy_logits[0][index])
    name = first_features(golden, "point")
    close(name, features[: len(golden[name])], 2e-5)
    np.testing.assert_allclose(features, golden["point_features"], rtol=1e-3, atol=3e-5)

"""MaskCLIP+ from pictures to point features: against the official extraction, and against plain NumPy."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from official_weights import reference_weight_function
from PIL import Image
from safetensors.numpy import save_file

from pop3d_jax.models.deeplab import DeepLabV2
from pop3d_jax.models.maskclip_plus import (
    IMAGE_SCALE,
    MaskCLIPPlus,
    containing_pixel,
    fitted_hw,
    normalise,
    resize_pictures,
    sample_resized,
)
from pop3d_jax.models.maskclip_plus_weights import load_network, official_shapes
from pop3d_jax.nuscenes import CAMERAS
from pop3d_jax.verification.maskclip_plus import NOISE_FACTOR, intermediates, inventory_sizes, reference_network

# A float16 keeps 11 bits.
HALF = {"rtol": 2**-11, "atol": 1e-5}


@pytest.fixture(scope="module")
def full(golden_file):
    return np.load(golden_file("maskclip_plus/full_frame.npz"))


@pytest.fixture(scope="module")
def info(golden_file):
    return json.loads(golden_file("maskclip_plus/full_info.json").read_text())


@pytest.fixture(scope="module")
def protocol(golden_file):
    return json.loads(golden_file("maskclip_plus/protocol.json").read_text())


@pytest.fixture(scope="module")
def resized_picture(golden_file):
    with Image.open(golden_file("maskclip_plus/cam_front_resized.png")) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def picture_of(golden_file):
    """The real key frame's picture of a camera, RGB."""

    def read(camera):
        (path,) = golden_file(f"nuscenes/nuscenes_keyframe/samples/{camera}").glob("*.jpg")
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    return read


@pytest.fixture(scope="module")
def official_sizes(golden_file):
    inventory = json.loads(golden_file("maskclip_plus/full_state_dict_inventory.json").read_text())
    return inventory_sizes(inventory["state_dict"])


@pytest.fixture(scope="module")
def official_network(golden_file, official_sizes):
    """The network of official widths with reference weights: 61 million numbers."""
    reference_weight = reference_weight_function(golden_file("maskclip_plus/reference_weights.py"))
    return reference_network(reference_weight, official_sizes, {})


@pytest.fixture(scope="module")
def full_noise(info, official_sizes):
    """Float32 noise by layer. The full picture was not repeated in float64: it is the crop's, of the same weights."""
    prefix = f"depth{official_sizes['depth']}/"
    noise = info["crop_float32_minus_float64"]
    return {key.removeprefix(prefix): entry["max_abs"] for key, entry in noise.items() if key.startswith(prefix)}


def channels_first(array):
    return np.moveaxis(np.asarray(array), -1, -3)


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def statistics(array):
    """Mean, standard deviation, minimum, maximum and share of zeros, as the golden set keeps them."""
    array = np.asarray(array)
    return np.array(
        [array.mean(dtype=np.float64), array.std(dtype=np.float64), array.min(), array.max(), (array == 0).mean()]
    )


def opencv_by_hand(image, height, width):
    """INTER_LINEAR of 8-bit pictures for one pixel after the other, in Python's integers."""

    def neighbours(cells, size, index):
        position = np.float32((index + 0.5) * (cells / size) - 0.5)
        low = int(np.floor(position))
        share = position - np.float32(low)
        return low, round(float((1 - share) * 2048)), round(float(share * 2048))

    result = np.zeros((height, width, 3), np.uint8)
    for row in range(height):
        top, top_weight, bottom_weight = neighbours(image.shape[0], height, row)
        rows = [min(max(i, 0), image.shape[0] - 1) for i in (top, top + 1)]
        for column in range(width):
            left, left_weight, right_weight = neighbours(image.shape[1], width, column)
            if left < 0 or left >= image.shape[1] - 1:
                left, left_weight, right_weight = min(max(left, 0), image.shape[1] - 1), 2048, 0
            right = min(left + 1, image.shape[1] - 1)
            for channel in range(3):
                mixed = [
                    (int(image[i, left, channel]) * left_weight + int(image[i, right, channel]) * right_weight) >> 4
                    for i in rows
                ]
                total = (mixed[0] * top_weight >> 16) + (mixed[1] * bottom_weight >> 16)
                result[row, column, channel] = (total + 2) >> 2
    return result


def bilinear_matrix(cells, size):
    """One axis of a bilinear resize (align_corners=False, clamped) as a matrix, in float64."""
    positions = (np.arange(size) + 0.5) * cells / size - 0.5
    return np.stack([np.interp(positions, np.arange(cells), unit) for unit in np.eye(cells)], axis=1)


@pytest.mark.golden
def test_resize_is_opencvs_byte_for_byte(info, protocol, resized_picture, picture_of):
    picture = picture_of(info["image_meta"]["ori_filename"].split("/")[0])
    assert sha256(picture[..., ::-1]) == info["image_sha256"]["decoded_bgr_sha256"]
    assert list(picture.shape) == info["image_meta"]["ori_shape"]
    hw = fitted_hw(picture.shape[:2])
    assert list(hw) == protocol["test_pipeline"]["resized_height_width"] == info["image_meta"]["img_shape"][:2]
    resized = jax.jit(lambda images: resize_pictures(images, hw))(jnp.asarray(picture)[None])[0]
    np.testing.assert_array_equal(resized, resized_picture)
    assert sha256(np.asarray(resized)) == info["image_sha256"]["resized_rgb_sha256"]


def test_fitted_sizes():
    assert fitted_hw((900, 1600)) == (1024, 1820)
    assert fitted_hw((1600, 900)) == (1820, 1024)
    assert fitted_hw((500, 2000)) == (512, 2048)
    assert fitted_hw((30, 40), (60, 40)) == (40, 53)
    assert IMAGE_SCALE == (2048, 1024)


@settings(max_examples=8, deadline=None)
@given(
    hw=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    out=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    seed=st.integers(0, 1000),
)
@pytest.mark.slow
def test_resize_of_any_size_equals_the_rule_by_hand(hw, out, seed):
    images = np.random.default_rng(seed).integers(0, 256, (2, *hw, 3)).astype(np.uint8)
    ours = resize_pictures(jnp.asarray(images), out)
    np.testing.assert_array_equal(ours, np.stack([opencv_by_hand(image, *out) for image in images]))


def test_resize_to_the_same_size_changes_nothing():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 7, 11, 3)), jnp.uint8)
    np.testing.assert_array_equal(resize_pictures(images, (7, 11)), images)


@pytest.mark.golden
def test_network_input(full, resized_picture):
    image = np.asarray(normalise(jnp.asarray(resized_picture)[None])).transpose(0, 3, 1, 2)
    assert image.shape == tuple(full["input_shape"])
    # Values up to 2.6: two float32 steps there.
    np.testing.assert_allclose(image[0][tuple(full["input_positions"].T)], full["input_values"], rtol=0, atol=5e-7)
    np.testing.assert_allclose(statistics(image), full["input_stats"], rtol=0, atol=1e-6)


@pytest.mark.golden
def test_crop_is_a_window_of_the_picture(golden_file, resized_picture):
    golden = np.load(golden_file("maskclip_plus/full_width_crop.npz"))
    top, left, height, width = golden["crop_box_top_left_height_width"]
    np.testing.assert_array_equal(resized_picture[top : top + height, left : left + width], golden["crop_rgb_uint8"])


def starting(arrays, prefix):
    """Name of the one array that starts so; its name ends in how much it holds."""
    (name,) = (name for name in arrays.files if name.startswith(prefix))
    return name


@pytest.mark.golden
def test_sampling_of_the_official_feature_map(golden_file, full):
    """The complete first channels are the input, so nothing but the two resizes is compared."""
    maps = jnp.asarray(full[starting(full, "feature_map/channels_0_to_")].transpose(1, 2, 0))[None]
    channels = maps.shape[-1]
    cells = tuple(full["feature_map/positions_row_col"].T)
    first = full[starting(full, "feature_map/values_first")]
    np.testing.assert_array_equal(maps[0][cells][: len(first)], first[:, :channels])
    np.testing.assert_allclose(
        np.asarray(maps).mean((0, 1, 2), dtype=np.float64), full["feature_map/channel_mean"][:channels], atol=1e-7
    )
    input_hw, output_hw = tuple(full["upsampled/shape"][-2:].tolist()), tuple(full["output/shape"][-2:].tolist())

    def read(sizes, pixels):
        row, column = jnp.asarray(pixels, jnp.int32).T
        return np.asarray(sample_resized(maps, sizes, jnp.zeros_like(row), row, column))

    for name, sizes in (("upsampled", [input_hw]), ("output", [input_hw, output_hw])):
        found = read(sizes, full[f"{name}/positions_row_col"])
        # float32 sums of 4 and of 16 products of values up to 4.
        first = full[starting(full, f"{name}/values_first")]
        np.testing.assert_allclose(found[: len(first)], first[:, :channels], rtol=0, atol=5e-6)
        np.testing.assert_allclose(found, full[f"{name}/values_float16"][:, :channels], **HALF)
    info = json.loads(golden_file("maskclip_plus/full_info.json").read_text())
    camera = info["image_meta"]["ori_filename"].split("/")[0]
    found = read([input_hw, output_hw], full[f"points/{camera}/pixels_row_col"])
    # The points' own features come from a second official run over the picture.
    np.testing.assert_allclose(found, full[f"points/{camera}/features"][:, :channels], rtol=0, atol=5e-6)


@pytest.mark.golden
def test_official_pixels_survive_the_pipelines_shares(golden_file, full):
    projection = np.load(golden_file("nuscenes/projection.npz"))
    hw = tuple(projection["image_hw"].tolist())
    for camera in CAMERAS:
        pixels = projection[f"pixels_{camera}"]
        index = full[f"points/{camera}/point_index"]
        np.testing.assert_array_equal(projection[f"points_{camera}"][: len(index)], index)
        np.testing.assert_array_equal(pixels[: len(index)], full[f"points/{camera}/pixels_row_col"])
        assert len(pixels) == len(full[f"points/{camera}/all_mean_per_point"])
        shares = ((pixels + 0.5) / np.asarray(hw)).astype(np.float32)
        np.testing.assert_array_equal(np.stack(containing_pixel(jnp.asarray(shares), hw), 1), pixels)


@pytest.mark.parametrize("hw", [(900, 1600), (225, 400), (899, 1601), (1, 1)])
def test_every_pixel_is_recovered_from_its_share(hw):
    for axis, side in enumerate(hw):
        pixels = np.zeros((side, 2), int)
        pixels[:, axis] = np.arange(side)
        shares = ((pixels + 0.5) / np.asarray(hw)).astype(np.float32)
        np.testing.assert_array_equal(np.stack(containing_pixel(jnp.asarray(shares), hw), 1), pixels)
    # Padding points and the far border stay inside.
    row, column = containing_pixel(jnp.array([[0.0, 0.0], [1.0, 1.0]]), hw)
    np.testing.assert_array_equal(np.stack([row, column], 1), [[0, 0], [hw[0] - 1, hw[1] - 1]])


@settings(max_examples=15, deadline=None)
@given(
    cells=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    between=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    last=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 1000),
)
@pytest.mark.slow
def test_sampling_equals_resizing_step_by_step(cells, between, last, seed):
    random = np.random.default_rng(seed)
    features = random.normal(size=(2, *cells, 3)).astype(np.float32)
    maps = features.astype(np.float64)
    for before, after in ((cells, between), (between, last)):
        vertical, horizontal = (bilinear_matrix(before[axis], after[axis]) for axis in (0, 1))
        maps = np.einsum("hr,nrcd,wc->nhwd", vertical, maps, horizontal)
    picture = random.integers(0, 2, 20).astype(np.int32)
    row, column = (random.integers(0, side, 20).astype(np.int32) for side in last)
    ours = sample_resized(jnp.asarray(features), (between, last), *map(jnp.asarray, (picture, row, column)))
    np.testing.assert_allclose(ours, maps[picture, row, column], atol=5e-5)


def test_sampling_never_builds_the_resized_map():
    maps = jax.ShapeDtypeStruct((1, 8, 12, 4), jnp.float32)
    points = jax.ShapeDtypeStruct((5,), jnp.int32)
    sizes = ((640, 960), (560, 840))
    program = jax.make_jaxpr(lambda *arrays: sample_resized(arrays[0], sizes, *arrays[1:]))(
        maps, points, points, points
    )
    # The largest array is the map or the table of one axis' four taps, never an image of features.
    largest = max(int(np.prod(value.aval.shape)) for eqn in program.eqns for value in eqn.outvars)
    assert largest <= 4 * max(sizes[1])


def test_weights_come_from_a_file(tmp_path):
    shapes = official_shapes(
        nnx.eval_shape(lambda: DeepLabV2(stem_channels=2, base_channels=1, aspp_channels=3, rngs=nnx.Rngs(0)))
    )
    random = np.random.default_rng(0)
    state = {key: random.uniform(0.5, 1, shape).astype(np.float32) for key, shape in shapes.items()}
    save_file(state, tmp_path / "whole.safetensors")
    network = load_network(tmp_path / "whole.safetensors")
    assert network.feature_dim == 3
    np.testing.assert_array_equal(network.head.aspp_modules[3].bn.mean[...], state[
        "decode_head.decode_module.aspp_modules.3.bn.running_mean"
    ])  # fmt: skip
    del state["decode_head.decode_module.aspp_modules.3.bn.running_mean"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"part\.safetensors: (.|\n)*missing: decode_head"):
        load_network(tmp_path / "part.safetensors")


@pytest.mark.golden
@pytest.mark.slow
def test_full_picture_layer_by_layer(full, full_noise, resized_picture, official_network):
    maps = nnx.jit(intermediates)(official_network, normalise(jnp.asarray(resized_picture))[None])
    layers = [key.removesuffix("/positions") for key in full.files if key.endswith("/positions")]
    assert layers
    for layer in layers:
        found = channels_first(maps[layer])
        tolerance = NOISE_FACTOR * full_noise[layer]
        assert found.shape[1:] == tuple(full[f"{layer}/shape"][-3:])
        np.testing.assert_allclose(
            found[0][tuple(full[f"{layer}/positions"].T)],
            full[f"{layer}/values"],
            rtol=0,
            atol=tolerance,
            err_msg=layer,
        )
        np.testing.assert_allclose(statistics(found), full[f"{layer}/stats"], rtol=0, atol=1e-5, err_msg=layer)
    features = maps["features"]
    tolerance = NOISE_FACTOR * full_noise["features"]
    found = channels_first(features)
    assert found.shape[1:] == tuple(full["feature_map/shape"][-3:])
    np.testing.assert_allclose(statistics(found), full["feature_map/stats"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[0].mean((1, 2), dtype=np.float64), full["feature_map/channel_mean"], atol=1e-5)
    complete = full[starting(full, "feature_map/channels_0_to_")]
    np.testing.assert_allclose(found[0, : len(complete)], complete, rtol=0, atol=tolerance)
    hws = [tuple(full[f"{name}/shape"][-2:].tolist()) for name in ("upsampled", "output")]
    for name, sizes in (("feature_map", []), ("upsampled", hws[:1]), ("output", hws)):
        row, column = jnp.asarray(full[f"{name}/positions_row_col"], jnp.int32).T
        found = np.asarray(sample_resized(features, sizes, jnp.zeros_like(row), row, column))
        first = full[starting(full, f"{name}/values_first")]
        np.testing.assert_allclose(found[: len(first)], first, rtol=0, atol=tolerance, err_msg=name)
        np.testing.assert_allclose(found, full[f"{name}/values_float16"], **HALF, err_msg=name)


@pytest.mark.golden
@pytest.mark.slow
def test_official_features_of_real_points(golden_file, full, full_noise, official_network, picture_of):
    """From the JPEGs to what the official script writes, all six cameras."""
    projection = np.load(golden_file("nuscenes/projection.npz"))
    hw = tuple(projection["image_hw"].tolist())
    teacher = MaskCLIPPlus(official_network)
    read = nnx.jit(lambda model, images, picture, pixel: model.features_at(images, picture, pixel))
    pixels = [projection[f"pixels_{camera}"] for camera in CAMERAS]
    capacity = max(map(len, pixels))
    for camera, pixel in zip(CAMERAS, pixels, strict=True):
        shares = np.zeros((capacity, 2), np.float32)
        shares[: len(pixel)] = (pixel + 0.5) / np.asarray(hw)
        image = jnp.asarray(picture_of(camera))[None]
        found = np.asarray(read(teacher, image, jnp.zeros(capacity, jnp.int32), jnp.asarray(shares)))[: len(pixel)]
        expected = full[f"points/{camera}/features"]
        tolerance = NOISE_FACTOR * full_noise["features"]
        np.testing.assert_allclose(found[: len(expected)], expected, rtol=0, atol=tolerance, err_msg=camera)
        np.testing.assert_allclose(found.mean(1), full[f"points/{camera}/all_mean_per_point"], rtol=0, atol=tolerance)

"""The MaskCLIP+ network against the official numbers, and its weights against the official inventory.

Tolerances follow the golden sets' own measure: how far an official float32 run lies from float64 (largest element).
Ours is another float32 run with another order of summation, so the two may differ by the sum of both errors, and the
largest error of ours is another draw: four times the measured noise.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from official_weights import reference_weight_function

from pop3d_jax.models.batch_norm import EPSILON
from pop3d_jax.models.deeplab import DeepLabV2
from pop3d_jax.models.maskclip_plus import normalise, sample_resized
from pop3d_jax.models.maskclip_plus_weights import network_from_state_dict, network_sizes, official_shapes

NOISES = 4


@pytest.fixture(scope="module")
def reference_weight(golden_file):
    return reference_weight_function(golden_file("maskclip_plus/reference_weights.py"))


@pytest.fixture(scope="module")
def tiny(golden_file):
    return json.loads(golden_file("maskclip_plus/tiny_info.json").read_text())


@pytest.fixture(scope="module")
def inventory(golden_file):
    return json.loads(golden_file("maskclip_plus/full_state_dict_inventory.json").read_text())


@pytest.fixture(scope="module")
def small_state():
    """An official state dict of the smallest network of depth 50, everything in it but the CLIP."""
    network = nnx.eval_shape(lambda: DeepLabV2(stem_channels=2, base_channels=1, aspp_channels=3, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return {key: rng.uniform(0.5, 1, shape).astype(np.float32) for key, shape in official_shapes(network).items()}


def channels_last(array):
    return jnp.asarray(np.moveaxis(array, -3, -1))


def channels_first(array):
    return np.moveaxis(np.asarray(array), -1, -3)


def intermediates(network, images):
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


def network_of(reference_weight, depth, sizes, **settings):
    """A network with reference weights; `sizes` are those that a state dict tells, but for the depth."""
    sizes = sizes | {"depth": depth}
    shapes = official_shapes(nnx.eval_shape(lambda: DeepLabV2(**sizes, **settings, rngs=nnx.Rngs(0))))
    state = {key: reference_weight(key, shape) for key, shape in shapes.items()}
    assert network_sizes(state) == sizes
    return network_from_state_dict(state, **settings)


def shapes_only(entries):
    """A state dict of an inventory's names and shapes whose arrays take no memory."""
    return {key: np.broadcast_to(np.float32(1), shape) for key, shape, *_ in entries}


def resized(maps, sizes):
    """Whole maps after successive resizes, read pixel by pixel."""
    height, width = sizes[-1]
    picture, row, column = (axis.ravel() for axis in np.indices((maps.shape[0], height, width)).astype(np.int32))
    values = jax.jit(lambda maps, *at: sample_resized(maps, sizes, *at))(maps, picture, row, column)
    return values.reshape(maps.shape[0], height, width, -1)


@pytest.mark.golden
def test_every_tiny_array(golden_file, tiny, reference_weight):
    golden = dict(np.load(golden_file("maskclip_plus/tiny_model.npz")))
    noise = tiny["float32_minus_float64"]
    assert tiny["batch_norm_eps"] == EPSILON
    assert tiny["align_corners"] is False
    settings = {
        "strides": tiny["strides"],
        "dilations": tiny["dilations"],
        "first_dilations": tiny["first_block_dilations"],
        "aspp_dilations": tiny["aspp_dilations"],
    }
    sizes = network_sizes(shapes_only(tiny["state_dict"]))
    texts = jnp.asarray(golden.pop("text_embeddings"))
    runs = sorted({key.rsplit("/", 1)[0] for key in golden if key.startswith("depth")})
    assert len(runs) >= 2
    images = {name: golden.pop(f"image/{name}") for name in {run.split("/")[1] for run in runs}}
    for run in runs:
        depth, size = re.fullmatch(r"depth(\d+)/(\d+x\d+)", run).groups()
        network = network_of(reference_weight, int(depth), sizes, **settings)
        maps = nnx.jit(intermediates)(network, channels_last(images[size]))
        maps["logits"] = maps["features"] @ texts.T
        input_hw, original_hw = images[size].shape[2:], tuple(tiny["original_sizes"][size])
        for name in ("features", "logits"):
            maps[f"{name}_input_size"] = resized(maps[name], [input_hw])
            maps[f"{name}_original_size"] = resized(maps[name], [input_hw, original_hw])
        maps["probabilities_original_size"] = jax.nn.softmax(maps["logits_original_size"], axis=-1)
        for key in [key for key in golden if key.startswith(f"{run}/")]:
            name, expected = key.removeprefix(f"{run}/"), golden.pop(key)
            assert list(expected.shape) == tiny["shapes"][key]
            if name == "classes_original_size":
                # Equal wherever the best two texts are further apart than float32 noise can move them.
                logits = channels_first(maps["logits_original_size"])
                best, second = np.sort(logits, axis=1)[:, -1], np.sort(logits, axis=1)[:, -2]
                certain = best - second > 2 * NOISES * noise[f"{run}/logits"]["max_abs"]
                assert certain.mean() > 0.99
                np.testing.assert_array_equal(logits.argmax(1)[certain], expected[certain])
            else:
                np.testing.assert_allclose(
                    channels_first(maps[name]), expected, rtol=0, atol=NOISES * noise[key]["max_abs"], err_msg=key
                )
    assert not golden, f"arrays that no check used: {sorted(golden)}"


@pytest.mark.golden
@pytest.mark.slow
def test_official_widths_on_a_crop(golden_file, inventory, reference_weight):
    golden = dict(np.load(golden_file("maskclip_plus/full_width_crop.npz")))
    info = json.loads(golden_file("maskclip_plus/full_info.json").read_text())
    noise = info["crop_float32_minus_float64"]
    positions = {
        key.removeprefix("positions/"): golden.pop(key) for key in list(golden) if key.startswith("positions/")
    }
    crop = jnp.asarray(golden.pop("crop_rgb_uint8"))
    sizes = network_sizes(shapes_only(inventory["state_dict"]))
    del golden["crop_box_top_left_height_width"]  # where the crop is from: test_maskclip_plus
    for run in sorted({key.split("/")[0] for key in golden}):
        network = network_of(reference_weight, int(run.removeprefix("depth")), sizes)
        maps = nnx.jit(intermediates)(network, normalise(crop)[None])
        for layer in [name for name in maps if f"{run}/{name}" in golden]:
            key = f"{run}/{layer}"
            tolerance = NOISES * noise[key]["max_abs"]
            values = np.asarray(maps[layer][0])
            assert [1, *(values.shape[axis] for axis in (2, 0, 1))] == noise[key]["shape"]
            if layer == "features":
                found = values[tuple(positions["features_row_col"].T)]
            else:
                channel, row, column = positions[layer].T
                found = values[row, column, channel]
            np.testing.assert_allclose(found, golden.pop(key), rtol=0, atol=tolerance, err_msg=key)
            stats = [values.mean(dtype=np.float64), values.std(dtype=np.float64), values.min(), values.max()]
            np.testing.assert_allclose(
                stats, golden.pop(f"{key}/mean_std_min_max"), rtol=0, atol=tolerance, err_msg=key
            )
    assert not golden, f"arrays that no check used: {sorted(golden)}"


@pytest.mark.golden
def test_inventory_both_ways(inventory):
    entries = {key: tuple(shape) for key, shape, _ in inventory["state_dict"]}
    assert len(entries) == inventory["entries"]
    shapes = {
        depth: official_shapes(nnx.eval_shape(lambda depth=depth: DeepLabV2(depth, rngs=nnx.Rngs(0))))
        for depth in (50, 101)
    }
    counters = {key: shape for key, shape in entries.items() if key.endswith("num_batches_tracked")}
    used = {key: shape for key, shape in entries.items() if key.startswith(("backbone.", "decode_head.decode_module."))}
    assert shapes[50] | counters == used
    assert len(entries) - len(used) == inventory["unused_at_inference"]["count"]
    # The whole published inventory loads, unused entries included; arrays of ones take no memory until then.
    network_from_state_dict(shapes_only(inventory["state_dict"]))

    def parameters(depth):
        return sum(
            int(np.prod(shape))
            for key, shape in shapes[depth].items()
            if not key.endswith(("running_mean", "running_var"))
        )

    assert parameters(50) == inventory["parameters_used_for_features"]
    assert parameters(101) == inventory["parameters_used_for_features_if_depth_101"]
    deeper = inventory["depth_101"]
    more = {key for key in shapes[101] if key not in shapes[50]}
    norms = {key for key in more if key.endswith("running_mean")}
    assert len(more) + len(norms) == deeper["additional_entries"]
    assert shapes[50].items() <= shapes[101].items()
    assert deeper["first"] in more
    assert deeper["last"].replace("num_batches_tracked", "running_mean") in more


def test_prefix_counters_and_unused_entries_are_accepted(small_state):
    plain = network_from_state_dict(small_state)
    more = {
        "backbone.stem.1.num_batches_tracked": np.int64(7),
        "decode_head._iter_counter": np.zeros(1, np.int64),
        "decode_head.text_embeddings": np.zeros((28, 3), np.float32),
        "decode_head.clip.layers.0.ln1.weight": np.zeros(4, np.float32),
        "decode_head.proj.weight": np.zeros((3, 4, 1, 1), np.float32),
    }
    half = {key: value.astype(np.float16) for key, value in small_state.items()}
    rounded = network_from_state_dict({key: value.astype(np.float32) for key, value in half.items()})
    for state, expected in ((small_state | more, plain), (half, rounded)):
        network = network_from_state_dict({f"module.{key}": value for key, value in state.items()})
        jax.tree.map(np.testing.assert_array_equal, nnx.state(network), nnx.state(expected))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(plain))} == {jnp.dtype(jnp.float32)}


def test_every_problem_of_a_state_dict_is_listed(small_state):
    state = dict(small_state)
    del state["backbone.layer2.0.conv1.weight"]
    state["backbone.layer4.0.conv1.weight"] = state["backbone.layer4.0.conv1.weight"][:, :3]
    state["backbone.layer1.0.bn1.running_var"] = np.full(1, np.nan, np.float32)
    state["backbone.layer1.0.bn1.bias"] = np.zeros(1, np.int64)
    state["decode_head.conv_seg.weight"] = np.zeros(1, np.float32)
    state["backbone.layer3.0.bn9.num_batches_tracked"] = np.int64(0)
    state["module.backbone.stem.0.weight"] = state["backbone.stem.0.weight"]
    with pytest.raises(ValueError, match="7 problems") as error:
        network_from_state_dict(state)
    for problem in (
        "missing: backbone.layer2.0.conv1.weight",
        "shape of backbone.layer4.0.conv1.weight: (8, 3, 1, 1), this network needs (8, 16, 1, 1)",
        "not finite: backbone.layer1.0.bn1.running_var",
        "type of backbone.layer1.0.bn1.bias: int64",
        "unknown: decode_head.conv_seg.weight",
        "unknown: backbone.layer3.0.bn9.num_batches_tracked",
        "twice, with and without module.: backbone.stem.0.weight",
    ):
        assert problem in str(error.value)


def test_a_half_loaded_deeper_network_is_refused(small_state):
    deeper = nnx.eval_shape(lambda: DeepLabV2(101, stem_channels=2, base_channels=1, aspp_channels=3, rngs=nnx.Rngs(0)))
    state = {key: np.ones(shape, np.float32) for key, shape in official_shapes(deeper).items()}
    assert len(network_from_state_dict(state).backbone.layer3) == 23
    with pytest.raises(ValueError, match=r"depth 101(.|\n)*missing: backbone\.layer3\.22\.bn1"):
        network_from_state_dict({key: value for key, value in state.items() if "layer3.22." not in key})
    extra = {"backbone.layer3.6.conv1.weight": np.ones((4, 16, 1, 1), np.float32)}
    with pytest.raises(ValueError, match="depth 101"):
        network_from_state_dict(small_state | extra)
    with pytest.raises(ValueError, match=r"unknown: backbone\.layer3\.23\.bn1\.bias"):
        network_from_state_dict(state | {"backbone.layer3.23.bn1.bias": np.ones(4, np.float32)})


def test_another_state_dict_is_refused():
    with pytest.raises(ValueError, match=r"not of a MaskCLIP\+ network(.|\n)*backbone\.stem\.7\.weight"):
        network_from_state_dict({"conv1.weight": np.ones((8, 3, 7, 7), np.float32)})


def test_features_cover_sides_of_any_length(small_state):
    network = network_from_state_dict(small_state)
    for height, width in ((33, 47), (8, 9)):
        shape = jax.eval_shape(network, jnp.zeros((2, height, width, 3))).shape
        assert shape == (2, -(-height // 8), -(-width // 8), network.feature_dim)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="depth 34"):
        DeepLabV2(34, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="first_dilations"):
        DeepLabV2(50, first_dilations=(1, 1), rngs=nnx.Rngs(0))

"""The MaskCLIP+ network's weights against the official inventory, and what it refuses (its numbers: test_golden.py)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pop3d_jax.models.deeplab import DeepLabV2
from pop3d_jax.models.maskclip_plus_weights import network_from_state_dict, official_shapes


@pytest.fixture(scope="module")
def inventory(golden_file):
    return json.loads(golden_file("maskclip_plus/full_state_dict_inventory.json").read_text())


@pytest.fixture(scope="module")
def small_state():
    """An official state dict of the smallest network of depth 50, everything in it but the CLIP."""
    network = nnx.eval_shape(lambda: DeepLabV2(stem_channels=2, base_channels=1, aspp_channels=3, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return {key: rng.uniform(0.5, 1, shape).astype(np.float32) for key, shape in official_shapes(network).items()}


def shapes_only(entries):
    """A state dict of an inventory's names and shapes whose arrays take no memory."""
    return {key: np.broadcast_to(np.float32(1), shape) for key, shape, *_ in entries}


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


@pytest.mark.slow
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

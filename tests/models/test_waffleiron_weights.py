"""Official names, shapes and files of WaffleIron's weights."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

from pop3d_jax.models.waffleiron import WaffleIron, WaffleIronConfig
from pop3d_jax.models.waffleiron_weights import (
    load_waffleiron,
    official_shapes,
    state_dict_to_waffleiron,
    waffleiron_to_state_dict,
)
from pop3d_jax.torch_files import write_state_dict

SMALL = {
    "channels": 4,
    "depth": 2,
    "grid_shapes": ((3, 2), (2, 2)),
    "projection_axes": (2, 0),
    "output_channels": 6,
    "head_hidden": 7,
}


def small_model(seed=0, **settings):
    return WaffleIron(WaffleIronConfig(**SMALL | settings), rngs=nnx.Rngs(seed))


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


@pytest.mark.golden
@pytest.mark.parametrize(("part", "head"), [("pretrain", "linear"), ("downstream_nuscenes16", "probe")])
@pytest.mark.slow
def test_the_published_inventory(golden_file, part, head):
    """Every official name and shape is ours, and every array of ours has an official one."""
    inventory = json.loads(golden_file("scalr/full_state_dict_inventory.json").read_text())[part]
    shapes = {key: tuple(shape) for key, shape, _ in inventory["state_dict"]}
    blocks = {int(found[1]) for key in shapes if (found := re.match(r"waffleiron\.channel_mix\.(\d+)\.", key))}
    classifier = "classif.weight" if head == "linear" else "classif.1.weight"
    config = WaffleIronConfig(
        channels=shapes[classifier][1], depth=len(blocks), output_channels=shapes[classifier][0], head=head
    )
    model = nnx.eval_shape(lambda: WaffleIron(config, rngs=nnx.Rngs(0)))
    ours = official_shapes(model)
    assert ours == shapes
    arrays = len(jax.tree.leaves(nnx.state(model)))
    assert arrays == sum(not key.endswith("num_batches_tracked") for key in shapes)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert parameters == inventory["num_parameters"]
    official_parameters = {key for key in shapes if not re.search(r"running_(mean|var)$|num_batches_tracked$", key)}
    # The part of the downstream network lists its parameters by their rates.
    assert official_parameters == set(inventory.get("parameter_order", inventory.get("finetune_lr_scale")))


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
@pytest.mark.parametrize("head", ["linear", "mlp", "probe"])
def test_there_and_back(norm, head):
    rng = np.random.default_rng(0)
    model = small_model(norm=norm, head=head)
    shapes = official_shapes(model)
    state = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    state |= {key: np.zeros((), np.int64) for key in shapes if key.endswith("num_batches_tracked")}
    state_dict_to_waffleiron({f"module.{key}": value for key, value in state.items()}, model)
    assert_same(waffleiron_to_state_dict(model), state)
    # Counters may be absent.
    other = small_model(1, norm=norm, head=head)
    state_dict_to_waffleiron({key: value for key, value in state.items() if value.shape}, other)
    assert_same(waffleiron_to_state_dict(other), state)


def test_a_backbone_goes_under_another_head():
    pretrained = waffleiron_to_state_dict(small_model(0))
    model = small_model(1, head="probe", output_channels=3)
    head = {key: value for key, value in waffleiron_to_state_dict(model).items() if key.startswith("classif.")}
    state_dict_to_waffleiron(pretrained, model, with_head=False)
    backbone = {key: value for key, value in pretrained.items() if not key.startswith("classif.")}
    assert_same(waffleiron_to_state_dict(model), backbone | head)
    with pytest.raises(ValueError, match=r"(?s)missing: classif\.0\.bias.*unknown: classif\.bias"):
        state_dict_to_waffleiron(pretrained, model)


def test_everything_that_does_not_fit_is_listed():
    model = small_model()
    before = waffleiron_to_state_dict(model)
    state = dict(before)
    del state["embed.conv2.0.running_var"]
    state["waffleiron.channel_mix.7.norm.bias"] = np.zeros(4, np.float32)
    state["classif.weight"] = np.zeros((6, 5, 1), np.float32)
    state["embed.final.bias"] = np.full(4, np.nan, np.float32)
    state["embed.conv1.bias"] = np.zeros(4, np.int32)
    state["module.embed.norm.bias"] = np.zeros(5, np.float32)
    with pytest.raises(ValueError, match="does not fit this WaffleIron") as error:
        state_dict_to_waffleiron(state, model)
    for line in (
        "(6 problems; check config.model)",
        "missing: embed.conv2.0.running_var",
        "unknown: waffleiron.channel_mix.7.norm.bias",
        "shape of classif.weight: (6, 5, 1), the model needs (6, 4, 1)",
        "not finite: embed.final.bias",
        "type of embed.conv1.bias: int32, needed are floating point numbers",
        "twice, with and without module.: embed.norm.bias",
    ):
        assert line in str(error.value)
    assert_same(waffleiron_to_state_dict(model), before)


def test_a_file_of_another_network_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    state = waffleiron_to_state_dict(small_model(0))
    write_state_dict(path, state)
    model = small_model(1)
    load_waffleiron(path, model)
    assert_same(waffleiron_to_state_dict(model), state)
    with pytest.raises(ValueError, match=r"weights\.safetensors: the state dict does not fit"):
        load_waffleiron(path, small_model(1, depth=3))


@pytest.mark.parametrize("container", ["model_point", "model_points", "net"])
def test_official_checkpoints(tmp_path, container):
    """As the official loops write them: of a wrapped module, beside optimiser, epoch and configuration."""
    torch = pytest.importorskip("torch")
    expected = waffleiron_to_state_dict(small_model(0))
    tensors = {f"module.{key}": torch.from_numpy(np.array(value)) for key, value in expected.items()}
    path = tmp_path / "ckpt_last.pth"
    torch.save({container: tensors, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 3}, path)
    model = small_model(1)
    load_waffleiron(path, model)
    assert_same(waffleiron_to_state_dict(model), expected)

"""Conversion of official state dicts: whole inventories both ways, and strictness."""

import json

import numpy as np
import pytest
from flax import nnx

from pop3d_jax.models.pop3d import Pop3D, Pop3DConfig
from pop3d_jax.official_weights import computed_buffers, model_to_state_dict, official_shapes, state_dict_to_model
from pop3d_jax.verification.golden_model import config_from_official, reference_state, reference_weights, tiny_model


@pytest.fixture(scope="module")
def official(golden_file):
    return json.loads(golden_file("pop3d/tiny_config.json").read_text())


@pytest.fixture(scope="module")
def model(golden_file):
    return tiny_model(golden_file)


def _abstract(config: Pop3DConfig) -> Pop3D:
    return nnx.eval_shape(lambda: Pop3D(config, rngs=nnx.Rngs(0)))


@pytest.mark.golden
def test_tiny_state_dict_survives_both_ways(official, model, golden_file):
    expected = reference_state(reference_weights(golden_file), official["state_dict"], computed_buffers(model))
    state = model_to_state_dict(model)
    assert set(state) == set(expected)
    for key, value in expected.items():
        assert state[key].dtype == value.dtype, key
        np.testing.assert_array_equal(state[key], value, err_msg=key)


@pytest.mark.golden
@pytest.mark.slow
def test_full_inventory_converts_both_ways(golden_file):
    inventory = json.loads(golden_file("pop3d/full_state_dict_inventory.json").read_text())
    model = _abstract(Pop3DConfig())
    assert official_shapes(model) == {key: tuple(shape) for key, shape in inventory}
    # Values that differ at every place of every array, so that a swapped axis cannot hide.
    buffers = computed_buffers(model)
    state = {}
    for i, (key, shape) in enumerate(inventory):
        if key.endswith("num_batches_tracked"):
            state[key] = np.zeros((), np.int64)
        else:
            state[key] = buffers.get(key, (np.arange(np.prod(shape)) % 65521 + i).astype(np.float32).reshape(shape))
    state_dict_to_model({f"module.{key}": value for key, value in state.items()}, model)
    back = model_to_state_dict(model)
    assert set(back) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.golden
def test_all_problems_are_listed_and_nothing_is_loaded(official, model):
    state = model_to_state_dict(model)
    before = np.asarray(model.heads.occupancy.classifier.bias[...])
    state["tpv_aggregator.classifier.bias"] = before + 1.0
    del state["img_backbone.conv1.weight"]
    state["img_neck.extra"] = np.zeros(3)
    state["tpv_head.level_embeds"] = state["tpv_head.level_embeds"].T
    state["tpv_head.encoder.ref_3d_zh"] = state["tpv_head.encoder.ref_3d_zh"] * 2
    state["img_backbone.bn1.weight"] = np.full_like(state["img_backbone.bn1.weight"], np.nan)
    with pytest.raises(ValueError, match="5 problems") as error:
        state_dict_to_model(state, model)
    for part in (
        "missing: img_backbone.conv1.weight",
        "unknown: img_neck.extra",
        "shape of tpv_head.level_embeds",
        "tpv_head.encoder.ref_3d_zh differs",
        "img_backbone.bn1.weight is not finite",
    ):
        assert part in str(error.value)
    np.testing.assert_array_equal(model.heads.occupancy.classifier.bias[...], before)


@pytest.mark.golden
def test_another_grid_is_noticed(official, model):
    config = config_from_official(official)
    x, y, z = config.grid_size
    other = _abstract(Pop3DConfig(**{**vars(config), "grid_size": (x, y, z + 1)}))
    with pytest.raises(ValueError, match="tpv_embedding_zh"):
        state_dict_to_model(model_to_state_dict(model), other)

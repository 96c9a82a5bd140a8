"""Starting from a detector's backbone, in files named as mmdetection3d and its users name them."""

import numpy as np
import pytest
from flax import nnx

from pop3d_jax.data.records import RecordSource
from pop3d_jax.experiment import build_student, example_settings, make_student
from pop3d_jax.models.parameters import merge_model
from pop3d_jax.models.pop3d import Pop3D
from pop3d_jax.official_weights import model_to_state_dict, official_shapes
from pop3d_jax.pretrained import load_backbone
from pop3d_jax.torch_files import write_state_dict


@pytest.fixture
def student_config(small_config):
    small_config.calibrate_batch_norm = False
    return small_config


@pytest.fixture
def model(student_config):
    return Pop3D(make_student(student_config).config, rngs=nnx.Rngs(3))


def detector(model, prefix=""):
    """What the detector's file would hold: its backbone, a longer pyramid, a head that is nobody's here."""
    rng = np.random.default_rng(0)
    state = {}
    for key, shape in official_shapes(model).items():
        if key.startswith(("img_backbone.", "img_neck.")):
            name = key.replace("img_", prefix, 1)
            counter = key.endswith("num_batches_tracked")
            state[name] = np.array(5) if counter else rng.uniform(0.5, 1.0, shape).astype(np.float32)
    levels = sorted(key for key in state if "fpn_convs" in key and key.endswith("weight"))
    state[levels[0].replace("fpn_convs.0", "fpn_convs.4")] = state[levels[0]]
    state["bbox_head.conv_cls.weight"] = np.ones((3, 3), np.float32)
    return state


@pytest.mark.parametrize("prefix", ["", "img_"])
def test_backbone_and_neck_are_taken_and_the_rest_stays(model, prefix):
    before, file = model_to_state_dict(model), detector(model, prefix)
    report = load_backbone(file, model)
    after = model_to_state_dict(model)
    for key, value in after.items():
        if key.endswith("num_batches_tracked"):
            continue
        part = key.startswith(("img_backbone.", "img_neck."))
        np.testing.assert_array_equal(value, file[key.replace("img_", prefix, 1)] if part else before[key], err_msg=key)
    assert report["initial"] == []
    assert sorted(report["unused"]) == ["bbox_head.conv_cls.weight", f"{prefix}neck.fpn_convs.4.conv.weight"]


def test_a_neck_of_fewer_levels_leaves_ours_as_they_are(model):
    file = {key: value for key, value in detector(model).items() if "fpn_convs.3" not in key}
    before = model_to_state_dict(model)
    report = load_backbone(file, model)
    assert set(report["initial"]) == {"img_neck.fpn_convs.3.conv.bias", "img_neck.fpn_convs.3.conv.weight"}
    key = "img_neck.fpn_convs.3.conv.weight"
    np.testing.assert_array_equal(model_to_state_dict(model)[key], before[key])


def test_another_backbone_is_refused_with_all_its_problems(model):
    file = detector(model)
    file["backbone.layer3.99.conv1.weight"] = np.ones(1, np.float32)
    file["backbone.conv1.weight"] = file["backbone.conv1.weight"][:1]
    del file["backbone.layer1.0.conv1.weight"]
    before = model_to_state_dict(model)
    with pytest.raises(ValueError, match="3 problems") as error:
        load_backbone(file, model)
    for part in (
        "unknown: backbone.layer3.99.conv1.weight",
        "shape of backbone.conv1.weight",
        "missing: img_backbone.layer1.0.conv1.weight",
    ):
        assert part in str(error.value)
    np.testing.assert_array_equal(
        model_to_state_dict(model)["img_backbone.conv1.weight"], before["img_backbone.conv1.weight"]
    )


@pytest.mark.slow
def test_a_training_starts_from_the_files(model, student_config, small_records, tmp_path):
    source = RecordSource(small_records, "train")
    settings = example_settings(student_config, training=True)

    def start():
        parameters, statistics = build_student(student_config, source, settings)
        return model_to_state_dict(merge_model(make_student(student_config).graph, parameters, statistics))

    drawn = start()
    write_state_dict(tmp_path / "detector.safetensors", detector(model))
    student_config.initial_backbone = str(tmp_path / "detector.safetensors")
    started = start()
    np.testing.assert_array_equal(started["img_backbone.conv1.weight"], detector(model)["backbone.conv1.weight"])
    np.testing.assert_array_equal(started["tpv_head.level_embeds"], drawn["tpv_head.level_embeds"])

    write_state_dict(tmp_path / "whole.safetensors", model_to_state_dict(model))
    student_config.initial_weights = str(tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match="not both"):
        start()
    student_config.initial_backbone = ""
    whole = start()
    for key, value in model_to_state_dict(model).items():
        np.testing.assert_array_equal(whole[key], value, err_msg=key)
    student_config.calibrate_batch_norm = True
    with pytest.raises(ValueError, match="calibrate_batch_norm would overwrite"):
        start()

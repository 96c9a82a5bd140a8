import dataclasses
import importlib

import ml_collections
import numpy as np
import pytest

from pop3d_jax.grids.selection import Selection, configured_selection, select
from pop3d_jax.inference import Prediction


def configured(**fields):
    return ml_collections.ConfigDict({"model": {"feature_dim": 512}, "export": fields})


def test_selection_keeps_the_most_probable():
    generator = np.random.default_rng(0)
    prediction = Prediction(generator.random((4, 3, 2)).astype(np.float32), generator.normal(size=(4, 3, 2, 5)))
    coordinates, occupancy, features = select(prediction, Selection(threshold=0.3, top_k=6))
    assert len(coordinates) == 6
    assert occupancy.min() == np.sort(prediction.occupancy, axis=None)[-6]
    np.testing.assert_array_equal(features, prediction.features[tuple(coordinates.T)])
    coordinates, occupancy, _ = select(prediction, Selection(threshold=0.3))
    assert len(coordinates) == np.sum(prediction.occupancy > 0.3)
    assert len(select(prediction, Selection(threshold=0.0))[0]) == 24


@pytest.mark.parametrize("name", ["pop3d_nuscenes", "demo", "keyframe"])
def test_every_experiment_has_the_section_and_runs_without_it_get_the_same(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert config.export.to_dict() == dataclasses.asdict(Selection())
    assert configured_selection(config) == Selection()
    with config.unlocked():
        del config.export
    assert configured_selection(config) == Selection()


def test_the_configuration_says_what_is_stored_unless_told_otherwise():
    config = configured(threshold=0.3, top_k=7, precision="float16", pq_bytes=0)
    assert configured_selection(config) == Selection(0.3, 7, "float16")
    assert configured_selection(config, threshold=0.0, top_k=0) == Selection(0.0, 0, "float16")
    assert configured_selection(config, precision="pq", pq_bytes=4) == Selection(0.3, 7, "pq", 4)


def test_bytes_of_a_code_count_only_where_codes_are_stored():
    coded = configured(precision="pq", pq_bytes=4)
    assert configured_selection(coded).pq_bytes == 4
    assert configured_selection(coded, pq_bytes=16).pq_bytes == 16
    assert configured_selection(coded, precision="int8") == Selection()
    assert configured_selection(configured(precision="pq")).pq_bytes == 32  # a 32nd of 512 float16 numbers
    small = configured(precision="pq")
    small.model.feature_dim = 64
    assert configured_selection(small).pq_bytes == 8


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"threshold": 1.5}, r"--threshold=1.5 \(or config.export.threshold\) must be at least 0 and below 1"),
        ({"top_k": -1}, r"config.export.top_k\) must be at least 1, or 0"),
        ({"precision": "int4"}, r"config.export.precision\) must be one of float16, int8, pq"),
        ({"top": 3}, r"unknown fields of config.export: \['top'\]"),
    ],
)
def test_what_cannot_be_is_named(fields, words):
    with pytest.raises(ValueError, match=words):
        configured_selection(configured(**fields))


def test_bytes_of_a_code_belong_to_codes():
    with pytest.raises(ValueError, match=r"--pq_bytes=4 .* belongs to --precision=pq"):
        configured_selection(configured(), pq_bytes=4)

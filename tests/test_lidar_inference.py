"""A lidar network restored from a small run, asked about key frames."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from pop3d_jax.checkpoint import CheckpointError
from pop3d_jax.data.records import RecordSource
from pop3d_jax.inference import Predictor
from pop3d_jax.lidar_datasets import NUSCENES
from pop3d_jax.lidar_inference import LidarPredictor
from pop3d_jax.workdir import WorkdirError


@pytest.fixture(scope="module")
def predictor(small_distillation_run):
    return LidarPredictor(small_distillation_run)


@pytest.fixture(scope="module")
def key_frame(small_records):
    return RecordSource(small_records, "val")[0]


def _changed(run, tmp_path, **fields):
    """The run with other fields in its configuration, by their place."""
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for name, values in fields.items():
        config[name] = config[name] | values if isinstance(values, dict) else values
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    return tmp_path / "run"


def test_every_point_of_the_sweep_has_features(predictor, key_frame):
    features = predictor(key_frame, NUSCENES)
    assert features.shape == (len(key_frame.points), 16)
    assert np.isfinite(features).all()
    assert features.std(axis=0).min() > 0
    assert predictor.step == 2


def test_neither_images_nor_labels_are_looked_at(predictor, key_frame):
    bare = dataclasses.replace(key_frame, images=[], lidarseg=np.zeros(0, np.uint8))
    np.testing.assert_array_equal(predictor(bare, NUSCENES), predictor(key_frame, NUSCENES))


def test_no_point_is_left_out_where_the_sweep_is_larger_than_the_arrays(
    small_distillation_run, predictor, key_frame, tmp_path
):
    assert predictor.config.points.capacity == 1024  # fewer than the sweep's voxels
    roomy = LidarPredictor(_changed(small_distillation_run, tmp_path, points={"capacity": 8192}))
    np.testing.assert_allclose(predictor(key_frame, NUSCENES), roomy(key_frame, NUSCENES), rtol=1e-4, atol=1e-5)


def test_a_sweep_far_from_the_field_of_view_is_named(predictor, key_frame):
    away = dataclasses.replace(key_frame, points=key_frame.points + np.float32([1000, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match=f"sample {key_frame.sample_token} has no point in the field of view"):
        predictor(away, NUSCENES)


def test_runs_that_cannot_answer_are_refused(small_run, small_distillation_run, tmp_path):
    with pytest.raises(ValueError, match=r"task 'occupancy', which has no lidar network: .* without --lidar"):
        LidarPredictor(small_run)
    with pytest.raises(ValueError, match="task 'distillation', a lidar network: query it with --lidar"):
        Predictor(small_distillation_run)
    with pytest.raises(WorkdirError, match=r"config\.json does not exist"):
        LidarPredictor(tmp_path)
    with pytest.raises(CheckpointError):
        LidarPredictor(small_distillation_run, step=7)
    other = _changed(small_distillation_run, tmp_path, model={"channels": 24})
    with pytest.raises(CheckpointError):
        LidarPredictor(other)

"""Key frames with corrupted sweeps: what changes, what stays, and what the draws depend on."""

import dataclasses
import pickle

import numpy as np
import pytest

from pop3d_jax.corruptions import CORRUPTIONS, SEVERITIES
from pop3d_jax.data.corrupted_key_frames import CorruptedKeyFrames
from pop3d_jax.data.lidar_examples import point_classes
from pop3d_jax.data.lidar_pipeline import KeyFrames
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.lidar_datasets import LIDAR_DATASETS, PANDAR64
from tests.data.lidar_frames import noise_frame

_CHANGED = ("points", "lidarseg")


@pytest.fixture(params=["nuscenes", "semantic_kitti", "pandar64", "pandar_gt"])
def source(request):
    name = "small" if request.param == "nuscenes" else request.param
    return RecordSource(request.getfixturevalue(f"{name}_records"), "val")


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_sweep_and_its_labels_change_in_step(source, corruption):
    dataset = LIDAR_DATASETS[source.dataset]
    corrupted = CorruptedKeyFrames(source, dataset, corruption, 3)
    assert isinstance(corrupted, KeyFrames)
    assert len(corrupted) == len(source)
    before, after = source[0], corrupted[0]
    for field in dataclasses.fields(before):
        if field.name not in _CHANGED:
            np.testing.assert_array_equal(getattr(after, field.name), getattr(before, field.name))
    assert after.points.dtype == np.float32
    assert 0 < len(after.points) == len(after.lidarseg) <= len(before.points)
    assert len(after.points) < len(before.points) or not np.allclose(after.points, before.points, atol=1e-3)
    # Labels are raw categories still, and no point gets a class that the sweep had not.
    found, known = (set(point_classes(key_frame, dataset).tolist()) for key_frame in (after, before))
    assert found <= known | {255}
    assert np.max(after.points[:, 3]) <= dataset.max_intensity


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_draws_depend_on_seed_corruption_and_token_alone(source, corruption):
    dataset = LIDAR_DATASETS[source.dataset]
    expected = CorruptedKeyFrames(source, dataset, corruption, 2)[1]

    class Reversed:
        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            return source[len(source) - 1 - index]

    again = CorruptedKeyFrames(Reversed(), dataset, corruption, 2)[len(source) - 2]
    np.testing.assert_array_equal(again.points, expected.points)
    np.testing.assert_array_equal(again.lidarseg, expected.lidarseg)


@pytest.mark.parametrize("corruption", ["motion_blur", "crosstalk", "beam_missing"])
def test_another_seed_or_token_draws_otherwise(corruption):
    frame = noise_frame(0, dataset=LIDAR_DATASETS["nuscenes"])
    beams = np.arange(len(frame.points)) % 32
    frame = dataclasses.replace(frame, points=np.column_stack([frame.points[:, :4], beams]).astype(np.float32))
    frames = [frame, dataclasses.replace(frame, sample_token="other")]
    nuscenes = LIDAR_DATASETS["nuscenes"]
    expected = CorruptedKeyFrames(frames, nuscenes, corruption, 2)[0].points
    others = (
        CorruptedKeyFrames(frames, nuscenes, corruption, 2, seed=1)[0],
        CorruptedKeyFrames(frames, nuscenes, corruption, 2)[1],
    )
    for other in others:
        assert other.points.shape != expected.shape or not np.array_equal(other.points, expected)


def test_a_heavier_corruption_takes_what_a_lighter_one_takes(source):
    left = []
    for severity in SEVERITIES:
        frame = CorruptedKeyFrames(source, LIDAR_DATASETS[source.dataset], "beam_missing", severity)[0]
        left.append({tuple(row) for row in frame.points})
    assert left[2] < left[1] < left[0]


def test_rays_begin_where_the_network_has_the_lidar():
    # A road 1.6 m below: with the record's own z it would be at the height of the lidar, where no ray meets it.
    rng = np.random.default_rng(0)
    xy = rng.uniform(-30, 30, (2000, 2))
    points = np.column_stack([xy, np.zeros(2000), rng.uniform(20, 60, 2000), np.full(2000, -1)])
    frame = dataclasses.replace(
        noise_frame(0), points=points.astype(np.float32), lidarseg=np.full(2000, 7, np.uint8), sample_token="road"
    )
    foggy = CorruptedKeyFrames([frame], PANDAR64, "fog", 3)[0]
    moved = np.flatnonzero(foggy.lidarseg != 7)
    assert len(moved) > 20
    lidar = np.array([0, 0, 1.6])
    before, after = frame.points[moved, :3] - lidar, foggy.points[moved, :3] - lidar
    cosine = np.sum(before * after, 1) / (np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1))
    np.testing.assert_allclose(cosine, 1.0, atol=1e-5)
    assert np.all(foggy.points[moved, 2] > 0)


def test_workers_can_take_it_along(source):
    corrupted = CorruptedKeyFrames(source, LIDAR_DATASETS[source.dataset], "crosstalk", 1)
    expected = corrupted[0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(corrupted))[0].points, expected.points)


def test_a_sweep_without_labels_is_named():
    frame = dataclasses.replace(noise_frame(5), lidarseg=np.zeros(0, np.uint8))
    with pytest.raises(RecordError, match="sample sample5 of nuscenes: fog: 400 points and 0 labels"):
        CorruptedKeyFrames([frame], LIDAR_DATASETS["nuscenes"], "fog", 1)[0]

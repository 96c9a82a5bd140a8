"""Batches of lidar clouds: functions of (seed, step) for any hosts and workers, and mixtures with their shares."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lidar_frames import DATASET, noise_frame

from pop3d_jax.data.lidar_examples import LidarSettings, make_distillation_example, make_segmentation_example
from pop3d_jax.data.lidar_pipeline import LidarSource, evaluation_batches, mixture_shares, training_batches
from pop3d_jax.data.records import RecordSource
from pop3d_jax.lidar_datasets import NUSCENES

SETTINGS = LidarSettings(
    capacity=64,
    raw_capacity=64,
    max_points=30,
    voxel_size=0.5,
    field_of_view=((-9.0, -9.0, -4.0), (9.0, 9.0, 4.0)),
    grid_shapes=((8, 8), (8, 4), (8, 4)),
    neighbors=4,
    image_hw=(8, 12),
)
OTHER = dataclasses.replace(DATASET, name="other", intensity_mean=-1000.0)


class Frames:
    """Key frames that are made when they are asked for."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return noise_frame(index, points=60)


def mixture(*weights):
    """Five, nine and four key frames of three data sets."""
    datasets = (DATASET, OTHER, dataclasses.replace(DATASET, name="third"))
    frames = (Frames(5), Frames(9), Frames(4))
    parts = zip(frames, datasets, weights, strict=False)
    return [LidarSource(keys, dataset, weight) for keys, dataset, weight in parts]


def first(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def drawn(sources, count, *, seed=0, batch_size=6):
    """(dataset_index, record_index) of the first examples."""
    batches = first(
        training_batches(sources, make_segmentation_example, SETTINGS, batch_size=batch_size, seed=seed),
        count // batch_size,
    )
    pairs = [np.stack([batch["dataset_index"], batch["record_index"]], 1) for batch in batches]
    return [tuple(pair) for pair in np.concatenate(pairs).tolist()]


UNION = [(dataset, record) for dataset, count in enumerate((5, 9, 4)) for record in range(count)]


def test_equal_weights_are_a_shuffle_of_the_union():
    order = drawn(mixture(1.0, 1.0, 1.0), 36)
    assert sorted(order[:18]) == sorted(order[18:]) == UNION
    assert order[:18] != order[18:]
    assert drawn(mixture(0.5, 0.5, 0.5), 36) == order  # only their ratios count
    assert drawn(mixture(1.0, 1.0, 1.0), 36, seed=1) != order
    # Mixed, not one data set after the other.
    assert len({dataset for dataset, _ in order[:6]}) > 1


def test_weights_multiply_how_often_a_record_comes():
    sources = mixture(1.0, 2.0, 0.5)
    np.testing.assert_allclose(mixture_shares(sources), [5 / 25, 18 / 25, 2 / 25])
    order = drawn(sources, 300)
    counts = np.bincount([dataset for dataset, _ in order])
    np.testing.assert_allclose(counts / 300, mixture_shares(sources), atol=0.01)
    for dataset, size in enumerate((5, 9, 4)):
        records = [record for other, record in order if other == dataset]
        epochs = [records[start : start + size] for start in range(0, len(records) - size + 1, size)]
        assert len(epochs) >= 5
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1
    # Spread over the training: every 25 examples hold their shares.
    for start in range(0, 300, 25):
        part = np.bincount([dataset for dataset, _ in order[start : start + 25]], minlength=3)
        assert np.abs(part - [5, 18, 2]).max() <= 1


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 3.0, 0.7)])
@pytest.mark.parametrize("make_example", [make_distillation_example, make_segmentation_example])
def test_resuming_and_hosts_give_the_batches_of_an_unbroken_run(weights, make_example):
    def batches(**changes):
        options = {"batch_size": 4, "seed": 5} | changes
        return training_batches(mixture(*weights), make_example, SETTINGS, **options)

    unbroken = first(batches(), 6)
    for start in (1, 5):
        (resumed,) = first(batches(start_step=start), 1)
        assert_equal(resumed, unbroken[start])
    for host in range(2):
        for part, whole in zip(first(batches(host=host, hosts=2), 3), unbroken, strict=False):
            assert_equal(part, {name: array[host::2] for name, array in whole.items()})


_RESTARTED = """
import hashlib, itertools, sys
import numpy as np
from test_lidar_pipeline import SETTINGS, mixture
from pop3d_jax.data.lidar_examples import make_distillation_example
from pop3d_jax.data.lidar_pipeline import training_batches

if __name__ == "__main__":
    batches = training_batches(
        mixture(1.0, 2.0), make_distillation_example, SETTINGS, batch_size=2, seed=7, start_step=3,
        workers=int(sys.argv[1])
    )
    for batch in itertools.islice(batches, 3):
        digest = hashlib.sha256()
        for name in sorted(batch):
            digest.update(name.encode() + np.ascontiguousarray(batch[name]).tobytes())
        print(digest.hexdigest(), flush=True)
    assert "tensorflow" not in sys.modules
"""


@pytest.mark.slow
def test_a_restart_with_any_number_of_workers_gives_the_same_batches(tmp_path):
    script = tmp_path / "restarted.py"
    script.write_text(_RESTARTED)
    digests = []
    for workers in (0, 2):
        finished = subprocess.run(
            [sys.executable, script, str(workers)],
            capture_output=True,
            text=True,
            check=False,
            env={"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path]), "JAX_PLATFORMS": "cpu"},
        )
        assert finished.returncode == 0, finished.stderr
        digests.append(finished.stdout.split())
    assert len(set(digests[0])) == 3
    assert digests[0] == digests[1]


def test_each_data_set_has_its_own_normalisation():
    (batch,) = first(training_batches(mixture(1.0, 1.0), make_segmentation_example, SETTINGS, batch_size=14, seed=0), 1)
    high = np.array([example[mask, 0].min() > 100 for example, mask in zip(
        batch["point_features"], batch["point_mask"], strict=True)])  # fmt: skip
    np.testing.assert_array_equal(high, batch["dataset_index"] == 1)


def test_a_subset_of_the_records_trains_and_keeps_their_numbers():
    source = LidarSource(Frames(9), DATASET, records=np.array([2, 3, 7]))
    batches = training_batches([source], make_segmentation_example, SETTINGS, batch_size=3, seed=0)
    for batch in first(batches, 3):
        assert sorted(batch["record_index"].tolist()) == [2, 3, 7]
        assert not batch["points_left_out"].any()


def test_evaluation_reads_every_record_once_and_marks_the_filling():
    source = LidarSource(Frames(5), DATASET)
    for hosts in (1, 3):
        parts = [
            list(evaluation_batches(source, SETTINGS, batch_size=3, host=host, hosts=hosts)) for host in range(hosts)
        ]
        batches = [batch for part in parts for batch in part]
        index = np.concatenate([batch["record_index"] for batch in batches])
        valid = np.concatenate([batch["valid"] for batch in batches])
        assert len(index) == 6
        assert sorted(index[valid].tolist()) == list(range(5))
    expected = make_segmentation_example(noise_frame(1, points=60), DATASET, SETTINGS, None)
    (batch,) = first(evaluation_batches(source, SETTINGS, batch_size=3), 1)
    assert_equal({name: batch[name][1] for name in expected}, expected)


def test_what_cannot_be_mixed_is_named():
    with pytest.raises(ValueError, match=r"data set other has weight 0.0: leave it out"):
        LidarSource(Frames(3), OTHER, 0.0)
    empty = [LidarSource(Frames(2), DATASET), LidarSource(Frames(0), OTHER)]
    for sources, named in ((empty, "other"), ([], "any data set")):
        with pytest.raises(ValueError, match=f"no records of {named}"):
            training_batches(sources, make_segmentation_example, SETTINGS, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="does not divide among 2 hosts"):
        training_batches(mixture(1.0), make_segmentation_example, SETTINGS, batch_size=3, seed=0, hosts=2)


def test_records_of_nuscenes_layout_are_distilled_and_segmented(small_records):
    source = LidarSource(RecordSource(small_records, "train"), NUSCENES)
    settings = LidarSettings(capacity=4_000, raw_capacity=40_000)
    (seen,) = first(training_batches([source], make_distillation_example, settings, batch_size=2, seed=0), 1)
    assert seen["images"].shape == (2, 1, *settings.image_hw, 3)
    assert (seen["feature_mask"].sum(1) > 100).all()
    assert ((seen["feature_pixels"] >= 0) & (seen["feature_pixels"] < 1)).all()
    (batch,) = first(evaluation_batches(source, settings, batch_size=2), 1)
    assert not batch["raw_points_left_out"].any()
    for labels, mask in zip(batch["raw_labels"], batch["raw_mask"], strict=True):
        scored = labels[mask][labels[mask] != 255]
        assert len(set(scored.tolist())) > 2
        assert scored.max() < len(NUSCENES.class_names)

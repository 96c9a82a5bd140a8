"""Segmentation evaluated as the command does: clean and corrupted sweeps, other data sets, baselines, errors."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pop3d_jax import evaluate_segmentation as command
from pop3d_jax.commands import write_report
from pop3d_jax.data.records import RecordSource, encode_record
from pop3d_jax.evaluate_segmentation import evaluate_segmentation, format_table
from pop3d_jax.lidar_datasets import LIDAR_DATASETS, NUSCENES, LidarDataset
from pop3d_jax.segmentation_evaluator import CapacityError
from pop3d_jax.workdir import WorkdirError

_CORRUPTIONS = ("snow", "crosstalk")


@pytest.fixture(scope="module")
def report(small_lidar_run):
    return evaluate_segmentation(small_lidar_run, corruptions=_CORRUPTIONS, severities=(1, 3))


@pytest.fixture(scope="module")
def results(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "results.json"
    write_report(report, str(path))
    return path


@pytest.fixture
def edited_run(small_lidar_run, tmp_path):
    """A copy of the run with other fields in its configuration."""

    def edit(change):
        shutil.copytree(small_lidar_run, tmp_path / "run")
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        change(config)
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        return tmp_path / "run"

    return edit


@pytest.fixture
def edited_results(report, tmp_path):
    """A results file with other values."""

    def edit(change):
        other = json.loads(json.dumps(report))
        change(other)
        (tmp_path / "other.json").write_text(json.dumps(other))
        return tmp_path / "other.json"

    return edit


def test_every_labelled_point_is_counted_once(report, small_records):
    source = RecordSource(small_records, "val")
    assert report["frames"] == len(source)
    counted = sum(int(np.sum(NUSCENES.raw_to_class[frame.lidarseg] != 255)) for frame in source)
    confusion = np.array(report["confusion"])
    assert confusion.sum() == counted
    assert report["step"] == 3
    assert (report["dataset"], report["split"], report["trained_on"]) == ("nuscenes", "val", ["nuscenes"])
    np.testing.assert_allclose(report["accuracy"], 100 * np.trace(confusion) / counted)
    car = NUSCENES.class_names.index("car")
    union = confusion[car].sum() + confusion[:, car].sum() - confusion[car, car]
    np.testing.assert_allclose(report["per_class"]["car"], 100 * confusion[car, car] / union)
    known = [value for value in report["per_class"].values() if value is not None]
    np.testing.assert_allclose(report["mean_iou"], np.mean(known))
    assert json.loads(json.dumps(report)) == report


def test_corrupted_sweeps_are_judged_and_stay_the_same(report, small_lidar_run):
    assert list(report["corruptions"]) == list(_CORRUPTIONS)
    scores = {name: list(of_severities) for name, of_severities in report["corruptions"].items()}
    assert scores == {"snow": ["1", "3"], "crosstalk": ["1", "3"]}
    heavy = report["corruptions"]["snow"]["3"]
    assert heavy["accuracy"] != report["accuracy"]
    again = evaluate_segmentation(small_lidar_run, corruptions=("snow",), severities=(3,))
    assert again["corruptions"]["snow"]["3"] == heavy
    assert again["mean_iou"] == report["mean_iou"]
    other = evaluate_segmentation(small_lidar_run, corruptions=("snow",), severities=(3,), seed=1)
    assert other["corruptions"]["snow"]["3"] != heavy


def test_without_a_baseline_there_is_resilience_alone(report):
    robustness = report["robustness"]
    assert (robustness["baseline"], robustness["mean_corruption_error"]) == (None, None)
    assert robustness["corruption_error"] == {}
    for name, rate in robustness["resilience_rate"].items():
        scores = [report["corruptions"][name][severity]["mean_iou"] for severity in ("1", "3")]
        np.testing.assert_allclose(rate, 100 * np.mean(scores) / report["mean_iou"])
    np.testing.assert_allclose(robustness["mean_resilience_rate"], np.mean(list(robustness["resilience_rate"].values())))


def test_the_run_as_its_own_baseline_has_100_percent(small_lidar_run, results):
    own = evaluate_segmentation(small_lidar_run, corruptions=("crosstalk",), severities=(3,), baseline=results)
    np.testing.assert_allclose(own["robustness"]["mean_corruption_error"], 100.0)
    assert own["robustness"]["baseline"] == str(results)


def test_errors_are_relative_to_the_baseline(small_lidar_run, edited_results):
    def halve(other):
        other["corruptions"]["crosstalk"]["3"]["mean_iou"] = 50.0

    path = edited_results(halve)
    found = evaluate_segmentation(small_lidar_run, corruptions=("crosstalk",), severities=(3,), baseline=path)
    expected = 100 * (100 - found["corruptions"]["crosstalk"]["3"]["mean_iou"]) / 50
    np.testing.assert_allclose(found["robustness"]["corruption_error"]["crosstalk"], expected)


def test_the_table_shows_what_the_report_holds(report):
    table = format_table(report)
    assert f"{'mIoU':<24}{report['mean_iou']:>12.2f}" in table
    assert f"{report['corruptions']['snow']['3']['mean_iou']:.2f}" in table
    assert f"{report['robustness']['mean_resilience_rate']:.2f}" in table
    assert "CE needs --baseline" in table
    assert all(name in table for name in NUSCENES.class_names)
    assert max(len(line) for line in table.splitlines()[1:]) <= 120

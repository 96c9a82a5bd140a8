"""Segmentation evaluated as the command does: clean and corrupted sweeps, other data sets, baselines, errors."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pop3d_jax.checkpoint import CheckpointError, Checkpoints
from pop3d_jax.commands import write_report
from pop3d_jax.corruptions import CORRUPTIONS
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.evaluate_segmentation import evaluate_segmentation, format_table, parse_corruptions, parse_severities
from pop3d_jax.lidar_datasets import NUSCENES, PANDAR_GT
from pop3d_jax.lidar_experiment import build_lidar_student
from pop3d_jax.segmentation_evaluator import CapacityError
from pop3d_jax.workdir import WorkdirError, read_config

_CORRUPTIONS = ("snow", "crosstalk")


@pytest.fixture(scope="module")
def report(small_probe_run):
    return evaluate_segmentation(small_probe_run, corruptions=_CORRUPTIONS, severities=(1, 3))


@pytest.fixture(scope="module")
def results(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "results.json"
    write_report(report, str(path))
    return path


@pytest.fixture
def edited_run(small_probe_run, tmp_path):
    """A copy of the run with other fields in its configuration."""

    def edit(change):
        shutil.copytree(small_probe_run, tmp_path / "run")
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


def test_corrupted_sweeps_are_judged_and_stay_the_same(report, small_probe_run):
    assert list(report["corruptions"]) == list(_CORRUPTIONS)
    scores = {name: list(of_severities) for name, of_severities in report["corruptions"].items()}
    assert scores == {"snow": ["1", "3"], "crosstalk": ["1", "3"]}
    heavy = report["corruptions"]["snow"]["3"]
    assert heavy["accuracy"] != report["accuracy"]
    again = evaluate_segmentation(small_probe_run, corruptions=("snow",), severities=(3,))
    assert again["corruptions"]["snow"]["3"] == heavy
    assert again["mean_iou"] == report["mean_iou"]
    other = evaluate_segmentation(small_probe_run, corruptions=("snow",), severities=(3,), seed=1)
    assert other["corruptions"]["snow"]["3"] != heavy


def test_without_a_baseline_there_is_resilience_alone(report):
    robustness = report["robustness"]
    assert (robustness["baseline"], robustness["mean_corruption_error"]) == (None, None)
    assert robustness["corruption_error"] == {}
    for name, rate in robustness["resilience_rate"].items():
        scores = [report["corruptions"][name][severity]["mean_iou"] for severity in ("1", "3")]
        np.testing.assert_allclose(rate, 100 * np.mean(scores) / report["mean_iou"])
    np.testing.assert_allclose(
        robustness["mean_resilience_rate"], np.mean(list(robustness["resilience_rate"].values()))
    )


def test_the_run_as_its_own_baseline_has_100_percent(small_probe_run, results):
    own = evaluate_segmentation(small_probe_run, corruptions=("crosstalk",), severities=(3,), baseline=results)
    np.testing.assert_allclose(own["robustness"]["mean_corruption_error"], 100.0)
    assert own["robustness"]["baseline"] == str(results)


def test_errors_are_relative_to_the_baseline(small_probe_run, edited_results):
    def halve(other):
        other["corruptions"]["crosstalk"]["3"]["mean_iou"] = 50.0

    path = edited_results(halve)
    found = evaluate_segmentation(small_probe_run, corruptions=("crosstalk",), severities=(3,), baseline=path)
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


@pytest.fixture(scope="module")
def pandar64_run(small_probe_run, pandar64_records, pandar_gt_records, tmp_path_factory):
    """Workdir of an untrained network for the classes of PandaSet, as if trained on its spinning lidar."""
    folder = tmp_path_factory.mktemp("pandar64")
    config = read_config(small_probe_run)
    config.datasets = {"pandar64": 1.0}
    config.model.output_channels = len(PANDAR_GT.class_names)
    config.data.records = str(folder)
    config.points.field_of_view = ((-128.0, -128.0, -8.0), (128.0, 128.0, 8.0))
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(config.to_json())
    (folder / "pandar64").symlink_to(pandar64_records)
    (folder / "pandar_gt").symlink_to(pandar_gt_records)
    parameters, statistics = build_lidar_student(config)
    checkpoints = Checkpoints(folder / "run" / "checkpoints")
    checkpoints.save(7, {"parameters": parameters, "statistics": statistics}, {})
    checkpoints.close()
    return folder / "run"


def test_another_lidar_of_the_same_classes(pandar64_run, pandar_gt_records):
    found = evaluate_segmentation(
        pandar64_run, dataset="pandar_gt", corruptions=("beam_missing",), severities=(2,), batch_size=1
    )
    assert (found["dataset"], found["trained_on"], found["step"]) == ("pandar_gt", ["pandar64"], 7)
    confusion = np.array(found["confusion"])
    source = RecordSource(pandar_gt_records, "val")
    targets = np.concatenate([PANDAR_GT.raw_to_class[frame.lidarseg] for frame in source])
    np.testing.assert_array_equal(confusion.sum(1), np.bincount(targets[targets != 255], minlength=17))
    # The head starts from zero: every point is a road.
    road = np.mean(targets[targets != 255] == 0)
    np.testing.assert_allclose(found["accuracy"], 100 * road)
    np.testing.assert_allclose(found["per_class"]["road"], 100 * road)
    np.testing.assert_allclose(found["mean_accuracy"], 100 / np.sum(confusion.sum(1) > 0))
    assert "trained on pandar64" in format_table(found)


def test_other_classes_need_another_probe(small_probe_run):
    message = (
        "--dataset=semantic_kitti has other classes (19) than nuscenes (16), which RUN was trained on: probe on that "
        "data set, python -m pop3d_jax.train --config configs/scalr_probe.py:semantic_kitti "
        "--config.initial_weights=RUN"
    )
    with pytest.raises(ValueError, match=re.escape(message.replace("RUN", str(small_probe_run)))):
        evaluate_segmentation(small_probe_run, dataset="semantic_kitti")


def test_an_unknown_data_set_is_refused(small_probe_run):
    with pytest.raises(ValueError, match="--dataset=waymo: known data sets are nuscenes, pandar64, pandar_gt, sem"):
        evaluate_segmentation(small_probe_run, dataset="waymo")


def test_a_mixture_needs_a_name(edited_run):
    workdir = edited_run(lambda config: config.update(datasets={"pandar64": 1.0, "pandar_gt": 1.0}))
    with pytest.raises(ValueError, match="trained on pandar64, pandar_gt: name one of them with --dataset"):
        evaluate_segmentation(workdir)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({}, r"run of task 'occupancy', .* python -m pop3d_jax.evaluate --workdir"),
        (
            {"task": "distillation"},
            r"task 'distillation', .* configs/scalr_probe.py:nuscenes --config.initial_weights=",
        ),
    ],
)
def test_a_run_of_another_task_is_sent_to_its_command(edited_run, task, message):
    def change(config):
        del config["task"]  # runs of POP-3D may have none
        config.update(task)

    with pytest.raises(ValueError, match=message):
        evaluate_segmentation(edited_run(change))


def test_a_split_without_labels_is_refused(small_probe_run, monkeypatch):
    labelled = RecordSource.__getitem__

    def unlabelled(source, index):
        return dataclasses.replace(labelled(source, index), lidarseg=np.zeros(0, np.uint8))

    monkeypatch.setattr(RecordSource, "__getitem__", unlabelled)
    with pytest.raises(ValueError, match="--split=train: the sweeps of nuscenes have no labels there; give a split"):
        evaluate_segmentation(small_probe_run, split="train")


def test_what_is_not_there_is_named(small_probe_run, tmp_path):
    with pytest.raises(RecordError, match=r"no finished split 'test' \(it has: train, val\)"):
        evaluate_segmentation(small_probe_run, split="test")
    with pytest.raises(RecordError, match=f"no records folder {tmp_path}/nuscenes"):
        evaluate_segmentation(small_probe_run, records=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2; it has \[3\]"):
        evaluate_segmentation(small_probe_run, step=2)
    with pytest.raises(WorkdirError, match=r"config.json does not exist: --workdir"):
        evaluate_segmentation(tmp_path)


@pytest.mark.parametrize("field", ["capacity", "raw_capacity"])
def test_a_sweep_that_does_not_fit_names_the_file_to_change(edited_run, field):
    workdir = edited_run(lambda config: config["points"].update({field: 500}))
    with pytest.raises(CapacityError, match=rf"points more than config\.points\.{field} = 500: raise it.*config\.json"):
        evaluate_segmentation(workdir)


def test_a_baseline_needs_corruptions(small_probe_run, results):
    with pytest.raises(ValueError, match=r"--baseline=.* name some, such as --corruptions=all"):
        evaluate_segmentation(small_probe_run, baseline=results)


def _without(*path):
    def change(report):
        for key in path[:-1]:
            report = report[key]
        del report[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("corruptions", "snow"), r"has no snow 1, snow 3: evaluate it with --corruptions=snow,crosstalk"),
        (_without("corruptions", "snow", "3"), r"has no snow 3: evaluate it with .* --severities=1,3 too, or leave"),
        (_without("corruptions"), "has no snow 1, snow 3, crosstalk 1, crosstalk 3"),
        (lambda other: other.update(dataset="pandar64"), "else .dataset pandar64, here nuscenes.: give both the same"),
        (lambda other: other.update(split="train"), "something else .split train, here val."),
        (lambda other: other.update(records_fingerprint="0"), "something else .records_fingerprint 0, here "),
        (lambda other: other.update(seed=1), "something else .seed 1, here 0."),
        (_without("split"), "holds no results of this command .KeyError: 'split'"),
        (lambda other: other["corruptions"]["snow"]["1"].update(mean_iou=None), "holds no results .*TypeError"),
        (
            lambda other: [scores.update(mean_iou=100.0) for scores in other["corruptions"]["snow"].values()],
            "corruption snow: baseline .* is perfect",
        ),
    ],
)
def test_a_baseline_that_cannot_be_compared_is_refused(small_probe_run, edited_results, change, message):
    path = edited_results(change)
    with pytest.raises(ValueError, match=message) as error:
        evaluate_segmentation(small_probe_run, corruptions=_CORRUPTIONS, severities=(1, 3), baseline=path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_baseline_that_is_no_file_is_refused(small_probe_run, tmp_path):
    arguments = {"corruptions": ("fog",), "baseline": tmp_path / "none.json"}
    with pytest.raises(ValueError, match=r"--baseline=.*none.json does not exist: name a file"):
        evaluate_segmentation(small_probe_run, **arguments)
    (tmp_path / "none.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"--baseline=.*none.json holds no results of this command"):
        evaluate_segmentation(small_probe_run, **arguments)


def test_words_of_the_flags():
    assert parse_corruptions(None) == ()
    assert parse_corruptions(["all"]) == tuple(CORRUPTIONS)
    assert parse_corruptions(["snow", "fog"]) == ("snow", "fog")
    assert parse_severities(["1", "3"]) == (1, 3)
    with pytest.raises(ValueError, match=r"--corruptions=rain: choose among fog, wet_ground, .*, or all"):
        parse_corruptions(["fog", "rain"])
    for values in (["4"], ["heavy"], []):
        with pytest.raises(ValueError, match=rf"--severities={','.join(values)}: choose among 1 .light."):
            parse_severities(values)


@pytest.mark.slow
def test_the_command_prints_and_writes(small_probe_run, report, tmp_path):
    arguments = [f"--workdir={small_probe_run}", "--corruptions=crosstalk", "--severities=3"]
    finished = _run(*arguments, f"--out={tmp_path / 'results.json'}")
    assert finished.returncode == 0, finished.stderr
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["corruptions"]["crosstalk"]["3"] == report["corruptions"]["crosstalk"]["3"]
    assert format_table(written) in finished.stdout
    refused = _run(*arguments, f"--baseline={tmp_path / 'none.json'}")
    assert refused.returncode == 1
    assert [line for line in refused.stderr.splitlines() if "error" in line] == [
        f"error: --baseline={tmp_path / 'none.json'} does not exist: name a file that this command wrote with --out"
    ]


def _run(*arguments):
    command = [sys.executable, "-m", "pop3d_jax.evaluate_segmentation", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)

"""Evaluation and query of a small run, as their commands call them."""

import json

import numpy as np
import pytest
from PIL import Image

from pop3d_jax import evaluate, query
from pop3d_jax.checkpoint import CheckpointError
from pop3d_jax.data.records import RecordSource
from pop3d_jax.workdir import WorkdirError


@pytest.fixture(scope="module")
def report(small_run, small_world):
    return evaluate.evaluate(small_run, baselines=True, retrieval_dir=str(small_world / "retrieval"))


def test_the_report_is_whole_and_is_json(report, small_records):
    frames = len(RecordSource(small_records, "val"))
    assert report["frames"] == frames
    assert report["step"] == 8
    assert 0.0 <= report["scores"]["occupancy_iou"] <= 100.0
    assert report["baselines"]["occupancy_iou_best_constant_grid"] > 0.0
    assert len(report["baselines"]["miou_voxels_occupied_each_shuffle"]) == 5
    # Every observed voxel of every frame is counted once.
    confusion = np.array(report["confusion_occupancy"])
    assert 0 < confusion.sum() <= frames * 12 * 10 * 4
    phrases = {row["phrase"]: row for row in report["retrieval"]}
    assert phrases
    assert all(0.0 < row["matching_share"] <= 100.0 for row in phrases.values())
    assert json.loads(json.dumps(report)) == report


def test_the_table_shows_results_beside_baselines(report):
    table = evaluate.format_table(report)
    assert "best constant grid" in table
    assert "class prompts shuffled, mean of 5" in table
    assert f"{report['scores']['occupancy_iou']:.2f}" in table
    assert "driveable_surface" in table
    assert max(len(line) for line in table.splitlines()) <= 120


def test_another_calibration_changes_what_is_seen(small_run, small_records, report):
    other = evaluate.evaluate(small_run, calibration=RecordSource(small_records, "train"))
    assert other["calibration"] == "of another key frame"
    assert other["confusion_voxels_all"] != report["confusion_voxels_all"]


def test_a_query_draws_a_picture_and_names_places(small_run, small_records, tmp_path):
    token = RecordSource(small_records, "val").sample_tokens[1]
    lines = query.query(small_run, "a red car", token, tmp_path / "answer.png")
    assert "metres from the lidar" in lines
    with Image.open(tmp_path / "answer.png") as image:
        assert image.width >= 1000
        assert np.asarray(image.convert("L")).std() > 20  # not an empty canvas


def test_the_best_voxels_are_occupied_and_the_most_similar():
    rng = np.random.default_rng(0)
    occupied = rng.random((6, 5, 4)) < 0.3
    similarity = rng.normal(size=(6, 5, 4)).astype(np.float32)
    best = query.best_voxels(occupied, similarity, 7)
    assert best.sum() == 7
    assert not (best & ~occupied).any()
    assert similarity[best].min() >= similarity[occupied & ~best].max()
    assert query.best_voxels(occupied, similarity, 10_000).sum() == occupied.sum()


@pytest.mark.parametrize("sample", ["99", "no such token"])
def test_an_unknown_sample_is_refused(small_run, tmp_path, sample):
    with pytest.raises(ValueError, match=f"--sample={sample} is neither"):
        query.query(small_run, "a tree", sample, tmp_path / "answer.png")


def test_an_empty_phrase_is_refused(small_run, tmp_path):
    with pytest.raises(ValueError, match="none of them empty"):
        query.query(small_run, "  ", "0", tmp_path / "answer.png")


def test_what_is_missing_is_named(small_run, tmp_path):
    with pytest.raises(WorkdirError, match="config"):
        evaluate.evaluate(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5"):
        evaluate.evaluate(small_run, step=5)

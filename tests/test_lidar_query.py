"""Phrases and points asked of a raw sweep, as the command asks them."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pop3d_jax import evaluate, lidar_query
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.retrieval import RetrievalError


def test_similarity_is_the_cosine_and_zero_of_nothing():
    features = np.array([[3, 4], [-6, -8], [4, -3], [0, 0]], np.float32)
    found = lidar_query.cosine_similarity(features, np.array([0.6, 0.8], np.float32))
    np.testing.assert_allclose(found, [1, -1, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(lidar_query.cosine_similarity(features, np.zeros(2, np.float32)), 0)


def test_the_best_points_lie_apart_and_not_at_the_one_asked_for():
    x = np.array([0.0, 0.4, 2.0, 2.6, 9.0, 5.0], np.float32)
    points = np.stack([x, 0 * x, 0 * x], 1)
    similarity = np.array([0.9, 0.8, 0.6, 0.7, 0.1, 0.5], np.float32)
    assert lidar_query.best_points(points, similarity, 3).tolist() == [0, 3, 5]
    assert lidar_query.best_points(points, similarity, 3, besides=1).tolist() == [3, 5, 4]
    assert lidar_query.best_points(points, similarity, 99).tolist() == [0, 3, 5, 4]
    assert lidar_query.best_points(points[:0], similarity[:0], 3).tolist() == []


@pytest.mark.parametrize("words", [["1", "2"], ["1", "2", "x"], ["1", "2", "nan"], ["1", "2", "3", "4"]])
def test_what_is_no_point_is_refused(words):
    with pytest.raises(ValueError, match=f"--point={','.join(words)} must be three numbers x,y,z"):
        lidar_query.parse_point(words)
    assert lidar_query.parse_point(["-1", " 2.5", "3e1"]) == (-1.0, 2.5, 30.0)


def _picture(path):
    with Image.open(path) as image:
        assert image.width == 1200
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.slow
def test_a_phrase_is_answered_on_the_sweep(small_distillation_run, small_records, tmp_path):
    source = RecordSource(small_records, "val")
    token = source.sample_tokens[1]
    lines = lidar_query.lidar_query(small_distillation_run, token, tmp_path / "answer.png", text="a red car")
    rows = lines.splitlines()
    assert rows[0].split()[:4] == ["cosine", "x", "y", "z"]
    table = np.array([row.split() for row in rows[1:]], float)
    assert table.shape == (5, 4)
    assert (np.diff(table[:, 0]) <= 0).all()
    assert (np.abs(table[:, 0]) <= 1).all()
    distances = np.linalg.norm(source[1].points[None, :, :3] - table[:, None, 1:], axis=-1)
    assert distances.min(1).max() < 0.1  # places are points of this sweep, to the printed digit
    answer = _picture(tmp_path / "answer.png")
    assert answer.std() > 20  # not an empty canvas
    lidar_query.lidar_query(small_distillation_run, "1", tmp_path / "other.png", text="a tree")
    other = _picture(tmp_path / "other.png")
    assert answer.shape != other.shape or (answer != other).any(-1).mean() > 0.01


@pytest.mark.slow
def test_a_point_finds_what_is_like_it(small_distillation_run, small_records, tmp_path):
    points = RecordSource(small_records, "val")[0].points[:, :3]
    place = tuple(map(float, points[40]))
    lines = lidar_query.lidar_query(small_distillation_run, "0", tmp_path / "a.png", point=place).splitlines()
    assert lines[0].startswith("nearest point of the sweep: " + ", ".join(f"{value:.1f}" for value in place))
    assert lines[0].endswith("0.00 m from --point")
    found = np.array([row.split() for row in lines[2:]], float)
    assert (np.linalg.norm(found[:, 1:] - np.array(place), axis=1) > 0.9).all()
    assert found[0, 0] > 0.5  # two steps of training: features of a sweep are still much alike
    far = (place[0], place[1], place[2] + 90.0)
    lines = lidar_query.lidar_query(small_distillation_run, "0", tmp_path / "b.png", point=far)
    assert float(lines.split(" m from")[0].split(", ")[-1]) > 50
    # The mark: nothing else is of this blue.
    blue = (np.abs(_picture(tmp_path / "a.png") - (11, 95, 255)).max(-1) < 12).sum()
    assert blue > 20


@pytest.mark.slow
def test_a_rig_with_one_camera_and_other_axes(small_distillation_run, semantic_kitti_records, tmp_path):
    (tmp_path / "semantic_kitti").symlink_to(semantic_kitti_records)
    asked = {"text": "a tree", "dataset": "semantic_kitti", "records": str(tmp_path)}
    lines = lidar_query.lidar_query(small_distillation_run, "0", tmp_path / "answer.png", **asked)
    assert lines.count("\n") == 5
    picture = _picture(tmp_path / "answer.png")
    assert picture.std() > 20


@pytest.mark.slow
def test_a_run_without_texts_still_answers_points(small_distillation_run, dinov2_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_distillation_run, run)
    config = json.loads((run / "config.json").read_text())
    config["teacher"] |= {"name": "dinov2", "path": str(dinov2_folder)}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"teacher dinov2 \(.*tiny_dinov2\) has no text side"):
        lidar_query.lidar_query(run, "0", tmp_path / "answer.png", text="a tree")
    lidar_query.lidar_query(run, "0", tmp_path / "answer.png", point=(3.0, 4.0, -1.0))
    _picture(tmp_path / "answer.png")


@pytest.mark.slow
def test_questions_that_make_no_sense_are_refused(small_distillation_run, tmp_path):
    def ask(sample="0", run=small_distillation_run, **question):
        return lidar_query.lidar_query(run, sample, tmp_path / "answer.png", **question)

    for question in ({}, {"text": "a tree", "point": (0.0, 0.0, 0.0)}):
        with pytest.raises(ValueError, match="exactly one of them"):
            ask(**question)
    with pytest.raises(ValueError, match="none of them empty"):
        ask(text=" ")
    with pytest.raises(ValueError, match="--sample=99 is neither"):
        ask("99", text="a tree")
    with pytest.raises(ValueError, match="'waymo'; known data sets"):
        ask(text="a tree", dataset="waymo")
    with pytest.raises(RecordError):
        ask(text="a tree", dataset="semantic_kitti")
    run = tmp_path / "run"
    shutil.copytree(small_distillation_run, run)
    config = json.loads((run / "config.json").read_text())
    config["datasets"]["semantic_kitti"] = 1.0
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="learned from nuscenes, semantic_kitti: say with --dataset"):
        ask(run=run, text="a tree")
    config["task"] = "segmentation"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="task 'segmentation', which predicts classes"):
        ask(run=run, point=(0.0, 0.0, 0.0))


@pytest.mark.slow
def test_phrases_of_a_benchmark_are_scored_over_the_points(small_distillation_run, small_world, tmp_path):
    report = evaluate.evaluate_lidar(small_distillation_run, str(small_world / "retrieval"))
    rows = {row["phrase"]: row for row in report["retrieval"]}
    assert report["frames"] == 2
    assert {"a road", "a building"} <= rows.keys()
    for row in rows.values():
        assert 0 < row["average_precision"] <= 100
    assert "all, mean of queries" in evaluate.format_table(report)
    with pytest.raises(RetrievalError, match="does not exist"):
        evaluate.evaluate_lidar(small_distillation_run, str(tmp_path))

"""Evaluation, lidarseg evaluation and query of a small run, as their commands call them."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from pop3d_jax import evaluate, evaluate_lidarseg, query
from pop3d_jax.checkpoint import CheckpointError
from pop3d_jax.data.records import RecordSource
from pop3d_jax.nuscenes import LIDARSEG_TO_CLASS
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


def test_the_official_names_stand_beside_plain_means(report):
    table, scores = report["official"], report["scores"]
    assert table["val_miou_vox_clip_all"]["official_mean"] == scores["miou_voxels_all_official"]
    assert table["val_miou_vox_clip_all"]["present_mean"] == scores["miou_voxels_all"]
    assert table["val_miou_vox_agn"]["official_mean"] >= scores["occupancy_iou"] / 2
    # All lidar points are occupied: free never occurs, counts 100 officially and is no part of the plain mean.
    points = table["val_miou_pts_agn"]
    assert (points["classes_present"], points["classes"]) == (1, 2)
    np.testing.assert_allclose(points["official_mean"], (100 + points["present_mean"]) / 2)
    text = evaluate.format_table(report)
    for name, score in table.items():
        assert f"{name:<44}{score['official_mean']:>10.2f}{score['present_mean']:>10.2f}" in text


@pytest.mark.slow
def test_a_finer_grid_from_the_same_parameters(small_run, small_records, report):
    finer = evaluate.evaluate(small_run, upscale=(2, 1, 3), batch_size=1)
    assert report["grid_size"] == [12, 10, 4]
    assert finer["grid_size"] == [24, 10, 12]
    source = RecordSource(small_records, "val")
    observed = np.sum(finer["confusion_occupancy"])
    assert np.sum(report["confusion_occupancy"]) < observed <= len(source) * 24 * 10 * 12


def test_upscale_takes_one_factor_or_three():
    assert evaluate.parse_upscale(None) is None
    assert evaluate.parse_upscale(["2"]) == (2, 2, 2)
    assert evaluate.parse_upscale(["2", "1", "3"]) == (2, 1, 3)


@pytest.mark.parametrize("values", [["0"], ["2", "2"], ["1.5"], ["-1"], ["two"]])
def test_other_factors_are_refused(values):
    with pytest.raises(ValueError, match=f"--upscale={','.join(values)} must be"):
        evaluate.parse_upscale(values)


@pytest.mark.slow
def test_two_hosts_report_what_one_does(small_run, small_world, report, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = """
        import json, sys
        import jax
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address, host, workdir, retrieval, out = sys.argv[1:]
        jax.distributed.initialize(address, 2, int(host))
        from pop3d_jax.evaluate import evaluate
        with open(out + host, "w") as file:
            json.dump(evaluate(workdir, retrieval_dir=retrieval), file)
    """
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), f"localhost:{port}", host]
            + [str(path) for path in (small_run, small_world / "retrieval", tmp_path / "report")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in "01"
    ]
    logs = [host.communicate(timeout=300)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], logs
    first, second = (json.loads((tmp_path / f"report{host}").read_text()) for host in "01")
    assert first == second
    assert first["frames"] == report["frames"]
    for name in ("confusion_voxels_all", "confusion_occupancy"):
        found, expected = np.array(first[name]), np.array(report[name])
        # What is counted is exactly the same; a prediction may flip where another batch size rounds otherwise.
        np.testing.assert_array_equal(found.sum(1), expected.sum(1))
        assert np.abs(found - expected).sum() <= 1e-3 * expected.sum()
    found, expected = ([row["average_precision"] for row in whole["retrieval"]] for whole in (first, report))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.slow
def test_lidarseg_labels_every_point_and_agrees_with_evaluate(small_run, small_records, report, tmp_path):
    lidarseg = evaluate_lidarseg.evaluate_lidarseg(small_run, submission=tmp_path, submission_split="mini_val")
    source = RecordSource(small_records, "val")
    assert lidarseg["frames"] == lidarseg["frames_with_labels"] == len(source)
    labelled = 0
    for key_frame in (source[index] for index in range(len(source))):
        path = tmp_path / "lidarseg" / "mini_val" / f"{key_frame.lidar_token}_lidarseg.bin"
        labels = np.frombuffer(path.read_bytes(), np.uint8)
        assert len(labels) == len(key_frame.points)
        assert labels.min() >= 1
        assert labels.max() <= 16
        labelled += int((LIDARSEG_TO_CLASS[key_frame.lidarseg] > 0).sum())
    assert len(list(tmp_path.glob("lidarseg/mini_val/*.bin"))) == len(source)
    assert (tmp_path / "mini_val" / "submission.json").exists()
    assert np.sum(lidarseg["confusion"]) == labelled
    np.testing.assert_allclose(lidarseg["mean_iou"], report["scores"]["miou_points_devkit"], rtol=1e-3)
    assert f"{lidarseg['mean_iou']:.2f}" in evaluate_lidarseg.format_table(lidarseg)
    assert json.loads(json.dumps(lidarseg)) == lidarseg


def test_another_calibration_changes_what_is_seen(small_run, small_records, report):
    class Swapped(RecordSource):
        """Each camera is where the next one should be; the world's own key frames all have the same rig."""

        def __getitem__(self, index):
            key_frame = super().__getitem__(index)
            return dataclasses.replace(key_frame, lidar_to_camera=np.roll(key_frame.lidar_to_camera, 1, axis=0))

    other = evaluate.evaluate(small_run, calibration=Swapped(small_records, "train"))
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


@pytest.mark.slow
def test_a_run_whose_teacher_has_no_texts_answers_no_phrases(small_run, dinov2_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    config = json.loads((run / "config.json").read_text())
    config["teacher"] |= {"name": "dinov2", "path": str(dinov2_folder)}
    (run / "config.json").write_text(json.dumps(config))
    for ask in (
        lambda: query.query(run, "a tree", "0", tmp_path / "answer.png"),
        lambda: evaluate.evaluate(run),
        lambda: evaluate_lidarseg.evaluate_lidarseg(run),
    ):
        with pytest.raises(ValueError, match=r"teacher dinov2 \(.*tiny_dinov2\) has no text side"):
            ask()
    command = [sys.executable, "-m", "pop3d_jax.export", f"--workdir={run}", f"--out={tmp_path / 'grids.zarr'}"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "tiny_dinov2) has no text side" in finished.stderr
    assert not (tmp_path / "grids.zarr").exists()


def test_what_is_missing_is_named(small_run, tmp_path):
    with pytest.raises(WorkdirError, match="config"):
        evaluate.evaluate(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5"):
        evaluate.evaluate(small_run, step=5)

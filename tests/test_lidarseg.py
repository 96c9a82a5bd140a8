"""Scores and submission layout of the nuScenes devkit."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from pop3d_jax.lidarseg import CLASSES, LidarsegError, devkit_scores, write_submission_meta, write_sweep
from pop3d_jax.metrics import confusion_matrix
from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES, LIDARSEG_TO_CLASS


@pytest.fixture(scope="module")
def facts(golden_file):
    return json.loads(golden_file("nuscenes/devkit_eval.json").read_text())


@pytest.fixture(scope="module")
def stored(golden_file):
    with np.load(golden_file("nuscenes/devkit_eval_arrays.npz")) as arrays:
        return dict(arrays)


def counted(target, prediction):
    return np.asarray(confusion_matrix(jnp.asarray(target), jnp.asarray(prediction), len(CLASSES), ignore_label=0))


def assert_scores(scores, expected):
    null = [value is None for value in expected["iou_per_class"].values()]
    values = [np.nan if value is None else value for value in expected["iou_per_class"].values()]
    np.testing.assert_array_equal(np.isnan(scores.per_class), null)
    np.testing.assert_allclose(scores.per_class, values, rtol=1e-12)
    np.testing.assert_allclose(scores.mean_iou, expected["miou"], rtol=1e-12)
    np.testing.assert_allclose(scores.frequency_weighted_iou, expected["freq_weighted_iou"], rtol=1e-12)


@pytest.mark.golden
def test_scores_of_every_devkit_case(facts):
    assert facts["cases"]
    for case in facts["cases"].values():
        assert list(case["iou_per_class"])[1:] == list(CLASSES[1:])
        assert_scores(devkit_scores(np.array(case["confusion_matrix"])), case)


@pytest.mark.golden
def test_labels_and_predictions_give_the_devkit_matrices(facts, stored):
    names = sorted(stored)
    pairs = itertools.product(*([name for name in names if name.startswith(kind)] for kind in ("gt_", "pred_")))
    single = [counted(stored[a], stored[b]) for a, b in pairs if stored[a].shape == stored[b].shape]
    # Some cases sum matrices before they take a ratio.
    sums = [sum(chosen) for size in (2, 3) for chosen in itertools.combinations(single, size)]
    for name, case in facts["cases"].items():
        expected = np.array(case["confusion_matrix"])
        assert any(np.array_equal(found, expected) for found in single + sums), name


@pytest.mark.golden
def test_categories_and_classes_are_the_devkits(facts, stored):
    fine = facts["fine_idx_to_coarse_idx"]
    assert [fine[str(index)] for index in range(len(LIDARSEG_CATEGORIES))] == LIDARSEG_TO_CLASS.tolist()
    assert [facts["fine_names"][str(index)] for index in range(len(fine))] == list(LIDARSEG_CATEGORIES)
    assert tuple(facts["coarse_names"][1:]) == CLASSES[1:]
    raw = [name for name in stored if name.startswith("raw_")]
    assert raw
    for name in raw:
        np.testing.assert_array_equal(LIDARSEG_TO_CLASS[stored[name]], stored[name.replace("raw_", "gt_")])


@pytest.mark.golden
def test_a_submission_equals_the_stored_one_byte_by_byte(golden_file, facts, stored, tmp_path):
    folder = golden_file("nuscenes/submission")
    sweeps, metas = list(folder.glob("lidarseg/*/*.bin")), list(folder.glob("*/submission.json"))
    assert sweeps
    assert metas
    for sweep in sweeps:
        labels = np.frombuffer(sweep.read_bytes(), np.uint8)
        token, split = sweep.name.removesuffix("_lidarseg.bin"), sweep.parent.name
        written = write_sweep(tmp_path, split, token, labels, len(labels))
        assert written.read_bytes() == sweep.read_bytes()
        assert str(written.relative_to(tmp_path)) == str(sweep.relative_to(folder))
    for meta in metas:
        content = json.loads(meta.read_text())["meta"]
        written = write_submission_meta(tmp_path, meta.parent.name, content)
        assert written.read_text() == meta.read_text()
        assert str(written.relative_to(tmp_path)) == str(meta.relative_to(folder))
        ours = json.loads(write_submission_meta(tmp_path, "ours").read_text())["meta"]
        assert set(ours) == set(content)
    # The stored submission is one of the predictions; the devkit's whole evaluator scored it.
    labels = np.frombuffer(sweeps[0].read_bytes(), np.uint8)
    assert any(np.array_equal(labels, array) for name, array in stored.items() if name.startswith("pred_"))
    scored = [
        devkit_scores(counted(array, labels)).mean_iou
        for name, array in stored.items()
        if name.startswith("gt_") and array.shape == labels.shape
    ]
    assert np.isclose(scored, facts["full_evaluator_on_corrupted"]["miou"], rtol=1e-12).any()


def test_points_without_a_class_count_nowhere_and_predicted_classes_lower_the_mean():
    confusion = np.zeros((17, 17), int)
    confusion[0, 4] = 100  # unlabelled: no false positive of class 4
    confusion[4, 4], confusion[4, 9] = 6, 2  # class 9 is only predicted
    scores = devkit_scores(confusion)
    assert scores.per_class[4] == 6 / 8
    assert scores.per_class[9] == 0.0
    assert np.isnan(scores.per_class).sum() == 15
    assert scores.mean_iou == 6 / 8 / 2
    assert scores.frequency_weighted_iou == 6 / 8
    assert confusion[0, 4] == 100  # the caller's counts stay
    assert np.isnan(devkit_scores(np.zeros((17, 17), int)).mean_iou)


@pytest.mark.parametrize(
    ("classes", "points", "message"),
    [([1, 2], 3, "3 points and 2 predictions"), ([1, 0], 2, "class 0"), ([17, 1], 2, "class 17")],
)
def test_what_the_devkit_would_refuse_is_not_written(tmp_path, classes, points, message):
    with pytest.raises(LidarsegError, match=f"sweep token.*{message}"):
        write_sweep(tmp_path, "val", "token", np.array(classes, np.uint8), points)
    assert not list(tmp_path.rglob("*.bin"))

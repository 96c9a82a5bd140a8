"""The official script's scores, by name and by number."""

import dataclasses
import json

import numpy as np
import pytest

from pop3d_jax.evaluator import OFFICIAL_SCORES, Results, headline, official_table
from pop3d_jax.metrics import mean_iou
from pop3d_jax.nuscenes import EMPTY

BY_NAME = {score.name: score for score in OFFICIAL_SCORES}


def random_results(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {field.name: 2 if "occupancy" in field.name else EMPTY + 1 for field in dataclasses.fields(Results)}
    return Results(**{name: rng.integers(0, 50, (n, n)) for name, n in sizes.items()} | {"frames": 3})


@pytest.mark.golden
def test_every_configuration_of_the_official_script(golden_file):
    facts = json.loads(golden_file("pop3d/metrics.json").read_text())
    configurations = {
        name: fact for name, fact in facts.items() if isinstance(fact, dict) and "per_class_iou_percent" in fact
    }
    assert set(configurations) == set(BY_NAME)
    with np.load(golden_file("pop3d/metrics.npz")) as arrays:
        stored = dict(arrays)
    for name, fact in configurations.items():
        # All labels are counted here, the ignored one too: the score itself leaves it out.
        counts = np.zeros((256, 256), np.int64)
        for key in stored:
            if key.startswith(f"{name}:targets"):
                outputs = stored[key.replace(":targets", ":outputs")]
                np.add.at(counts, (stored[key].reshape(-1), outputs.reshape(-1)), 1)
        assert counts.any(), name
        arguments = fact["arguments"]
        found = mean_iou(counts, arguments["class_indices"], arguments["ignore_label"])
        np.testing.assert_allclose(found.per_class, fact["per_class_iou_percent"], rtol=2e-7, err_msg=name)
        np.testing.assert_allclose(found.official_mean, fact["miou_percent"], rtol=2e-7, err_msg=name)


def test_the_arguments_are_the_official_ones():
    semantic = tuple(range(1, 17))
    assert {score.name: (score.class_indices, score.ignore_label) for score in OFFICIAL_SCORES} == {
        "vox_clip_all": ((*semantic, 17), 255),
        "vox_clip_occupied": (semantic, 255),
        "pts_clip": (semantic, 255),
        "pts_clip_ignore0": (semantic, 0),
        "vox_agn_all": ((0, 1), 255),
        "vox_occ_agn_unq": ((0, 1), 255),
        "pts_agn": ((0, 1), 255),
    }


def test_both_means_are_told_apart():
    results = random_results()
    results.voxels_all[5] = 0  # a class that never occurs
    row = official_table(results)["val_miou_vox_clip_all"]
    assert (row["classes_present"], row["classes"]) == (16, 17)
    np.testing.assert_allclose(row["official_mean"], (16 * row["present_mean"] + 100) / 17)
    scores = headline(results)
    assert row["official_mean"] == scores["miou_voxels_all_official"]
    assert row["present_mean"] == scores["miou_voxels_all"]


def test_unlabelled_points_count_as_wrong_only_where_official_says_so():
    results = random_results()
    before = official_table(results)
    results.points[0] += 1000
    after = official_table(results)
    assert after["val_miou_pts_clip"]["official_mean"] < before["val_miou_pts_clip"]["official_mean"]
    assert after["val_miou_pts_clip_ignore0"] == before["val_miou_pts_clip_ignore0"]


def test_no_target_is_no_plain_mean():
    results = dataclasses.replace(random_results(), voxels_all=np.zeros((18, 18), int))
    row = official_table(results)["val_miou_vox_clip_all"]
    assert row["present_mean"] is None
    assert row["official_mean"] == 100.0

"""Turns, flips and scales: the official numbers for given draws, and the official distributions of the draws."""

import numpy as np
import pytest

from pop3d_jax.data.point_augment import (
    PointDraw,
    augment_distillation,
    augment_downstream,
    draw_point_augmentation,
)


def _golden(golden_file, chain):
    """The chain's input, and the draw and the output of each seed."""
    with np.load(golden_file("scalr/augmentations_golden.npz")) as arrays:
        data = dict(arrays)
    seeds = sorted({name.split("/")[1] for name in data if name.startswith(f"{chain}/") and name.count("/") == 2})
    assert seeds
    cases = []
    for seed in seeds:
        drawn = {name.split("/")[2]: value for name, value in data.items() if name.startswith(f"{chain}/{seed}/")}
        axis = int(drawn["flip_axis"])
        draw = PointDraw(
            float(drawn["theta"]),
            float(drawn.get("theta_feature_columns", 0.0)),
            None if axis < 0 else axis,
            float(drawn["scale"]),
        )
        cases.append((draw, drawn["out"]))
    return data[f"{chain}/in"], cases


@pytest.mark.golden
def test_golden_distillation_chain(golden_file):
    points, cases = _golden(golden_file, "pretrain")
    for draw, expected in cases:
        np.testing.assert_allclose(augment_distillation(points[:, :3], draw), expected[:, :3], rtol=1e-6, atol=1e-5)
        np.testing.assert_array_equal(points[:, 3], expected[:, 3])


@pytest.mark.golden
def test_golden_downstream_chain(golden_file):
    points, cases = _golden(golden_file, "downstream")
    for draw, expected in cases:
        xyz, features = augment_downstream(points[:, :3], points[:, 3:], draw)
        np.testing.assert_allclose(xyz, expected[:, :3], rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(features, expected[:, 3:], rtol=1e-6, atol=1e-5)


def test_a_quarter_turn_takes_x_to_y_and_leaves_the_input_alone():
    points = np.array([[1, 0, 5], [0, 2, -1]], np.float32)
    before = points.copy()
    turned = augment_distillation(points, PointDraw(np.pi / 2, 0.0, None, 1.0))
    np.testing.assert_allclose(turned, [[0, 1, 5], [-2, 0, -1]], atol=1e-6)
    flipped = augment_distillation(points, PointDraw(0.0, 0.0, 1, 0.5))
    np.testing.assert_array_equal(flipped, np.array([[1, 0, 5], [0, -2, -1]], np.float32) / 2)
    np.testing.assert_array_equal(points, before)


def test_draws_follow_the_official_distributions():
    rng = np.random.default_rng(0)
    draws = [draw_point_augmentation(rng) for _ in range(20_000)]
    angles = np.array([[draw.angle, draw.feature_angle] for draw in draws])
    assert np.abs(angles).max() <= np.pi
    for column in angles.T:
        counts, _ = np.histogram(column, 16, (-np.pi, np.pi))
        np.testing.assert_allclose(counts / len(draws), 1 / 16, rtol=0.1)
    assert abs(np.corrcoef(angles.T)[0, 1]) < 0.03
    axes = [draw.flip_axis for draw in draws]
    assert {None, 0, 1} == set(axes)
    for axis in (None, 0, 1):
        assert axes.count(axis) / len(draws) == pytest.approx(1 / 3, abs=0.015)
    scales = np.array([draw.scale for draw in draws])
    assert scales.min() >= 0.9
    assert scales.max() <= 1.1
    counts, _ = np.histogram(scales, 10, (0.9, 1.1))
    np.testing.assert_allclose(counts / len(draws), 0.1, rtol=0.1)
    flipped = np.array([axis is not None for axis in axes])
    assert abs(np.corrcoef(flipped, scales)[0, 1]) < 0.03
    assert abs(np.corrcoef(flipped, np.abs(angles[:, 0]))[0, 1]) < 0.03

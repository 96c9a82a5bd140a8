"""mCE and mRR on numbers worked out by hand."""

import numpy as np
import pytest

from pop3d_jax.robustness import robustness_scores

BASELINE = {"fog": [0.5, 0.4, 0.3], "snow": [0.6, 0.6, 0.6]}


def test_scores_by_hand():
    scores = robustness_scores({"fog": [0.7, 0.5, 0.3], "snow": [0.4, 0.4, 0.4]}, 0.8, BASELINE, "MinkUNet")
    # fog: 1.5 / 1.8 of the baseline's error; snow: 1.8 / 1.2.
    np.testing.assert_allclose(list(scores.corruption_error.values()), [1.5 / 1.8, 1.5])
    np.testing.assert_allclose(list(scores.resilience_rate.values()), [0.5 / 0.8, 0.4 / 0.8])
    np.testing.assert_allclose(scores.mean_corruption_error, (1.5 / 1.8 + 1.5) / 2)
    np.testing.assert_allclose(scores.mean_resilience_rate, (0.625 + 0.5) / 2)
    assert scores.baseline == "MinkUNet"


def test_the_baseline_relative_to_itself_is_one():
    scores = robustness_scores(BASELINE, 0.6, BASELINE, "itself")
    assert scores.mean_corruption_error == 1.0
    np.testing.assert_allclose(scores.resilience_rate["snow"], 1.0)


def test_without_a_baseline_there_are_no_errors():
    scores = robustness_scores(BASELINE, 0.8)
    assert (scores.baseline, scores.corruption_error) == (None, {})
    assert np.isnan(scores.mean_corruption_error)
    np.testing.assert_allclose(list(scores.resilience_rate.values()), [0.4 / 0.8, 0.6 / 0.8])
    np.testing.assert_allclose(scores.mean_resilience_rate, (0.5 + 0.75) / 2)
    with pytest.raises(ValueError, match=r"mIoU 50.0 is not in 0\.\.1"):
        robustness_scores({"fog": [50.0]}, 0.5)


@pytest.mark.parametrize(
    ("corrupted", "clean", "baseline", "message"),
    [
        ({"fog": [0.5]}, 0.5, BASELINE, "corruption (fog: 1 severities of the network, 3|snow: 0 severities)"),
        ({"fog": [0.5]}, 0.5, {}, "corruption fog: 1 severities of the network, 0 of baseline base"),
        ({"fog": [50.0]}, 0.5, {"fog": [0.5]}, "mIoU 50.0 is not in 0..1; give shares"),
        ({"fog": [float("nan")]}, 0.5, {"fog": [0.5]}, "mIoU nan is not in 0..1"),
        ({"fog": [0.5]}, 0.5, {"fog": [1.0]}, "baseline base is perfect"),
        ({"fog": [0.5]}, 0.0, {"fog": [0.5]}, "clean mIoU 0.0"),
        ({}, 0.5, {}, "no corruption"),
    ],
)
def test_what_cannot_be_compared_is_named(corrupted, clean, baseline, message):
    with pytest.raises(ValueError, match=message):
        robustness_scores(corrupted, clean, baseline, "base")

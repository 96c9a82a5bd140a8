"""What each rule reads off the same counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.occ3d.counts import UNLABELLED_ROW, confusion_of
from pop3d_jax.occ3d.grid import FREE
from pop3d_jax.occ3d.rules import RULES, score

OTHERS, CAR, ROAD, OTHER_FLAT = 0, 4, 11, 12


@pytest.fixture
def confusion():
    """Counts in which the rules part: a class only predicted, one that some leave out, ground truth without a label."""
    counts = np.zeros((19, 18), np.int64)
    counts[OTHERS, OTHERS] = 1
    counts[CAR, [CAR, FREE]] = 3, 1
    counts[ROAD, [ROAD, OTHER_FLAT]] = 8, 2
    counts[FREE, [FREE, CAR]] = 20, 4
    counts[UNLABELLED_ROW, CAR] = 5
    return counts


# IoU by hand: car 3 / (4 + 7 - 3), road 8 / 10, others 1, other_flat only predicted; occupied 14 / (15 + 18 - 14).
@pytest.mark.parametrize(
    ("rule", "miou", "classes", "iou"),
    [
        ("challenge", 2.175 / 4, (OTHERS, CAR, ROAD, OTHER_FLAT), 14 / 19),
        ("sparseocc", 2.175 / 3, (OTHERS, CAR, ROAD), 14 / 19),
        ("pg_occ", 1.175 / 2, (CAR, ROAD), 14 / 19),
        ("langocc", 2.175 / 4, (OTHERS, CAR, ROAD, OTHER_FLAT), 19 / 24),
        ("gaussianflowocc", 1.175 / 2, (CAR, ROAD), 18 / 23),
        ("gausstr", 2.175 / 4, (OTHERS, CAR, ROAD, OTHER_FLAT), 14 / 19),
        ("occnerf", np.nan, (CAR, ROAD), 14 / 19),
        ("occnerf_13", np.nan, (CAR, ROAD), 14 / 19),
        ("locc", 2.175 / 17, tuple(range(17)), 14 / 19),
    ],
)
def test_rules_part_where_they_should(confusion, rule, miou, classes, iou):
    scores = score(rule, confusion)
    assert scores.miou == pytest.approx(miou, abs=1e-6, nan_ok=True)
    assert scores.classes_in_mean == classes
    assert scores.iou == pytest.approx(iou, abs=1e-15)
    assert scores.iou_free == 20 / 25
    assert scores.n_voxels == (38 if rule == "gaussianflowocc" else 39)


def test_every_rule_is_in_the_hand_check():
    marked = test_rules_part_where_they_should.pytestmark[0].args[1]
    assert [row[0] for row in marked] == list(RULES)


def test_what_the_programs_print(confusion):
    expected = {"returned_miou_percent": 72.5, "returned_iou_percent": 73.68}
    assert score("sparseocc", confusion).published == expected
    expected = {"returned_miou_percent_15_classes": 58.75, "iou_percent_[occupied,free]": [78.26, 80.0]}
    assert score("gaussianflowocc", confusion).published == expected
    published = score("locc", confusion).published
    assert published["precision"] == 14 / 18
    assert published["recall"] == 14 / 15
    assert published["iou_percent"] == pytest.approx(100 * 14 / 19, abs=1e-12)
    assert score("gausstr", confusion).published == {"miou_17": score("gausstr", confusion).miou, "iou": 14 / 19}


@given(st.integers(0, 2**31), st.sampled_from(list(RULES)))
@settings(max_examples=50, deadline=None)
def test_a_prediction_equal_to_the_ground_truth_is_perfect(seed, rule):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, FREE + 1, 200).astype(np.uint8)[rng.integers(0, 200, 60)]
    scores = score(rule, confusion_of(truth, truth, np.ones(60, bool)))
    present = [label for label in np.unique(truth) if label not in RULES[rule].dropped]
    np.testing.assert_allclose(scores.per_class[present], 1.0, atol=1e-6)
    counted = [label for label in RULES[rule].classes if label in present]
    absent_count = RULES[rule].epsilon > 0
    expected = len(counted) / len(RULES[rule].classes) if absent_count else 1.0
    if RULES[rule].keeps_undefined and len(counted) < len(RULES[rule].classes):
        expected = np.nan
    assert scores.miou == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert scores.iou == scores.precision == scores.recall == 1.0


def test_scores_of_nothing_are_undefined():
    nothing = np.zeros((19, 18), np.int64)
    for rule in RULES:
        scores = score(rule, nothing)
        assert np.isnan([scores.iou, scores.iou_free, scores.precision, scores.recall]).all()
        assert scores.miou == 0 if rule == "locc" else np.isnan(scores.miou)


def test_a_rule_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ValueError, match="there is no rule occ4d; there are challenge, sparseocc"):
        score("occ4d", np.zeros((19, 18), np.int64))

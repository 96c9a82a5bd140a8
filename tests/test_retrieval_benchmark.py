"""Scoring of the retrieval benchmark against the official script's stored numbers and scikit-learn."""

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from pop3d_jax import retrieval_benchmark as benchmark
from pop3d_jax.retrieval import Query, RetrievalError

ONE = np.ones(1, np.float32)


@pytest.mark.golden
@pytest.mark.parametrize("cosine", [0, 1])
def test_every_stored_query_scores_as_official_ties_included(golden_file, cosine):
    facts = json.loads(golden_file("pop3d/metrics.json").read_text())["retrieval"]
    with np.load(golden_file("pop3d/metrics.npz")) as arrays:
        stored = dict(arrays)
    scores = []
    for number, expected in enumerate(facts["queries"]):
        values, targets, visible = (
            stored[f"retrieval{number}:{name}"] for name in (f"scores_cosine{cosine}", "targets", "matching_points")
        )
        query = Query(str(number), "q", targets.astype(bool), "val")
        # The stored scores stand in for features of one dimension.
        score = benchmark.score_query(query, ONE, values[:, None], visible, values[visible, None])
        np.testing.assert_allclose(score.student, expected[f"cosine{cosine}"]["mAP"], rtol=1e-12)
        # Without a match among the visible points the official library says 0, and the benchmark nothing.
        visible_precision = 0.0 if score.student_visible is None else score.student_visible
        np.testing.assert_allclose(visible_precision, expected[f"cosine{cosine}"]["mAP_visible"], rtol=1e-12)
        assert score.teacher_visible == score.student_visible
        np.testing.assert_allclose(score.student, average_precision_score(targets, values), rtol=1e-12)
        assert (score.points, score.visible) == (len(targets), len(visible))
        if expected["score_rounding"] is not None:
            assert len(np.unique(values)) < len(values)  # ties are in the set
        elif cosine == 0:
            features, text = stored[f"retrieval{number}:features"][0], stored[f"retrieval{number}:text"][0]
            found = benchmark.score_query(query, text, features, visible)
            np.testing.assert_allclose(found.student, expected["cosine0"]["mAP"], rtol=1e-5)
            assert found.teacher_visible is None
        scores.append(score)
    if cosine == 0:
        summary = benchmark.summarise(scores, "val", samples=100, seed=0)
        names = [("student", "mAP"), ("student_visible", "mAP_visible")]
        # Our mean leaves out what nothing can be said of; the official one has zeros there.
        undefined = any(score.student_visible is None for score in scores)
        for name, expected in names[:1] if undefined else names:
            np.testing.assert_allclose(100 * summary[name].mean, facts["mean_percent"][expected], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "members"),
    [("train", ("train",)), ("valtest", ("val", "test")), ("trainvaltest", ("train", "val", "test"))],
)
def test_a_splits_name_contains_its_members(name, members):
    assert benchmark.member_splits(name) == members


@pytest.mark.parametrize("name", ["eval", "mini_val", "testval", ""])
def test_other_names_are_refused(name):
    with pytest.raises(RetrievalError, match="unknown split"):
        benchmark.member_splits(name)


def score(student=None, student_visible=None, teacher=None, split="val", token="t"):
    return benchmark.QueryScore(token, "q", split, 10, 2 if student else 0, 5, 1 if student_visible else 0,
                                student, student_visible, teacher)  # fmt: skip


def test_undefined_queries_are_counted_and_left_out():
    scores = [score(0.5, 0.4, 0.1), score(0.7), score(), score(0.9, 0.8, 0.6, split="test", token="u")]
    table = benchmark.summarise(scores, "valtest", samples=50, seed=0)
    assert (table["queries"], table["key_frames"], table["undefined"], table["undefined_visible"]) == (4, 2, 1, 2)
    np.testing.assert_allclose(table["student"].mean, (0.5 + 0.7 + 0.9) / 3)
    np.testing.assert_allclose(table["difference_visible"].mean, (0.3 + 0.2) / 2)
    assert (table["student"].queries, table["teacher_visible"].queries) == (3, 2)
    assert benchmark.summarise(scores, "test", samples=50, seed=0)["student"].mean == 0.9
    assert benchmark.summarise(scores, "train", samples=50, seed=0)["student"] == benchmark.Interval(
        None, None, None, 0
    )


def test_no_answering_point_is_no_score():
    features = np.arange(4, dtype=np.float32)[:, None]
    visible = np.array([0, 1, 1])
    nowhere = benchmark.score_query(
        Query("t", "q", np.zeros(4, bool), "val"), ONE, features, visible, features[visible]
    )
    assert nowhere.student is nowhere.student_visible is nowhere.teacher_visible is None
    hidden = benchmark.score_query(Query("t", "q", np.arange(4) == 3, "val"), ONE, features, visible, features[visible])
    assert hidden.student == 1.0
    assert hidden.student_visible is hidden.teacher_visible is None


def test_a_point_that_two_cameras_see_counts_twice():
    features = np.array([[3.0], [2.0], [1.0]], np.float32)
    query = Query("t", "q", np.array([False, True, False]), "val")
    assert benchmark.score_query(query, ONE, features, np.array([0, 1, 2])).student_visible == 1 / 2
    assert benchmark.score_query(query, ONE, features, np.array([0, 1, 2, 0])).student_visible == 1 / 3


def test_another_length_is_refused_by_name():
    with pytest.raises(RetrievalError, match=r"sample t9, 'q': 3 annotated points, 2 in the sweep"):
        benchmark.score_query(Query("t9", "q", np.ones(3, bool)), ONE, np.ones((2, 1), np.float32), np.array([0]))


def test_bootstrap_intervals_have_the_width_that_theory_says():
    values = np.random.default_rng(1).random(400)
    interval = benchmark.bootstrap(values.tolist(), samples=4000, seed=2)
    half = 1.96 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose([interval.low, interval.high], values.mean() + np.array([-half, half]), atol=0.1 * half)
    assert interval == benchmark.bootstrap(values.tolist(), samples=4000, seed=2)
    assert interval != benchmark.bootstrap(values.tolist(), samples=4000, seed=3)


def test_lists_of_visible_points_are_compared_as_multisets():
    ours = np.array([0, 3, 3, 1])
    assert benchmark.differing_entries(ours, np.array([3, 1, 3, 0])) == 0
    assert benchmark.differing_entries(ours, np.array([3, 1, 0, 7])) == 2


def test_a_folder_without_tables_is_named(tmp_path):
    with pytest.raises(RetrievalError, match="--benchmark must name"):
        benchmark.available_splits(tmp_path)

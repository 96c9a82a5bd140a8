import numpy as np
import pytest

from pop3d_jax import retrieval
from pop3d_jax.models.clip import load_clip


def write_benchmark(folder, lines, arrays):
    (folder / "annotations").mkdir()
    for name, matches in arrays.items():
        np.save(folder / "annotations" / name, np.array(matches))
    (folder / "retrieval_anns_val.csv").write_text("\n".join(lines) + "\n")


EMBEDDINGS = {"a": np.array([1.0, 0.0, 0.0], np.float32)}


def test_queries_are_read_in_the_published_layout(tmp_path):
    write_benchmark(tmp_path, ["t1;val;annotations/a.npy;points.bin;a red car"], {"a.npy": [True, False]})
    (query,) = retrieval.read_queries(tmp_path, "val")
    assert (query.sample_token, query.phrase, query.matches.tolist()) == ("t1", "a red car", [True, False])


@pytest.mark.parametrize(
    ("line", "arrays", "message"),
    [
        ("t1;val;annotations/a.npy;a red car", {}, "4 fields"),
        ("t1;val;annotations/none.npy;p;a red car", {}, "does not exist"),
        ("t1;val;annotations/a.npy;p;a red car", {"a.npy": [[True], [False]]}, "expected one number a point"),
        ("t1;val;annotations/a.npy;p;a red car", {"a.npy": [0.5, 1.0]}, "expected one number a point"),
    ],
)
def test_bad_benchmark_files_are_named(tmp_path, line, arrays, message):
    write_benchmark(tmp_path, [line], arrays)
    with pytest.raises(retrieval.RetrievalError, match=message):
        retrieval.read_queries(tmp_path, "val")


def test_a_damaged_annotation_is_named(tmp_path):
    write_benchmark(tmp_path, ["t1;val;annotations/a.npy;p;a red car"], {"a.npy": [True]})
    (tmp_path / "annotations" / "a.npy").write_bytes(b"")
    with pytest.raises(retrieval.RetrievalError, match=r"a\.npy cannot be read"):
        retrieval.read_queries(tmp_path, "val")


def test_the_archives_visible_points_are_read_where_they_are_indices(tmp_path):
    lines = [f"t{i};val;annotations/a.npy;{name};a red car" for i, name in enumerate(["annotations/v.npy", "b.bin"])]
    write_benchmark(tmp_path, lines, {"a.npy": [True, False], "v.npy": [1, 0, 1]})
    first, second = retrieval.read_queries(tmp_path, "val")
    assert first.visible.tolist() == [1, 0, 1]
    assert second.visible is None


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(retrieval.RetrievalError, match=r"retrieval_anns_train\.csv does not exist"):
        retrieval.read_queries(tmp_path, "train")


def test_average_precision_is_over_the_real_points_of_valid_frames():
    queries = [
        retrieval.Query("t0", "a", np.array([True, False, False])),
        retrieval.Query("t1", "a", np.array([False, True])),
    ]
    scores = retrieval.Retrieval(queries, ["t0", "t1"], EMBEDDINGS)
    features = np.zeros((3, 4, 3), np.float32)
    features[0, :3, 0] = [3.0, 2.0, 1.0]  # the match is first: precision 1
    features[1, :2, 0] = [3.0, 2.0]  # the match is second: precision 1/2
    features[:, 3, 0] = 100.0  # padding
    mask = np.array([[True, True, True, False], [True, True, False, False], [True, True, False, False]])
    scores.add(features, mask, np.array([True, True, False]), np.array([0, 1, 1]), np.zeros(3, np.int32))
    (row,) = scores.table()
    assert row.frames == 2
    assert np.isclose(row.average_precision, (1.0 + 0.5) / 2)
    assert np.isclose(row.matching_share, (1 / 3 + 1 / 2) / 2)


def test_queries_that_no_point_answers_are_counted_and_left_out():
    queries = [retrieval.Query("t0", "a", np.array(matches)) for matches in ([False, False], [True, False])]
    scores = retrieval.Retrieval(queries, ["t0"], EMBEDDINGS)
    one = np.ones(1, bool)
    scores.add(np.eye(2, 3, dtype=np.float32)[None], np.ones((1, 2), bool), one, np.zeros(1, int), np.zeros(1, int))
    assert scores.undefined == 1
    assert [row.frames for row in scores.table()] == [1]


def test_annotations_of_another_length_are_refused():
    scores = retrieval.Retrieval([retrieval.Query("t0", "a", np.array([True] * 9))], ["t0"], EMBEDDINGS)
    with pytest.raises(retrieval.RetrievalError, match="9 annotated points"):
        scores.add(
            np.zeros((1, 4, 3), np.float32),
            np.ones((1, 4), bool),
            np.array([True]),
            np.array([0]),
            np.zeros(1, np.int32),
        )


def test_queries_of_another_split_are_refused():
    with pytest.raises(retrieval.RetrievalError, match="not in the records"):
        retrieval.Retrieval([retrieval.Query("t9", "a", np.array([True]))], ["t0"], EMBEDDINGS)


def test_phrases_are_embedded_once_each(tiny_clip_folder):
    queries = [
        retrieval.Query(token, phrase, np.array([True])) for token, phrase in (("t0", "b"), ("t1", "a"), ("t2", "b"))
    ]
    embeddings = retrieval.embed_queries(queries, load_clip(tiny_clip_folder))
    assert list(embeddings) == ["a", "b"]
    assert np.isclose(np.linalg.norm(embeddings["a"]), 1.0, atol=1e-5)
    assert not np.allclose(embeddings["a"], embeddings["b"])

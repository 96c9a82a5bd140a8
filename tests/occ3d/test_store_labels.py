import numpy as np
import pytest

from pop3d_jax.data.records import RecordSource
from pop3d_jax.grids.exporter import export
from pop3d_jax.grids.selection import Selection
from pop3d_jax.grids.store import GridStoreError
from pop3d_jax.inference import Predictor
from pop3d_jax.occ3d.centres import place_centres
from pop3d_jax.occ3d.grid import FREE
from pop3d_jax.occ3d.prompts import prompt_set
from pop3d_jax.occ3d.store_labels import StoreLabels
from pop3d_jax.occ3d.student_labels import StudentLabels

PROMPTS = prompt_set("gausstr")


@pytest.fixture(scope="module")
def source(small_records):
    return RecordSource(small_records, "train")


@pytest.fixture(scope="module")
def predictor(small_run):
    return Predictor(small_run)


@pytest.fixture(scope="module")
def predicted(predictor, source):
    return list(predictor.many([source[number] for number in range(len(source))]))


@pytest.fixture(scope="module")
def selected(predictor, source, tmp_path_factory):
    """A store of the voxels that the official decision calls occupied, float16."""
    out = tmp_path_factory.mktemp("selected") / "grids.zarr"
    tower = str(predictor.config.teacher.path)
    export(predictor, source, range(len(source)), out, Selection(0.5, 0, "float16"), split="train", text_tower=tower)
    return out


def where_rounding_cannot_matter(prediction, vectors):
    """Voxels where float16 turns neither the order of the two best phrases nor the decision on occupancy."""
    products = np.sort(prediction.features @ vectors.T, -1)
    sure = products[..., -1] - products[..., -2] > 2.0**-10 * np.linalg.norm(prediction.features, axis=-1)
    return sure & (np.abs(prediction.occupancy - 0.5) > 2.0**-10)


@pytest.mark.parametrize("which", ["small_grids", "selected"])
def test_a_store_says_what_the_network_predicts(which, request, predicted, predictor):
    labels = StoreLabels(request.getfixturevalue(which), PROMPTS)
    grids = list(labels.many(labels.sample_tokens))
    vectors = np.asarray(labels._text.phrases)
    for prediction, grid, token in zip(predicted, grids, labels.sample_tokens, strict=True):
        assert grid.sample_token == token
        assert grid.queried is None
        best = PROMPTS.labels[(prediction.features @ vectors.T).argmax(-1)]
        expected = np.where(prediction.occupied, best, np.uint8(FREE))
        placed = place_centres(labels.grids[token].lidar_to_ego, predictor.student.volume)
        np.testing.assert_array_equal(grid.unseen.reshape(-1), placed.unseen)
        sure = where_rounding_cannot_matter(prediction, vectors).reshape(-1)[placed.voxels]
        at = (sure | placed.unseen).reshape(grid.resampled.shape)
        assert at.mean() > 0.9
        np.testing.assert_array_equal(grid.resampled[at], placed.resampled(expected)[at])
        assert 0.001 < (grid.resampled != FREE).mean() < 0.999


@pytest.mark.slow
def test_a_store_says_what_its_run_says(small_run, small_grids, source, predicted, predictor):
    labels = StoreLabels(small_grids, PROMPTS)
    (stored,) = labels.many(labels.sample_tokens[:1])
    (asked,) = StudentLabels(small_run, None, PROMPTS).many([source[0]])
    np.testing.assert_array_equal(stored.unseen, asked.unseen)
    placed = place_centres(source[0].lidar_to_ego, predictor.student.volume)
    sure = where_rounding_cannot_matter(predicted[0], np.asarray(labels._text.phrases)).reshape(-1)[placed.voxels]
    at = (sure | placed.unseen).reshape(stored.resampled.shape)
    np.testing.assert_array_equal(stored.resampled[at], asked.resampled[at])


def test_voxels_below_one_half_are_occupied_where_the_export_kept_them(predictor, source, predicted, tmp_path):
    quantile = float(np.quantile(predicted[0].occupancy, 0.05))
    assert 0.0 < quantile < 0.5
    out = tmp_path / "grids.zarr"
    tower = str(predictor.config.teacher.path)
    export(predictor, source, [0], out, Selection(quantile, 0, "float16"), split="train", text_tower=tower)
    labels = StoreLabels(out, prompt_set("plain"))
    (grid,) = labels.many(labels.sample_tokens)
    placed = place_centres(source[0].lidar_to_ego, predictor.student.volume)
    kept = (predicted[0].occupancy > quantile).reshape(-1)[placed.voxels] & ~placed.unseen
    np.testing.assert_array_equal(grid.resampled.reshape(-1) != FREE, kept)


def test_absent_classes_take_no_part(small_grids):
    usual = StoreLabels(small_grids, prompt_set("plain"))
    tokens = usual.sample_tokens[:2]
    of = [
        [grid.resampled for grid in StoreLabels(small_grids, prompt_set("plain"), None, threshold).many(tokens)]
        for threshold in (None, float("-inf"), float("inf"))
    ]
    np.testing.assert_array_equal(of[0], of[1])
    assert set(np.unique(of[0])) != {FREE}
    assert set(np.unique(of[2])) == {FREE}


def test_what_cannot_be_asked_is_named(small_grids, tmp_path):
    labels = StoreLabels(small_grids, PROMPTS)
    with pytest.raises(KeyError, match="nobody is not a key frame of"):
        next(labels.many(["nobody"]))
    with pytest.raises(ValueError, match="absent_threshold must be a number"):
        StoreLabels(small_grids, PROMPTS, absent_threshold=float("nan"))
    with pytest.raises(GridStoreError):
        StoreLabels(tmp_path / "nothing.zarr", PROMPTS)

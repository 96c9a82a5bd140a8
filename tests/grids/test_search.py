import functools

import numpy as np
import pytest
from random_grids import DIM, write_store

from pop3d_jax.grids import search
from pop3d_jax.grids.feature_grids import FeatureGrids
from pop3d_jax.grids.search import best_similarities
from pop3d_jax.grids.store import GridStoreError


@pytest.fixture
def make_store(tmp_path):
    return functools.partial(write_store, tmp_path)


def _unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def vectors():
    return _unit(np.random.default_rng(1).normal(size=(5, DIM)))


@pytest.mark.parametrize("precision", ["float16", "int8", "pq"])
@pytest.mark.parametrize("block", [2**12, 2**20])
def test_the_best_similarity_of_every_key_frame(make_store, vectors, precision, block, monkeypatch):
    monkeypatch.setattr(search, "BLOCK_BYTES", block)
    path, _ = make_store(precision)
    grids = FeatureGrids.open(path)
    phrases, others = vectors[:3], vectors[3:]
    for without in (others[:0], others):
        found = best_similarities(grids.store, grids.offsets, grids.counts, phrases, without, grids.codebook)
        for number in range(len(grids)):
            if not grids.counts[number]:
                assert np.all(np.isinf(found[number]))
                continue
            features = grids[number].features
            # Cosines; product-quantised directions are compared as they are, not made unit length again.
            length = grids.store.read("feature_norm", *grids._rows(number)).astype(np.float32)
            cosines = features / length[:, None] @ phrases.T
            if len(without):
                rivals = (features / length[:, None] @ without.T).max(-1)
                cosines = np.where(cosines < rivals[:, None], -np.inf, cosines)
            np.testing.assert_allclose(found[number], cosines.max(0), atol=2e-3)


@pytest.mark.parametrize("precision", ["int8", "pq"])
def test_local_files_are_read_without_a_zarr_library_and_give_the_same(make_store, vectors, precision):
    grids = FeatureGrids.open(make_store(precision)[0])
    arguments = grids.store, grids.offsets, grids.counts, vectors, vectors[:0], grids.codebook
    found = best_similarities(*arguments)
    assert "features" in grids.store._plain_shards
    grids.store._plain_shards.clear()
    np.testing.assert_array_equal(best_similarities(*arguments), found)


def test_damage_stops_a_search(make_store, vectors):
    path, _ = make_store("int8")
    file = path / "features" / "c" / "1" / "0"
    whole = file.read_bytes()
    chunk = bytearray(whole)
    chunk[100] ^= 1
    index = bytearray(whole)
    index[-10] ^= 1
    for damaged, words in ((chunk, "chunk .* is damaged"), (index, "index is damaged"), (b"", "index is damaged")):
        file.write_bytes(damaged)
        grids = FeatureGrids.open(path)
        with pytest.raises(GridStoreError, match=rf"features, rows .* cannot be read.*c/1/0: .*{words}"):
            best_similarities(grids.store, grids.offsets, grids.counts, vectors, vectors[:0])
    file.write_bytes(whole)


@pytest.mark.parametrize("directly", [True, False])
@pytest.mark.parametrize("name", ["features/c/1/0", "feature_scale/c/1", "feature_norm/c/1", "coordinates/c/1/0"])
def test_a_lost_file_stops_whoever_reads_it(make_store, vectors, name, directly):
    path, _ = make_store("int8")
    (path / name).unlink()
    grids = FeatureGrids.open(path)
    if not directly:
        grids.store._plain_shards.clear()
    number = 8 + int(np.flatnonzero(grids.counts[8:])[0])
    nothing = vectors[:0]

    def read():
        if name.startswith("coordinates"):
            return grids[number]
        return best_similarities(grids.store, grids.offsets, grids.counts, vectors, nothing)

    with pytest.raises(GridStoreError, match=rf"{name.split('/')[0]}, rows .* cannot be read"):
        read()


def test_hits_are_ranked_and_placed(make_store, vectors, monkeypatch):
    path, key_frames = make_store("float16")
    grids = FeatureGrids.open(path)
    words = {"a thing": vectors[0], "another": vectors[1], "background": vectors[2]}
    monkeypatch.setattr(
        "pop3d_jax.grids.feature_grids.embed_phrases", lambda _, texts, **kept: np.stack([words[t] for t in texts])
    )
    monkeypatch.setattr(FeatureGrids, "clip", None)
    hits = grids.search(["a thing", "another"], top=4, background=["background", "another"])
    assert [hit.phrase for hit in hits] == ["a thing"] * 4 + ["another"] * 4
    for of_phrase in (hits[:4], hits[4:]):
        similarity = [hit.similarity for hit in of_phrase]
        assert similarity == sorted(similarity, reverse=True)
        assert len({hit.sample_token for hit in of_phrase}) == 4
    best = max(
        (float((_unit(features) @ vectors[0]).max()), number)
        for number, (features, _) in enumerate(key_frames)
        if len(features)
    )
    first = hits[0]
    assert first.sample_token == f"{best[1]:032x}"
    assert first.similarity == pytest.approx(best[0], abs=1e-3)
    grid = grids[first.sample_token]
    row = int(np.flatnonzero((grid.coordinates == first.voxel).all(-1))[0])
    np.testing.assert_allclose(first.lidar, grid.centres[row])
    homogeneous = grid.ego_to_global @ grid.lidar_to_ego @ np.append(grid.centres[row], 1.0)
    np.testing.assert_allclose(first.world, homogeneous[:3])
    assert first.distance == pytest.approx(np.linalg.norm(grid.centres[row]))
    # A phrase is no background of itself, nor of one that has its words.
    assert {hit.background for hit in hits[:4]} <= {"background", "another"}
    assert {hit.background for hit in hits[4:]} == {"background"}
    unit = _unit(grid.features)
    lead = unit @ vectors[0] - np.maximum(unit @ vectors[1], unit @ vectors[2])
    assert first.margin == pytest.approx(float(lead.max()), abs=1e-5)
    assert [hit.present for hit in hits] == [hit.margin >= 0 for hit in hits]
    everything = grids.search("a thing", top=1000, background=["background"], threshold=2.0)
    assert len(everything) == np.sum(grids.counts > 0)
    assert not any(hit.present for hit in everything)


def with_directions(grids, monkeypatch, number, directions, words):
    """The store with these features in one key frame and no voxel elsewhere."""
    counts = np.zeros_like(grids.counts)
    counts[number] = len(directions)
    monkeypatch.setattr(grids, "counts", counts)
    monkeypatch.setattr(grids, "_features", lambda _: directions)
    monkeypatch.setattr(FeatureGrids, "clip", None)
    monkeypatch.setattr(
        "pop3d_jax.grids.feature_grids.embed_phrases", lambda _, texts, **kept: np.stack([words[t] for t in texts])
    )

    def best(store, offsets, counts, phrases, others, codebook):
        similarity = np.full((len(counts), len(phrases)), -np.inf, np.float32)
        similarity[number] = (directions @ phrases.T).max(0)
        return similarity

    monkeypatch.setattr("pop3d_jax.grids.feature_grids.best_similarities", best)


def test_a_voxel_left_out_does_not_make_a_phrase_present(make_store, monkeypatch):
    grids = FeatureGrids.open(make_store("float16")[0])
    number = int(np.argmax(grids.counts))
    axes = np.eye(3, dtype=np.float32)
    words = {"a car": axes[0], "a truck": axes[1], "road": axes[2]}
    # One is ahead of the background but more of a truck; one is more of a car than of a truck, but still more road.
    leading, left = [0.6, 0.8, 0.0], [0.5, 0.0, 0.8]
    with_directions(grids, monkeypatch, number, _unit(np.array([leading, left], np.float32)), words)
    (alone,) = grids.search("a car", background=["road"])
    assert alone.present
    assert alone.margin == pytest.approx(0.6)
    (hit,) = grids.search("a car", without=["a truck"], background=["road"])
    assert not hit.present
    assert hit.margin == pytest.approx(-0.3 / np.hypot(0.5, 0.8))
    assert hit.background == "road"
    assert hit.voxel == tuple(grids[number].coordinates[1])


def test_a_key_frame_with_no_voxel_left_has_no_hit(make_store, monkeypatch):
    grids = FeatureGrids.open(make_store("float16")[0])
    axes = np.eye(3, dtype=np.float32)
    words = {"a car": axes[0], "a truck": axes[1], "road": axes[2]}
    trucks = _unit(np.array([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0]], np.float32))
    with_directions(grids, monkeypatch, int(np.argmax(grids.counts)), trucks, words)
    assert len(grids.search("a car", background=["road"])) == 1
    assert grids.search("a car", without=["a truck"], background=["road"]) == []


def test_impossible_questions_are_refused(make_store):
    grids = FeatureGrids.open(make_store()[0])
    with pytest.raises(ValueError, match="top = 0"):
        grids.search("a thing", top=0)
    with pytest.raises(KeyError, match="not a key frame"):
        _ = grids["f" * 32]
    with pytest.raises(KeyError, match="0 to 18, not 19"):
        _ = grids[19]

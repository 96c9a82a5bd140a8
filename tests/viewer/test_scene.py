import base64
import dataclasses
import io
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pop3d_jax import FeatureGrids
from pop3d_jax.data.records import RecordSource
from pop3d_jax.geometry import lidar_to_image, project
from pop3d_jax.inference import Predictor
from pop3d_jax.metrics import assign_classes
from pop3d_jax.nuscenes import CAMERAS
from pop3d_jax.text import embed_phrases
from pop3d_jax.viewer import scene as scene_module
from pop3d_jax.viewer.scene import PhraseScorer, default_classifier, read_scene, scene_json

BACKGROUND = ("road", "a tree", "a wall")


@pytest.fixture(scope="module")
def grids(small_grids):
    return FeatureGrids.open(small_grids)


@pytest.fixture(scope="module")
def source(small_run):
    return RecordSource(Predictor(small_run).config.data.records, "train")


@pytest.fixture(scope="module")
def scene(grids, source):
    return read_scene(grids, source, "0")[0]


@pytest.fixture(scope="module")
def scorer(scene, grids):
    return PhraseScorer(scene, grids, BACKGROUND)


@pytest.fixture(scope="module")
def classifier(grids):
    return default_classifier(grids)


@pytest.fixture(scope="module")
def content(scene, classifier, scorer):
    return scene_json(scene, 1, scorer, ["a red car", "road", "a red car"], classifier)


def decoded(text, dtype=np.uint8):
    return np.frombuffer(base64.b64decode(text), dtype)


def test_a_scene_is_its_key_frames_in_the_order_of_time(grids, source):
    for token in grids.sample_tokens:
        scene, place = read_scene(grids, source, token)
        times = [grid.timestamp for grid in scene.grids]
        assert len(times) == 2
        assert times == sorted(times)
        assert scene.grids[place].sample_token == token
        assert [frame.sample_token for frame in scene.key_frames] == [grid.sample_token for grid in scene.grids]
        assert {grid.scene_name for grid in scene.grids} == {scene.title}
        alone, place = read_scene(grids, source, token, key_frames=1)
        assert [grid.sample_token for grid in alone.grids] == [token]
        assert place == 0


@pytest.mark.parametrize("sample", ["7", "f" * 32, "", "-1"])
def test_an_unknown_sample_is_named(grids, source, sample):
    with pytest.raises(ValueError, match=f"--sample={sample}: .*key frame"):
        read_scene(grids, source, sample)


def test_records_that_lack_the_key_frames_are_told(grids, small_run):
    other = RecordSource(Predictor(small_run).config.data.records, "val")
    with pytest.raises(ValueError, match=r"records lack 2 key frames .*--records and --split"):
        read_scene(grids, other, "0")


def test_similarities_are_cosines_in_eight_bits(scene, grids, content):
    assert [phrase["text"] for phrase in content["phrases"]] == ["a red car", "road"]
    vectors = embed_phrases(grids.clip, ["a red car", "road"])
    for phrase, vector in zip(content["phrases"], vectors, strict=True):
        step = (phrase["high"] - phrase["low"]) / 255
        for grid, stored in zip(scene.grids, phrase["similarity"], strict=True):
            cosines = grid.features @ vector / np.linalg.norm(grid.features, axis=-1)
            np.testing.assert_allclose(phrase["low"] + step * decoded(stored), cosines, atol=0.51 * step)


def test_a_phrase_is_present_where_its_lead_reaches_the_threshold(scene, grids, scorer):
    margins = [verdict["margin"] for verdict in scorer("a red car")["verdicts"]]
    assert min(margins) < max(margins)
    judged = PhraseScorer(scene, grids, BACKGROUND, threshold=max(margins))("a red car")["verdicts"]
    assert [verdict["margin"] for verdict in judged] == margins
    assert [verdict["present"] for verdict in judged] == [margin == max(margins) for margin in margins]
    assert {verdict["rival"] for verdict in judged} <= set(BACKGROUND)


def test_without_a_background_nothing_is_judged(scene, grids):
    answer = PhraseScorer(scene, grids, ())("a red car")
    assert answer["verdicts"] == [{"margin": None, "present": True, "rival": ""}] * 2


def test_classes_are_those_of_the_evaluation(scene, classifier, content):
    for grid, frame in zip(scene.grids, content["frames"], strict=True):
        expected = assign_classes(*map(jnp.asarray, (grid.features, classifier.embeddings, classifier.classes)))
        np.testing.assert_array_equal(decoded(frame["class"]), np.asarray(expected))
        np.testing.assert_array_equal(decoded(frame["coordinates"]).reshape(-1, 3), grid.coordinates)


def test_the_sweep_in_centimetres(scene, content):
    for record, frame in zip(scene.key_frames, content["frames"], strict=True):
        sent = decoded(frame["lidar"], "<i2").reshape(-1, 3) / 100
        np.testing.assert_allclose(sent, record.points[:, :3], atol=0.0051)


def test_images_are_made_smaller_with_their_projection(scene, classifier, scorer, monkeypatch):
    monkeypatch.setattr(scene_module, "IMAGE_WIDTH", 80)
    frame = scene_json(scene, 0, scorer, [], classifier)["frames"][0]
    record = scene.key_frames[0]
    for camera in range(len(CAMERAS)):
        image = Image.open(io.BytesIO(base64.b64decode(frame["images"][camera]["jpeg"])))
        assert image.size == (80, 45)  # of 160 x 90
        small = np.eye(4)
        small[:3] = np.reshape(frame["images"][camera]["lidar_to_image"], (3, 4))
        full = lidar_to_image(record.intrinsics[camera], record.lidar_to_camera[camera])
        (pixel, depth), (full_pixel, full_depth) = (project(scene.grids[0].centres, m) for m in (small, full))
        seen = depth > 0
        np.testing.assert_allclose(pixel[seen], full_pixel[seen] / 2, rtol=1e-9)
        np.testing.assert_allclose(depth, full_depth)


def with_features(scene, features):
    """The scene with other voxels: as many as there are features of each key frame."""
    grids = [
        dataclasses.replace(
            grid,
            coordinates=np.resize(grid.coordinates, (len(rows), 3)),
            occupancy=np.resize(grid.occupancy, len(rows)),
            features=rows.astype(np.float32),
        )
        for grid, rows in zip(scene.grids, features, strict=True)
    ]
    return dataclasses.replace(scene, grids=grids)


def test_like_features_have_like_colours(scene, classifier, scorer):
    """Principal components see the main difference: two kinds of features become two colours, apart in red."""
    generator = np.random.default_rng(0)
    kinds = [np.arange(len(grid.features)) % 2 for grid in scene.grids]
    axes = np.linalg.qr(generator.normal(size=(scene.grids[0].features.shape[1], 2)))[0].T
    features = [axes[kind] + 0.01 * generator.normal(size=(len(kind), axes.shape[1])) for kind in kinds]
    changed = with_features(scene, features)
    content = scene_json(changed, 0, scorer, [], classifier)
    for kind, frame in zip(kinds, content["frames"], strict=True):
        red = decoded(frame["principal"]).reshape(-1, 3)[:, 0].astype(int)
        assert abs(red[kind == 0].mean() - red[kind == 1].mean()) > 200


def test_main_directions_are_the_same_when_few_voxels_tell_them(scene, classifier, scorer, monkeypatch):
    """A sample of the voxels gives nearly the colours of all, and comes from all key frames."""
    generator = np.random.default_rng(0)
    spread = np.diag([8.0, 4.0, 2.0, *np.full(13, 0.1)])
    changed = with_features(scene, [generator.normal(size=(3_000, 16)) @ spread for _ in scene.grids])
    colours = []
    for voxels in (100_000, 1_000):
        monkeypatch.setattr(scene_module, "_PCA_VOXELS", voxels)
        frames = scene_json(changed, 0, scorer, [], classifier)["frames"]
        colours.append(np.concatenate([decoded(frame["principal"]) for frame in frames]).reshape(-1, 3).astype(int))
    assert np.abs(colours[0] - colours[1]).mean() < 12
    assert np.abs(colours[0] - colours[0][::-1]).mean() > 60


def test_the_memory_is_that_of_one_key_frame(scene, grids, classifier):
    """Beside the features themselves, what is made of them one key frame after the other."""
    generator = np.random.default_rng(0)
    many = dataclasses.replace(
        scene, grids=scene.grids * 20, stored=scene.stored * 20, key_frames=scene.key_frames * 20
    )
    many = with_features(many, [generator.normal(size=(20_000, 16)) for _ in many.grids])
    together = sum(grid.features.nbytes for grid in many.grids)
    tracemalloc.start()
    try:
        components = scene_module._PrincipalComponents([grid.features for grid in many.grids])
        for grid in many.grids:
            components(grid.features)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < together / 5


def test_the_most_probable_voxels_are_kept(grids, source, scene):
    few, _ = read_scene(grids, source, "0", max_voxels=10)
    assert few.stored == scene.stored == [len(grid.coordinates) for grid in scene.grids]
    for grid, whole in zip(few.grids, scene.grids, strict=True):
        kept = np.flatnonzero((whole.coordinates[:, None] == grid.coordinates).all(-1).any(-1))
        assert len(kept) == 10 < len(whole.coordinates)
        assert grid.occupancy.min() >= np.delete(whole.occupancy, kept).max()
        for name in ("coordinates", "occupancy", "features"):
            np.testing.assert_array_equal(getattr(grid, name), getattr(whole, name)[kept])
    assert len(read_scene(grids, source, "0", max_voxels=10**6)[0].grids[0].coordinates) == scene.stored[0]


def test_features_have_unit_length(scene):
    for grid in scene.grids:
        np.testing.assert_allclose(np.linalg.norm(grid.features, axis=-1), 1.0, rtol=1e-5)


def test_places_in_the_world(scene, content):
    for grid, frame in zip(scene.grids, content["frames"], strict=True):
        matrix = np.reshape(frame["lidar_to_global"], (3, 4))
        np.testing.assert_allclose(matrix, (grid.ego_to_global @ grid.lidar_to_ego)[:3])


def test_a_key_frame_without_voxels(scene, grids, classifier):
    empty = [
        dataclasses.replace(
            grid, **{name: getattr(grid, name)[:0] for name in ("coordinates", "occupancy", "features")}
        )
        for grid in scene.grids
    ]
    nothing = dataclasses.replace(scene, grids=empty)
    scorer = PhraseScorer(nothing, grids, BACKGROUND)
    content = scene_json(nothing, 0, scorer, ["a red car"], classifier)
    assert content["phrases"][0]["verdicts"] == [{"margin": None, "present": False, "rival": ""}] * 2
    assert {frame["coordinates"] for frame in content["frames"]} == {""}

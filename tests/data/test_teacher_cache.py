"""Cached teacher features: exact in float16, close in int8, of the right teacher and records, and trainable."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from data_prep.teacher_features import build_cache
from pop3d_jax.data.pipeline import training_batches
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.data.teacher_cache import TeacherCache, cache_index_path, encode_features, quantise
from pop3d_jax.experiment import example_settings
from pop3d_jax.teacher import load_teacher
from pop3d_jax.train import train

finite = st.floats(-1e3, 1e3, width=32)


@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=finite))
def test_int8_is_within_half_a_step_of_each_point(features):
    stored, scale = quantise(features)
    assert stored.dtype == np.int8
    error = np.abs(stored * scale[:, None] - features)
    assert (error <= 0.5 * scale[:, None] * (1 + 1e-5) + 1e-30).all()


def test_what_float16_cannot_hold_is_an_error():
    with pytest.raises(ValueError, match="of sample abc are too large for float16: use int8"):
        encode_features("abc", np.full((2, 3), 1e6, np.float32), "float16")
    with pytest.raises(ValueError, match="of sample abc are not finite"):
        encode_features("abc", np.full((2, 3), np.nan, np.float32), "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("teacher_cache")


@pytest.fixture
def caches(small_config, folder):
    """The small world's features in both precisions."""
    for dtype in ("float16", "int8"):
        build_cache(small_config, "train", folder / dtype, dtype)
    return folder


def test_batches_carry_what_the_teacher_says_in_the_step(small_config, small_records, caches):
    source = RecordSource(small_records, "train")
    teacher = load_teacher(small_config.teacher)
    online = example_settings(small_config, training=True)
    small_config.teacher.cache = str(caches)
    cached = example_settings(small_config, training=True)
    assert cached == dataclasses.replace(online, teacher_image_hw=None)

    first = next(training_batches(source, online, batch_size=2, seed=3))
    expected = np.asarray(
        teacher.point_features(
            teacher.parameters,
            *(jnp.asarray(first[name]) for name in ("teacher_images", "feature_cameras", "feature_pixels")),
        )
    )
    size = np.abs(expected).max()
    for dtype, tolerance in (("float16", 1e-3), ("int8", 0.5 / 127 + 1e-3)):
        cache = TeacherCache(caches / dtype, "train", source.fingerprint)
        assert len(cache) == len(source)
        batch = next(training_batches(source, cached, batch_size=2, seed=3, cache=cache))
        assert "teacher_images" not in batch
        np.testing.assert_array_equal(batch["feature_points"], first["feature_points"])
        mask = batch["feature_mask"]
        difference = batch["feature_targets"][mask].astype(np.float32) - expected[mask]
        assert 0 < np.abs(difference).max() < tolerance * size


@pytest.mark.slow
def test_a_training_from_the_cache_stays_near_the_one_online(small_config, caches, tmp_path):
    small_config.total_steps = 2
    online = train(small_config, tmp_path / "online")
    small_config.teacher.cache = str(caches / "float16")
    cached = train(small_config, tmp_path / "cached")
    assert cached["feature"] != online["feature"]
    assert np.isclose(cached["total"], online["total"], rtol=1e-3)


def test_a_second_run_computes_only_what_is_missing(small_config, small_records, caches, monkeypatch):
    folder = caches / "again"
    shutil.copytree(caches / "float16", folder)
    index = build_cache(small_config, "train", folder, "float16")
    victim = index.shards[0]
    whole = (folder / victim.file).read_bytes()
    (folder / victim.file).unlink()
    cache_index_path(folder, "train").unlink()
    seen = []
    source_getitem = RecordSource.__getitem__
    monkeypatch.setattr(RecordSource, "__getitem__", lambda self, i: seen.append(i) or source_getitem(self, i))
    assert build_cache(small_config, "train", folder, "float16") == index
    assert seen == list(range(len(victim.offsets)))
    assert (folder / victim.file).read_bytes() == whole


def test_other_records_another_teacher_and_damage_are_named(small_config, small_records, caches, tmp_path):
    fingerprint = RecordSource(small_records, "train").fingerprint
    with pytest.raises(RecordError, match="has no finished teacher features of split 'val'"):
        TeacherCache(caches / "int8", "val", fingerprint)
    with pytest.raises(RecordError, match="was made of records"):
        TeacherCache(caches / "int8", "train", "0" * 64)
    with pytest.raises(ValueError, match=r"other teacher features \(differing: \['dtype'\]\)"):
        build_cache(small_config, "train", caches / "int8", "float16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(ValueError, match="is not empty and holds no teacher features"):
        build_cache(small_config, "train", tmp_path / "full", "float16")

    shutil.copytree(caches / "int8", tmp_path / "damaged")
    cache = TeacherCache(tmp_path / "damaged", "train", fingerprint)
    file = tmp_path / "damaged" / cache.index.shards[0].file
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    with pytest.raises(RecordError, match=r"teacher_features-train.*checksum.*delete this shard"):
        cache[0]

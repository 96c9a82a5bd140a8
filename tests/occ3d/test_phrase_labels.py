import jax.numpy as jnp
import numpy as np
import pytest

from pop3d_jax.grids.background import BACKGROUND_PHRASES, largest_lead, rivals_of
from pop3d_jax.models.clip import load_clip
from pop3d_jax.occ3d.grid import FREE, OCC3D_CLASSES
from pop3d_jax.occ3d.phrase_labels import (
    BACKGROUND_LABELS,
    LabelText,
    best_labels,
    check_threshold,
    label_text,
    largest_leads,
    without_absent,
)
from pop3d_jax.occ3d.prompts import PromptSet

PHRASES = ("a red car", "cone", "sedan", "grass field", "sky")
LABELS = np.array([4, 8, 4, 14, FREE], np.uint8)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture
def text():
    generator = np.random.default_rng(0)
    rivals = np.zeros((5, len(BACKGROUND_PHRASES)), bool)
    for row, phrase in zip(rivals, PHRASES, strict=True):
        row[rivals_of(phrase, BACKGROUND_PHRASES)] = True
    phrases, background = (unit(generator.normal(size=(n, 8))).astype(np.float32) for n in (5, len(BACKGROUND_PHRASES)))
    return LabelText(*map(jnp.asarray, (phrases, LABELS, background, rivals)))


def test_the_leads_are_those_of_the_search(text):
    features = 3 * np.random.default_rng(1).normal(size=(40, 8)).astype(np.float32)
    counted = np.arange(40) % 3 > 0
    leads = largest_leads(jnp.asarray(features), jnp.asarray(counted), text)
    directions = unit(features)[counted]
    for phrase, vector, lead in zip(PHRASES, np.asarray(text.phrases), leads, strict=True):
        expected, _ = largest_lead(
            directions @ vector, directions @ np.asarray(text.background).T, phrase, BACKGROUND_PHRASES
        )
        assert float(lead) == pytest.approx(expected, abs=1e-5)


def test_leads_without_voxels_or_without_rivals(text):
    features = jnp.ones((4, 8))
    assert np.all(np.isneginf(largest_leads(features, jnp.zeros(4, bool), text)))
    alone = text._replace(rivals=jnp.zeros_like(text.rivals))
    assert np.all(np.isposinf(largest_leads(features, jnp.ones(4, bool), alone)))


def test_a_class_is_absent_when_all_of_its_phrases_stay_behind(text):
    leads = jnp.array([-0.2, -0.1, 0.1, -0.3, -0.4])
    found = {threshold: without_absent(text, leads, threshold).labels.tolist() for threshold in (0.0, -0.1, -0.25)}
    assert found == {0.0: [4, 255, 4, 255, FREE], -0.1: [4, 8, 4, 255, FREE], -0.25: [4, 8, 4, 255, FREE]}
    assert without_absent(text, leads, float("-inf")).labels.tolist() == LABELS.tolist()
    assert without_absent(text, leads, float("inf")).labels.tolist() == [255, 255, 255, 255, FREE]


def test_the_best_phrase_in_play_says_the_label(text):
    # Each voxel is one of the phrases; the sky is free.
    features = 5 * text.phrases
    np.testing.assert_array_equal(best_labels(features, text), LABELS)
    without_cars = text._replace(labels=jnp.where(text.labels == 4, jnp.uint8(255), text.labels))
    products = np.array(features @ text.phrases.T)
    products[:, [0, 2]] = -np.inf
    np.testing.assert_array_equal(best_labels(features, without_cars), LABELS[products.argmax(-1)])
    none = text._replace(labels=jnp.full(5, 255, jnp.uint8))
    np.testing.assert_array_equal(best_labels(features, none), [FREE] * 5)


def test_the_first_of_equal_phrases_counts(text):
    twice = text._replace(phrases=text.phrases.at[1].set(text.phrases[3]))
    assert best_labels(text.phrases[3:4], twice).tolist() == [8]


@pytest.mark.slow
def test_nothing_need_be_ahead_of_its_own_class(tiny_clip_folder):
    assert tuple(BACKGROUND_LABELS) == BACKGROUND_PHRASES
    for phrase, label in BACKGROUND_LABELS.items():
        if phrase.replace(" ", "_") in OCC3D_CLASSES:
            assert OCC3D_CLASSES[label] == phrase.replace(" ", "_")
    prompts = PromptSet("some", "", "", PHRASES, LABELS)
    text = label_text(prompts, load_clip(str(tiny_clip_folder)))
    left_out = [
        {other for other, rival in zip(BACKGROUND_PHRASES, row, strict=True) if not rival} for row in text.rivals
    ]
    assert left_out == [{"car"}, {"traffic cone"}, {"car"}, {"grass"}, {"sky"}]
    np.testing.assert_allclose(np.linalg.norm(text.phrases, axis=-1), 1, rtol=1e-5)
    assert text.background.shape == (len(BACKGROUND_PHRASES), text.phrases.shape[1])


def test_a_threshold_is_a_number():
    with pytest.raises(ValueError, match="absent_threshold must be a number, or None"):
        check_threshold(float("nan"))
    check_threshold(None)
    check_threshold(float("-inf"))

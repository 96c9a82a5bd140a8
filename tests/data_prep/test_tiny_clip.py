"""The tiny CLIP: its captions, tokenizer and loss, and the whole command on a small world."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_prep.tiny_clip_build import make_tiny_clip
from data_prep.tiny_clip_captions import Kind, phrases_about, sentence, train_tokenizer
from data_prep.tiny_clip_data import Pictures, draw_batch
from data_prep.tiny_clip_training import Schedule, contrastive_loss
from pop3d_jax.models.clip import load_clip
from pop3d_jax.nuscenes import CLASS_NAMES
from pop3d_jax.protocol import zero_shot_protocol
from pop3d_jax.text import embed_phrases

KINDS = [
    Kind(CLASS_NAMES.index("car"), "car", "blue", "blue car"),
    Kind(CLASS_NAMES.index("car"), "car", "red", "red car"),
    Kind(CLASS_NAMES.index("pedestrian"), "pedestrian", "red", "pedestrian in red"),
    Kind(CLASS_NAMES.index("manmade"), "building", "", "brick building"),
    Kind(CLASS_NAMES.index("manmade"), "wall", "", "wall"),
]


def true_of(phrases, text):
    return {KINDS[i].caption for i in np.flatnonzero(phrases.true_of[phrases.texts.index(text)])}


def test_what_phrases_are_true_of():
    phrases = phrases_about(KINDS)
    cars = {"red car", "blue car"}
    assert true_of(phrases, "SUV") == true_of(phrases, "car") == cars
    assert true_of(phrases, "red car") == true_of(phrases, "red suv") == {"red car"}
    assert true_of(phrases, "building") == {"brick building"}  # a noun of the world: not true of its whole class
    assert true_of(phrases, "fence") == true_of(phrases, "manmade") == {"brick building", "wall"}
    assert true_of(phrases, "person") == true_of(phrases, "Adult.") == {"pedestrian in red"}
    assert true_of(phrases, "car trailer") == set()  # nothing of that kind here
    assert len(set(phrases.texts)) == len(phrases.texts)
    protocol = zero_shot_protocol()
    evaluated = {p for p, k in zip(protocol.prompts, protocol.prompt_classes, strict=True) if k}
    assert {t for t, official in zip(phrases.texts, phrases.in_protocol, strict=True) if official} == evaluated


def test_sentences_use_the_official_templates():
    random = np.random.default_rng(0)
    said = {sentence("red car", random) for _ in range(2000)}
    assert {"red car", "a red car", "a photo of a red car.", "a photo of a a red car."} <= said
    assert {template.replace("{}", "red car") for template in zero_shot_protocol().templates} <= said


def test_tokenizer_knows_the_words_and_any_bytes(tmp_path):
    tokenizer = train_tokenizer(["red car", "tree"], tmp_path)
    assert tokenizer.tokenize("A photo of a Red CAR.") == [
        f"{w}</w>" for w in ("a", "photo", "of", "a", "red", "car", ".")
    ]
    for text in ("naïve 12 Övér!", "日本 red", "zebra's"):
        ids = tokenizer(text)["input_ids"]
        assert ids.count(tokenizer.eos_token_id) == 1  # the unknown token is the end token: it must not occur
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")


def test_contrastive_loss_is_clips_where_one_sentence_is_true():
    random = np.random.default_rng(0)
    features, texts = (jnp.asarray(random.normal(size=(6, 4)), jnp.float32) for _ in range(2))
    ours = contrastive_loss(features, texts, jnp.eye(6, dtype=bool), jnp.float32(5.0))
    unit = [np.asarray(x, np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, texts)]
    logits = 5.0 * unit[0] @ unit[1].T
    rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    np.testing.assert_allclose(ours, (rows.mean() + columns.mean()) / 2, rtol=1e-5)
    # Two sentences true of everything leave nothing to tell apart.
    assert contrastive_loss(features, texts, jnp.ones((6, 6), bool), jnp.float32(5.0)) == 0
    # A thing of which nothing is true only pushes away.
    nothing = jnp.eye(6, dtype=bool).at[0].set(False)
    assert np.isfinite(contrastive_loss(features, texts, nothing, jnp.float32(5.0)))


def test_mirrored_cells_stay_on_their_pixels(monkeypatch):
    """The colour of every cell says its kind, mirrored or not (in constant light)."""
    monkeypatch.setattr("data_prep.tiny_clip_data._relit", lambda image, random: image)
    rows, columns = 6, 10
    kinds = np.random.default_rng(0).integers(-1, 3, (2, rows * columns)).astype(np.int16)
    images = np.repeat(kinds.reshape(2, rows, columns, 1), 3, axis=3).astype(np.uint8)
    row, column = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    pixels = np.stack([row, column], -1).reshape(-1, 2).astype(np.float32)
    pictures = Pictures(images, kinds, pixels, np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.int16))
    batch = draw_batch(pictures, (8, 50, 4), np.random.default_rng(1))
    at = np.floor(batch.pixel * [rows, columns]).astype(int)
    seen = batch.images[batch.picture, at[:, 0], at[:, 1], 0]
    np.testing.assert_array_equal(seen, batch.cell_kinds)
    assert (batch.cell_kinds >= 0).all()  # never the sky
    assert any((batch.images[i] != images[0]).any() and (batch.images[i] != images[1]).any() for i in range(8))


@pytest.fixture(scope="module")
def trained(small_world, tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny_clip")
    schedule = Schedule(steps=30, seed=0, pictures=2, cells=64, crops=8, sentences=32)
    losses, result = make_tiny_clip(
        small_world, out, schedule=schedule, image_hw=(56, 104), max_pictures=6, max_key_frames=1
    )
    return out, losses, result


@pytest.mark.slow
def test_training_lowers_the_loss(trained):
    _, losses, _ = trained
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])


@pytest.mark.slow
def test_saved_folder_loads_again_with_its_judgement(trained):
    out, _, result = trained
    assert json.loads((out / "zero_shot.json").read_text()) == result
    assert result["points"] > 1000
    assert 0 <= result["accuracy"] <= 1
    assert result["image_hw"] == [56, 104]
    assert "not CLIP" in (out / "README.md").read_text()
    first, second = load_clip(out), load_clip(out)
    phrases = ["a red car", "a tree"]
    embedded = embed_phrases(first, phrases)
    np.testing.assert_array_equal(embedded, embed_phrases(second, phrases))
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-5)
    side = first.model.vision.config.image_size
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, side, side, 3)), jnp.float32)
    run = nnx.jit(lambda tower, x: tower(x).image_features)
    np.testing.assert_array_equal(run(first.model.vision, images), run(second.model.vision, images))


def test_command_without_a_world(tmp_path):
    command = [sys.executable, "-m", "data_prep.tiny_clip", f"--world={tmp_path}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "data_prep.synthetic" in done.stderr

"""Prompt ensembling against the official numbers, the zero-shot text matrix, the cache."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from pop3d_jax import nuscenes, text
from pop3d_jax.models.clip import load_clip
from pop3d_jax.nuscenes import CLASS_NAMES
from pop3d_jax.protocol import retrieval_benchmark, zero_shot_protocol
from pop3d_jax.text import read_text_classifier
from pop3d_jax.torch_files import WeightFileError


@pytest.fixture(scope="module")
def info(golden_file):
    return json.loads(golden_file("clip/tiny_clip_info.json").read_text())


@pytest.fixture(scope="module")
def golden(golden_file):
    with np.load(golden_file("clip/tiny_clip.npz")) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def clip(golden_file):
    return load_clip(golden_file("clip/tiny_clip"))


@pytest.mark.golden
def test_official_prompt_ensemble(clip, golden, info):
    names, templates = info["text_ensemble"]["names"], info["text_ensemble"]["templates"]
    texts = [template.format(name) for name in names for template in templates]
    tokens = text.tokenise(clip.tokenizer, texts, clip.model.text.config.positions)
    shape = golden["text_ensemble/input_ids"].shape
    np.testing.assert_array_equal(tokens.reshape(shape), golden["text_ensemble/input_ids"])
    features = text.embed_texts(clip, texts).reshape(*shape[:2], -1)
    np.testing.assert_allclose(features, golden["text_ensemble/per_prompt_embeds"], rtol=0, atol=1e-5)
    official = golden["text_ensemble/embeddings"]
    np.testing.assert_allclose(text.ensemble(jnp.asarray(features)), official, rtol=0, atol=1e-5)
    phrases = text.embed_phrases(clip, names, templates=templates)
    np.testing.assert_allclose(phrases, official, rtol=0, atol=1e-5)
    # They are the head of the official list.
    protocol = zero_shot_protocol()
    assert list(protocol.templates[: len(templates)]) == templates
    assert len(protocol.templates) == info["text_ensemble"]["number_of_templates_in_the_official_list"]


def test_protocol_is_consistent_with_the_class_facts():
    protocol = zero_shot_protocol()
    np.testing.assert_array_equal(protocol.lidarseg_to_class, nuscenes.LIDARSEG_TO_CLASS)
    assert len(protocol.category_prompts) == len(nuscenes.LIDARSEG_CATEGORIES)
    assert all(template.count("{}") == 1 for template in protocol.templates)
    classes = dict(zip(protocol.prompts, protocol.prompt_classes, strict=True))
    assert nuscenes.CLASS_NAMES[classes["traffic cone."]] == "traffic_cone"
    assert nuscenes.CLASS_NAMES[classes["tree"]] == "vegetation"
    assert classes["animal"] == nuscenes.UNLABELLED
    assert set(classes.values()) == set(range(17))
    benchmark = retrieval_benchmark()
    assert {"image", "query"} == benchmark["queries"][0].keys()


def test_batches_and_duplicates_change_nothing(clip, monkeypatch):
    texts = ["a car", "the big red car on the long wet road in the rain.", "a car", "a tree", "", "x y z"]
    whole = text.embed_texts(clip, texts)
    np.testing.assert_array_equal(whole[0], whole[2])
    monkeypatch.setattr(text, "_BATCH", 2)
    monkeypatch.setattr(text, "_LENGTH_STEP", 77)
    np.testing.assert_allclose(text.embed_texts(clip, texts), whole, atol=1e-6)
    # A text longer than the tower is cut and closed.
    long = text.tokenise(clip.tokenizer, ["car " * 200], clip.model.text.config.positions)
    assert long[0, -1] == clip.model.text.config.end_token
    assert np.isfinite(text.embed_texts(clip, ["car " * 200])).all()


def test_cache_is_by_content(clip, tmp_path, monkeypatch, golden_file):
    first = text.embed_phrases(clip, ["a red car"], cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()

    def must_not_run(*_):
        raise AssertionError("the tower ran although the result is cached")

    with monkeypatch.context() as patch:
        patch.setattr(text, "_run_tower", must_not_run)
        np.testing.assert_array_equal(text.embed_phrases(clip, ["a red car"], cache_dir=tmp_path), first)
        with pytest.raises(AssertionError, match="cached"):
            text.embed_phrases(clip, ["a blue car"], cache_dir=tmp_path)
        other = load_clip(golden_file("clip/tiny_clip"))
        bias = other.model.text.final_layer_norm.bias
        bias[...] = bias[...] + 1e-3
        with pytest.raises(AssertionError, match="cached"):
            text.embed_phrases(other, ["a red car"], cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == [file]  # no partial files


def test_phrases_that_cannot_be_embedded(clip):
    with pytest.raises(ValueError, match="at least one phrase"):
        text.embed_phrases(clip, ["car", " "])
    with pytest.raises(ValueError, match="exactly once"):
        text.embed_phrases(clip, ["car"], templates=["a photo"])
    with pytest.raises(ValueError, match="no texts"):
        text.embed_texts(clip, [])


def test_zero_shot_classifier_rows(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "zero_shot_protocol", lambda: zero_shot_protocol_with(zero_shot_protocol().templates[:2]))
    classifier = text.zero_shot_classifier(clip, cache_dir=tmp_path)
    protocol = zero_shot_protocol()
    assert classifier.prompts == protocol.prompts
    np.testing.assert_array_equal(classifier.classes, protocol.prompt_classes)
    np.testing.assert_allclose(np.linalg.norm(classifier.embeddings, axis=1), 1, atol=1e-6)
    row = protocol.prompts.index("SUV")
    alone = text.embed_phrases(clip, ["SUV"], templates=protocol.templates[:2])
    np.testing.assert_allclose(classifier.embeddings[row], alone[0], atol=1e-6)


def zero_shot_protocol_with(templates):
    import dataclasses

    return dataclasses.replace(zero_shot_protocol(), templates=templates)


class TestAuthorsClassifier:
    """`zeroshot_weights.pth`, made here in exactly its format."""

    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = pytest.importorskip("torch", reason="PyTorch, an extra, is not installed: pip install torch")

    @pytest.mark.parametrize("transposed", [False, True])
    def test_matrix_and_classes(self, tmp_path, transposed):
        categories = [17, 0, 24, 24, 30]
        matrix = np.random.default_rng(0).normal(size=(len(categories), 8)).astype(np.float32)
        stored = self.torch.from_numpy(matrix.T.copy() if transposed else matrix)
        self.torch.save((stored, categories), tmp_path / "zeroshot_weights.pth")
        classifier = read_text_classifier(tmp_path / "zeroshot_weights.pth", 8)
        np.testing.assert_array_equal(classifier.embeddings, matrix)
        names = [CLASS_NAMES[index] for index in classifier.classes]
        assert names == ["car", CLASS_NAMES[0], "driveable_surface", "driveable_surface", "vegetation"]

    @pytest.mark.parametrize(
        ("rows", "categories", "message"),
        [
            (3, [1, 2], "3 text vectors, 2 categories"),
            (2, [1, 32], "from 1 to 32"),
            (2, [[1, 2]], "categories of shape"),
        ],
    )
    def test_what_does_not_fit_is_said(self, tmp_path, rows, categories, message):
        self.torch.save((self.torch.ones(rows, 8), categories), tmp_path / "w.pth")
        with pytest.raises(WeightFileError, match=message):
            read_text_classifier(tmp_path / "w.pth", 8)

    def test_another_width_and_another_structure(self, tmp_path):
        self.torch.save((self.torch.ones(2, 8), [1, 2]), tmp_path / "w.pth")
        with pytest.raises(WeightFileError, match="do not fit features of width 16"):
            read_text_classifier(tmp_path / "w.pth", 16)
        self.torch.save(self.torch.ones(2, 8), tmp_path / "w.pth")
        with pytest.raises(WeightFileError, match="expected is a pair"):
            read_text_classifier(tmp_path / "w.pth", 8)

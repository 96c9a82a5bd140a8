"""The CLIP towers against transformers' numbers, and the Hugging Face folder format."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from pop3d_jax.models.clip import load_clip, save_clip
from pop3d_jax.models.clip_towers import bicubic_matrix

# Either tower, compiled.
run = nnx.jit(lambda tower, inputs: tower(inputs))


@pytest.fixture(scope="module")
def folder(golden_file) -> Path:
    return golden_file("clip/tiny_clip")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_clip(folder)


def test_bicubic_weights():
    np.testing.assert_allclose(bicubic_matrix(7, 7), np.eye(7), atol=1e-7)
    for outputs in (3, 12, 20):
        matrix = bicubic_matrix(7, outputs)
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-6)  # half-pixel centres are symmetric
    # Halfway between two cells, a = -0.75 weighs (-3, 19, 19, -3) / 32; a = -0.5 would weigh (-1, 9, 9, -1) / 16.
    np.testing.assert_allclose(bicubic_matrix(8, 4)[1], np.array([0, -3, 19, 19, -3, 0, 0, 0]) / 32, atol=1e-7)


def test_attention_in_parts_is_attention(loaded, monkeypatch):
    """Many patches attend in parts; the 17 tokens are no multiple of two parts."""
    tower = loaded.model.vision
    side = 4 * tower.config.patch_size
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, side, side, 3)), jnp.float32)
    whole = nnx.jit(lambda tower, x: tower(x).patch_features)(tower, images)
    monkeypatch.setattr("pop3d_jax.models.clip_towers._WHOLE_UP_TO", 13)
    monkeypatch.setattr("pop3d_jax.models.clip_towers._QUERIES_AT_ONCE", 13)
    parts = nnx.jit(lambda tower, x: tower(x).patch_features)(tower, images)
    np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_text_vector_ignores_what_follows_the_end_token(loaded):
    tower = loaded.model.text
    row = loaded.tokenizer(["a photo of the car."])["input_ids"][0]
    short = run(tower, jnp.asarray([row], jnp.int32)).text_features
    padded = run(tower, jnp.asarray([row + [3, 1, 2]], jnp.int32)).text_features
    np.testing.assert_allclose(short, padded, atol=1e-6)


def test_sizes_that_do_not_fit(loaded):
    patch, positions = loaded.model.vision.config.patch_size, loaded.model.text.config.positions
    with pytest.raises(ValueError, match="patch size"):
        loaded.model.vision(jnp.zeros((1, patch, patch + 1, 3)))
    with pytest.raises(ValueError, match="positions"):
        loaded.model.text(jnp.zeros((1, positions + 1), jnp.int32))


def test_bfloat16_compute_keeps_float32_parameters(folder, loaded):
    model = load_clip(folder, dtype="bfloat16").model
    assert all(parameter.dtype == jnp.float32 for _, parameter in nnx.to_flat_state(nnx.state(model)))
    side = model.vision.config.image_size
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, side, side, 3)), jnp.float32)
    ours, exact = (run(tower, images).image_features for tower in (model.vision, loaded.model.vision))
    assert ours.dtype == jnp.bfloat16
    assert 0 < np.abs(np.asarray(ours, np.float32) - exact).max() < 0.1 * np.abs(exact).max()


def test_save_and_load_again(tmp_path, folder, loaded):
    save_clip(tmp_path / "copy", loaded.model, loaded.config, loaded.tokenizer, readme="a copy\n")
    official, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "copy/model.safetensors")
    assert ours.keys() == official.keys()
    for key, tensor in official.items():
        np.testing.assert_array_equal(ours[key], tensor)
    again = load_clip(tmp_path / "copy")
    texts = ["a red car", "Two TREES, isn't it?"]
    assert again.tokenizer(texts)["input_ids"] == loaded.tokenizer(texts)["input_ids"]
    assert again.model.vision.config == loaded.model.vision.config
    assert {"vocab.json", "merges.txt", "tokenizer.json", "config.json", "README.md"} <= {
        path.name for path in (tmp_path / "copy").iterdir()
    }


@pytest.fixture
def copy(tmp_path, folder) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "clip"))


def shard(folder: Path, parts: int) -> list[str]:
    """Splits model.safetensors into shards with an index, as transformers does for large models."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    places = {key: names[i % parts] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key in places if places[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return names


def test_sharded_checkpoint(copy, loaded):
    names = shard(copy, 3)
    state, expected = nnx.state(load_clip(copy).model), nnx.state(loaded.model)
    for (_, ours), (_, whole) in zip(nnx.to_flat_state(state), nnx.to_flat_state(expected), strict=True):
        np.testing.assert_array_equal(ours[...], whole[...])
    (copy / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=names[1]):
        load_clip(copy)


def test_half_precision_and_position_counters_are_accepted(copy, loaded):
    tensors = {key: tensor.astype(np.float16) for key, tensor in load_file(copy / "model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
    save_file(tensors, copy / "model.safetensors")
    kernel = load_clip(copy).model.vision.projection.kernel[...]
    assert kernel.dtype == jnp.float32
    np.testing.assert_allclose(kernel, loaded.model.vision.projection.kernel[...], rtol=1e-3)


def test_strict_keys_lists_everything(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["logit_scale"]
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"][:-1]
    tensors["vision_model.extra"] = np.zeros(3, np.float32)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match="not those of its config") as error:
        load_clip(copy)
    for part in ("1 missing", "logit_scale", "1 unknown", "vision_model.extra", "1 misshapen", "visual_projection"):
        assert part in str(error.value)


def test_folders_that_are_no_clip(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_clip(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_clip(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ValueError, match="dinov2"):
        load_clip(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot read its config"):
        load_clip(tmp_path / "empty")
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no whole safetensors"):
        load_clip(copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="save_pretrained"):
        load_clip(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_clip(copy)


def test_tokenizer_missing_or_of_another_model(copy):
    vocabulary = json.loads((copy / "vocab.json").read_text())
    vocabulary |= {f"<extra{i}>": len(vocabulary) + i for i in range(5)}
    (copy / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="do not belong together"):
        load_clip(copy)
    (copy / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        load_clip(copy)


def test_hub_names(monkeypatch, copy, loaded):
    """A hub name without safetensors on its main branch is found in the conversion bot's pull request."""
    bare = copy.parent / "bare"
    shutil.copytree(copy, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(copy if revision else bare)

    class Pull:
        def __init__(self, title, reference):
            self.title, self.git_reference = title, reference

    class Api:
        def get_repo_discussions(self, name, author, discussion_type):
            assert (name, author, discussion_type) == ("some/clip", "SFconvertbot", "pull_request")
            return iter([Pull("other", "refs/pr/1"), Pull("Adding `safetensors` variant of this model", "refs/pr/7")])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert load_clip("some/clip").model.vision.config == loaded.model.vision.config
    assert asked == [("some/clip", None), ("some/clip", "refs/pr/7")]
    load_clip("some/clip@abc")
    assert asked[-1] == ("some/clip", "abc")

    def offline(name, revision, allow_patterns):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"some/clip .*hub.*offline"):
        load_clip("some/clip")

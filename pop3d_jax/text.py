"""Text embeddings: prompt ensembling, the zero-shot classifier, free phrases; cached on disk by content.

Official: `zeroshot_classifier` of POP-3D's retrieval script (normalise every prompt, average, normalise).
Everything here runs on the CPU, so that it can be done anywhere and never waits for an accelerator.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from pop3d_jax.models.clip import LoadedCLIP
from pop3d_jax.nuscenes import LIDARSEG_TO_CLASS
from pop3d_jax.protocol import zero_shot_protocol
from pop3d_jax.torch_files import WeightFileError, read_torch

# Rows of one call and the steps in which their length grows: few compilations, little wasted padding.
_BATCH = 256
_LENGTH_STEP = 8
# Part of every cache key: raise it when the arithmetic here changes.
_CACHE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TextClassifier:
    """A text matrix and the class of each row.

    embeddings: `[prompts, dim]`, unit length; classes: `[prompts]`, 0..16, where rows of class 0 take no part in
    assignment; prompts: the row's words.
    """

    embeddings: Float[np.ndarray, "prompts dim"]
    classes: UInt8[np.ndarray, " prompts"]
    prompts: tuple[str, ...]


def ensemble(features: Float[Array, "names templates dim"]) -> Float[Array, "names dim"]:
    """Normalises every prompt's vector, averages over the templates, normalises again."""
    unit = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    mean = unit.mean(axis=1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def tokenise(tokenizer: Any, texts: Sequence[str], positions: int) -> Int[np.ndarray, "texts positions"]:
    """Token ids, right-padded to `positions`; longer texts are cut and closed by the end token, as CLIP does."""
    encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=positions, return_tensors="np")
    return encoded["input_ids"].astype(np.int32)


def embed_texts(
    clip: LoadedCLIP, texts: Sequence[str], *, cache_dir: str | os.PathLike[str] | None = None
) -> Float[np.ndarray, "texts dim"]:
    """CLIP's text features, not normalised, one row per text.

    Args:
      clip: whose text tower and tokenizer are used.
      texts: whole sentences.
      cache_dir: local or gs:// folder; results are kept there under a hash of the tower's weights and the token
        ids, so neither a changed weight nor a changed word can find an old result. None: no cache.

    Raises:
      ValueError: no texts.
    """
    if not texts:
        raise ValueError("no texts to embed")
    tokens = tokenise(clip.tokenizer, texts, clip.model.text.config.positions)
    if cache_dir is None:
        return _run_tower(clip, tokens)
    file = epath.Path(cache_dir) / f"text_{_content_key(clip, tokens)}.npy"
    if file.exists():
        with file.open("rb") as opened:
            return np.load(opened)
    features = _run_tower(clip, tokens)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: a killed run leaves no half file, and two runs may write the same.
    partial = file.parent / f"{file.name}.{os.getpid()}.partial"
    with partial.open("wb") as opened:
        np.save(opened, features)
    partial.replace(file)
    return features


def embed_phrases(
    clip: LoadedCLIP,
    phrases: Sequence[str],
    *,
    templates: Sequence[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Float[np.ndarray, "phrases dim"]:
    """Unit text vectors of free phrases, each averaged over the templates.

    Args:
      clip: see `embed_texts`.
      phrases: e.g. `"a red car"` or `"car"`.
      templates: sentences with one `{}`; None takes the 85 published ones, `("{}",)` the bare phrase.
      cache_dir: see `embed_texts`.

    Raises:
      ValueError: no phrases, an empty phrase, or a template without `{}`.
    """
    templates = zero_shot_protocol().templates if templates is None else tuple(templates)
    if not phrases or any(not phrase.strip() for phrase in phrases):
        raise ValueError(f"cannot embed {list(phrases)}: give at least one phrase, none of them empty")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"the template {template!r} must hold {{}} exactly once, where the phrase goes")
    texts = [template.replace("{}", phrase) for phrase in phrases for template in templates]
    features = embed_texts(clip, texts, cache_dir=cache_dir).reshape(len(phrases), len(templates), -1)
    with jax.default_device(_cpu()):
        return np.asarray(ensemble(jax.device_put(features, _cpu())))


def zero_shot_classifier(clip: LoadedCLIP, *, cache_dir: str | os.PathLike[str] | None = None) -> TextClassifier:
    """The official zero-shot classifier: every sub-prompt of the 32 categories is a row, averaged over 85 templates."""
    protocol = zero_shot_protocol()
    embeddings = embed_phrases(clip, protocol.prompts, cache_dir=cache_dir)
    return TextClassifier(embeddings, protocol.prompt_classes, protocol.prompts)


def read_text_classifier(path: epath.PathLike, feature_dim: int) -> TextClassifier:
    """The authors' zero-shot classifier (`zeroshot_weights.pth`): a text matrix and the category of each column.

    Official: `eval.py`, `--text-embeddings-path`. The file holds (matrix, categories), the matrix as
    [feature_dim, prompts] or [prompts, feature_dim], the categories as the 32 of lidarseg, which are mapped to the 16
    classes here. The vectors are used as they are.

    Args:
      path: the file.
      feature_dim: width of the features that will be classified.

    Raises:
      WeightFileError: the file cannot be read, or is not such a pair; the message says what it holds.
    """
    pair = read_torch(path)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], np.ndarray):
        raise WeightFileError(f"{path} holds a {type(pair).__name__}, expected is a pair: text matrix, categories")
    matrix, categories = np.asarray(pair[0], np.float32), np.asarray(pair[1]).astype(np.int64)
    if matrix.ndim != 2 or categories.ndim != 1 or feature_dim not in matrix.shape:
        raise WeightFileError(
            f"{path}: a text matrix of shape {matrix.shape} and categories of shape {categories.shape} do not fit "
            f"features of width {feature_dim}"
        )
    matrix = matrix.T if matrix.shape[0] == feature_dim else matrix
    if len(matrix) != len(categories) or categories.min() < 0 or categories.max() >= len(LIDARSEG_TO_CLASS):
        raise WeightFileError(
            f"{path}: {len(matrix)} text vectors, {len(categories)} categories from {categories.min()} to "
            f"{categories.max()}; expected is one of 0..{len(LIDARSEG_TO_CLASS) - 1} for each vector"
        )
    if not np.isfinite(matrix).all():
        raise WeightFileError(f"{path}: the text matrix is not finite")
    classes = LIDARSEG_TO_CLASS[categories].astype(np.uint8)
    return TextClassifier(matrix, classes, tuple(f"category {category}" for category in categories))


def _cpu() -> jax.Device:
    return jax.local_devices(backend="cpu")[0]


def _content_key(clip: LoadedCLIP, tokens: np.ndarray) -> str:
    """Hash of everything the result depends on: weights, sizes and arithmetic of the text tower, token ids."""
    digest = hashlib.sha256(f"{_CACHE_VERSION} {clip.model.text.config} {clip.model.text.dtype}".encode())
    for path, parameter in nnx.to_flat_state(nnx.state(clip.model.text, nnx.Param)):
        digest.update(repr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(parameter[...])))
    digest.update(repr(tokens.shape).encode() + tokens.tobytes())
    return digest.hexdigest()[:32]


def _run_tower(clip: LoadedCLIP, tokens: np.ndarray) -> Float[np.ndarray, "texts dim"]:
    """Text features of token rows: equal rows once, rows of like length together, cut where only padding follows."""
    tower = clip.model.text
    unique, inverse = np.unique(tokens, axis=0, return_inverse=True)
    lengths = 1 + np.argmax(unique == tower.config.end_token, axis=1)
    cuts = np.minimum(-(-lengths // _LENGTH_STEP) * _LENGTH_STEP, tower.config.positions)
    graph, state = nnx.split(tower)
    state = jax.device_put(state, _cpu())
    run = jax.jit(lambda state, rows: nnx.merge(graph, state)(rows).text_features.astype(jnp.float32))
    features = np.zeros((len(unique), tower.config.embedding), np.float32)
    for cut in np.unique(cuts):
        rows = np.flatnonzero(cuts == cut)
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            # The last batch repeats its first row, so that one length is compiled once.
            filled = np.resize(batch, _BATCH) if len(rows) > _BATCH else batch
            out = run(state, jax.device_put(unique[filled, :cut], _cpu()))
            features[batch] = jax.device_get(out)[: len(batch)]
    return features[inverse.reshape(-1)]

"""How the tiny CLIP learns: the contrastive loss on crops (class token) and on cells of whole pictures (MaskCLIP)."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, UInt8

from data_prep.tiny_clip_captions import Phrases, sentence
from data_prep.tiny_clip_data import Pictures, draw_batch
from pop3d_jax.models.clip import CLIP
from pop3d_jax.models.maskclip import MaskCLIP, normalise, sample_at_points
from pop3d_jax.progress import progress
from pop3d_jax.text import tokenise

# Tokens of a training sentence: the longest sub-prompt in the longest template has 18.
_LENGTH = 20
_MAX_LOGIT_SCALE = float(np.log(100.0))
# Dense features are kept near this length, per square root of their width: retrieval ranks points by the raw dot
# product, so a length that wanders would count as relevance.
_FEATURE_RMS = 0.5
# Of everything that is no matrix: positions, norms, biases, the patch filters.
_ADAM_LEARNING_RATE = 3e-3


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn. `pictures`, `cells` of each, `crops`: of an image step; `sentences`: of a text
    step."""

    steps: int
    seed: int
    pictures: int = 2
    cells: int = 512
    crops: int = 4
    text_steps: int = 100
    sentences: int = 96
    learning_rate: float = 8e-3
    crop_weight: float = 0.3
    length_weight: float = 0.1


@dataclasses.dataclass(frozen=True)
class StepInput:
    """Arrays of one step of the image tower; `cell_true[cell, phrase]` and `crop_true` say which phrases hold."""

    images: UInt8[ArrayLike, "pictures height width 3"]
    picture: Int[ArrayLike, " cells"]
    pixel: Float[ArrayLike, "cells 2"]
    cell_true: Bool[ArrayLike, "cells phrases"]
    crops: UInt8[ArrayLike, "crops side side 3"]
    crop_true: Bool[ArrayLike, "crops phrases"]


jax.tree_util.register_dataclass(StepInput)


def contrastive_loss(
    features: Float[Array, "things dim"],
    texts: Float[Array, "sentences dim"],
    true: Bool[Array, "things sentences"],
    scale: Float[Array, ""],
) -> Float[Array, ""]:
    """CLIP's symmetric loss where several sentences are true of a thing: each true pair against all false ones.

    Pairs that are true do not compete with each other. With one true sentence a thing this is CLIP's loss.
    """
    features = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    texts = texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)
    logits = scale * features @ texts.T
    false = jnp.where(true, -1e9, logits)

    def one_way(axis: int) -> Float[Array, ""]:
        losses = jax.nn.softplus(jax.nn.logsumexp(false, axis=axis, keepdims=True) - logits)
        pairs = true.sum(axis)
        mean = jnp.where(true, losses, 0).sum(axis) / jnp.maximum(pairs, 1)
        return mean.sum() / jnp.maximum((pairs > 0).sum(), 1)

    return (one_way(1) + one_way(0)) / 2


def train_text(model: CLIP, phrases: Phrases, tokenizer: Any, schedule: Schedule) -> list[float]:
    """Trains the text tower alone, in place, against one free vector per kind of thing.

    The vectors stand for what a perfect image tower would see: so the tower learns which sentences are about the
    same things, whatever the template, before any picture is looked at.

    Returns:
      The loss of every step.
    """
    random = np.random.default_rng([schedule.seed, 1])
    graph, state = nnx.split(model.text)
    dim = model.text.config.embedding
    kinds = jnp.asarray(random.normal(size=(phrases.true_of.shape[1], dim)) / np.sqrt(dim), jnp.float32)
    scale = jnp.exp(model.logit_scale[...])

    def loss(learnt: tuple[nnx.State, Array], inputs: tuple[Array, Array]) -> Float[Array, ""]:
        state, kinds = learnt
        tokens, true = inputs
        return contrastive_loss(kinds, nnx.merge(graph, state)(tokens).text_features, true, scale)

    def inputs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for _ in range(schedule.text_steps):
            said = random.choice(len(phrases.texts), schedule.sentences)
            sentences = [sentence(phrases.texts[i], random) for i in said]
            yield tokenise(tokenizer, sentences, _LENGTH), phrases.true_of[said].T

    (state, _), losses = _descend(
        loss, (state, kinds), inputs(), schedule.text_steps, schedule.learning_rate, "training the text tower"
    )
    nnx.update(model.text, state)
    return losses


def whiten_patches(model: CLIP, pictures: Pictures) -> None:
    """Starts the patch embedding, in place, with the whitened principal components of the pictures' patches.

    Neighbouring pixels are nearly equal, so random filters see little but mean colour, and learning the rest from
    such a start takes most of the steps that there are.
    """
    kernel = model.vision.patch_embedding[...]
    patch, width = kernel.shape[0], kernel.shape[-1]
    images = np.asarray(normalise(jnp.asarray(pictures.images[:: max(1, len(pictures.images) // 64)])))
    rows, columns = images.shape[1] // patch, images.shape[2] // patch
    cut = images[:, : rows * patch, : columns * patch].reshape(len(images), rows, patch, columns, patch, 3)
    patches = cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, patch * patch * 3).astype(np.float64)
    patches -= patches.mean(0)
    variances, directions = np.linalg.eigh(patches.T @ patches / len(patches))
    order = np.argsort(-variances)[:width]
    scale = 1 / np.sqrt(variances[order] + 0.01 * variances.mean())
    filters = directions[:, order] * scale
    fewer = kernel.reshape(-1, width).at[:, : filters.shape[1]].set(jnp.asarray(filters, jnp.float32))
    model.vision.patch_embedding[...] = fewer.reshape(kernel.shape)


def train_images(
    model: CLIP, pictures: Pictures, phrases: Phrases, texts: Float[np.ndarray, "phrases dim"], schedule: Schedule
) -> list[float]:
    """Trains the image tower and the temperature, in place, the text tower being locked.

    Args:
      model: its dense features (MaskCLIP's value path) learn from cells of whole pictures, its class token from crops.
      pictures: to draw from.
      phrases: what is true of which kind.
      texts: text vector of every phrase.
      schedule: sizes and rates.

    Returns:
      The loss of every step.
    """
    random = np.random.default_rng([schedule.seed, 2])
    graph, state = nnx.split(model)
    frozen = state["text"]
    learnt = nnx.State({key: value for key, value in state.items() if key != "text"})
    true_of = np.concatenate([phrases.true_of, np.zeros((len(phrases.texts), 1), bool)], axis=1).T
    phrase_vectors = jnp.asarray(texts)

    def loss(learnt: nnx.State, inputs: StepInput) -> Float[Array, ""]:
        clip = nnx.merge(graph, nnx.State({**learnt, "text": frozen}))
        dense = MaskCLIP(clip, "clip_consistent").dense_features(normalise(inputs.images))
        cells = sample_at_points(dense, inputs.picture, inputs.pixel)
        crops = clip.vision(normalise(inputs.crops)).image_features
        scale = jnp.exp(jnp.minimum(clip.logit_scale[...], _MAX_LOGIT_SCALE))
        length = jnp.log(jnp.sqrt(jnp.mean(cells**2, axis=-1)) / _FEATURE_RMS)
        return (
            contrastive_loss(cells, phrase_vectors, inputs.cell_true, scale)
            + schedule.crop_weight * contrastive_loss(crops, phrase_vectors, inputs.crop_true, scale)
            + schedule.length_weight * jnp.mean(length**2)
        )

    def inputs() -> Iterator[StepInput]:
        for _ in range(schedule.steps):
            batch = draw_batch(pictures, (schedule.pictures, schedule.cells, schedule.crops), random)
            # Kind -1, the sky, is the last row: nothing is true of it.
            yield StepInput(
                batch.images,
                batch.picture,
                batch.pixel,
                true_of[batch.cell_kinds],
                batch.crops,
                true_of[batch.crop_kinds],
            )

    learnt, losses = _descend(
        loss, learnt, inputs(), schedule.steps, schedule.learning_rate, "training the image tower"
    )
    nnx.update(model, learnt)
    return losses


def _optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Muon for matrices, Adam for the rest: in so few steps it gets about half as far again as Adam alone."""

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 20), steps)

    matrices = optax.contrib.muon(
        schedule(learning_rate),
        weight_decay=0.01,
        consistent_rms=0.2,
        adam_b2=0.98,
        adam_weight_decay=0.01,
        adam_learning_rate=schedule(_ADAM_LEARNING_RATE),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), matrices)


def _descend(
    loss: Callable[[Any, Any], Float[Array, ""]],
    learnt: Any,
    inputs: Iterator[Any],
    steps: int,
    learning_rate: float,
    description: str,
) -> tuple[Any, list[float]]:
    """Warm-up and cosine decay; raises FloatingPointError where the loss is no number."""
    optimizer = _optimizer(learning_rate, steps)

    @jax.jit
    def update(learnt: Any, moments: optax.OptState, batch: Any) -> tuple[Any, optax.OptState, Float[Array, ""]]:
        value, gradient = jax.value_and_grad(loss)(learnt, batch)
        change, moments = optimizer.update(gradient, moments, learnt)
        return optax.apply_updates(learnt, change), moments, value

    moments = optimizer.init(learnt)
    losses = []
    for step, batch in enumerate(progress(inputs, steps, description)):
        learnt, moments, value = update(learnt, moments, batch)
        losses.append(float(value))
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"{description}: the loss is {losses[-1]} at step {step}: lower the learning rate")
    return learnt, losses

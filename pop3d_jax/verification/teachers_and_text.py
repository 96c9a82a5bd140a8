"""The CLIP towers, MaskCLIP and prompt ensembles against `tiny_clip.npz`."""

import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pop3d_jax import text
from pop3d_jax.models.clip import load_clip
from pop3d_jax.models.clip_towers import resize_position_embedding
from pop3d_jax.models.maskclip import (
    REFINEMENT_SCALE,
    MaskCLIP,
    cosine_logits,
    denoise_prompts,
    smooth_by_keys,
)
from pop3d_jax.protocol import zero_shot_protocol
from pop3d_jax.verification.checks import Check, absolute, exact, relative
from pop3d_jax.verification.golden_model import GoldenFile, golden_arrays, golden_json

# Values of order 1 after a handful of layers.
_TOLERANCE = 1e-5
_ARRAYS, _INFO, _FOLDER = "clip/tiny_clip.npz", "clip/tiny_clip_info.json", "clip/tiny_clip"

# Either tower, compiled.
_run = nnx.jit(lambda tower, inputs: tower(inputs))


def vision_tower(golden_file: GoldenFile) -> Iterator[Check]:
    """Every stage of CLIP's vision tower, at its own picture size and at a larger one."""
    golden, info = golden_arrays(golden_file(_ARRAYS)), golden_json(golden_file(_INFO))
    vision = load_clip(golden_file(_FOLDER)).model.vision
    larger = info["image_sizes"]["interpolated"]
    for suffix in ("", f"_{larger}"):
        pixels = jnp.asarray(golden[f"pixel_values{suffix}"].transpose(0, 2, 3, 1))
        found = _run(vision, pixels)
        features = found.image_features
        stages = {
            "embeddings": found.embeddings,
            "pre_layernorm": found.pre_layernorm,
            **{f"layer_{i}": layer for i, layer in enumerate(found.layers)},
            "last_hidden_state": found.layers[-1],
            "pooled": found.pooled,
            "image_embeds": features,
            "image_embeds_normalised": _unit(features),
            "patch_embeds": found.patch_features,
        }
        yield from _stages(stages, golden, f"vision{suffix}/")
    grid = info["image_sizes"]["interpolated_grid"]
    rows, columns = map(int, grid.split("x"))
    resized = resize_position_embedding(vision.position_embedding[...], (rows, columns))[None]
    name = f"position_embedding/resized_{grid}_align_corners_false"
    yield absolute(name, np.asarray(resized), golden[name], _TOLERANCE)


def text_tower(golden_file: GoldenFile) -> Iterator[Check]:
    """Tokens and every stage of CLIP's text tower; stages at real tokens, padding has no meaning."""
    golden, info = golden_arrays(golden_file(_ARRAYS)), golden_json(golden_file(_INFO))
    clip = load_clip(golden_file(_FOLDER))
    tokens = text.tokenise(clip.tokenizer, info["texts"], clip.model.text.config.positions)
    yield exact("input_ids", tokens, golden["input_ids"])
    # The stored tokens from here on, so that a token that differs counts once.
    found = _run(clip.model.text, jnp.asarray(golden["input_ids"], jnp.int32))
    real = golden["attention_mask"].astype(bool)
    stages = {
        "embeddings": found.embeddings,
        **{f"layer_{i}": layer for i, layer in enumerate(found.layers)},
        "last_hidden_state": found.last_hidden_state,
    }
    for name, ours in stages.items():
        key = f"text/{name}"
        expected = golden[key][real]
        yield absolute(key, np.asarray(ours)[real], expected, _TOLERANCE * _size(expected), "real tokens")
    vectors = _unit(found.text_features)
    ends = {"pooled": found.pooled, "text_embeds": found.text_features, "text_embeds_normalised": vectors}
    yield from _stages(ends, golden, "text/")
    scale = clip.model.logit_scale[...]
    yield absolute("logit_scale", np.asarray(scale), golden["logit_scale"], _TOLERANCE)
    logits = jnp.exp(scale) * jnp.asarray(golden["vision/image_embeds_normalised"]) @ vectors.T
    yield relative("logits_per_image", np.asarray(logits), golden["logits_per_image"], _TOLERANCE, 1.0)


def maskclip(golden_file: GoldenFile) -> Iterator[Check]:
    """MaskCLIP's dense features in both variants and at every stored size, and its refinement."""
    golden, info = golden_arrays(golden_file(_ARRAYS)), golden_json(golden_file(_INFO))
    clip = load_clip(golden_file(_FOLDER)).model
    sizes = info["image_sizes"]
    texts = jnp.asarray(golden["text_ensemble/embeddings"])
    for variant, facts in info["maskclip_variants"].items():
        teacher = MaskCLIP(clip, variant)
        config = teacher.vision.config
        differing = (config.activation, config.layer_norm_epsilon) != (facts["hidden_act"], facts["layer_norm_eps"])
        yield Check(f"maskclip/{variant}: activation and epsilon", 0.0, float(differing))
        for size in ("base", "interpolated", "padded_input"):
            name = sizes[size]
            pixels = golden["pixel_values" if size == "base" else f"pixel_values_{name}"]
            images = jnp.asarray(pixels.transpose(0, 2, 3, 1))
            patches = nnx.jit(lambda model, x: model.patches(x))(teacher, images)
            patch = config.patch_size
            padded = jnp.pad(images, ((0, 0), (0, -images.shape[1] % patch), (0, -images.shape[2] % patch), (0, 0)))
            plain = _run(teacher.vision, padded).patch_features.reshape(patches.features.shape)
            keys = patches.keys
            found = {
                "dense_features": _channels_first(patches.features),
                "v_after_final_norm": _channels_first(patches.values),
                "k_out_projected": keys.reshape(keys.shape[0], -1, keys.shape[-1]),
                "logits": _channels_first(cosine_logits(patches.features, texts)),
                "plain_patch_features": _channels_first(plain),
            }
            yield from _stages(found, golden, f"maskclip/{variant}/{name}/")
    yield from _refinement(golden, info["refinement"], float(info["refinement_softmax_scale"]))


def prompt_ensemble(golden_file: GoldenFile) -> Iterator[Check]:
    """Tokens, vectors and the average of prompts of the official list."""
    golden, info = golden_arrays(golden_file(_ARRAYS), "text_ensemble/"), golden_json(golden_file(_INFO))
    clip = load_clip(golden_file(_FOLDER))
    names, templates = info["text_ensemble"]["names"], info["text_ensemble"]["templates"]
    texts = [template.format(name) for name in names for template in templates]
    shape = golden["input_ids"].shape
    tokens = text.tokenise(clip.tokenizer, texts, clip.model.text.config.positions)
    yield exact("text_ensemble/input_ids", tokens.reshape(shape), golden["input_ids"])
    vectors = text.embed_texts(clip, texts).reshape(*shape[:2], -1)
    expected = golden["per_prompt_embeds"]
    yield absolute("text_ensemble/per_prompt_embeds", vectors, expected, _TOLERANCE)
    ensemble = np.asarray(text.ensemble(jnp.asarray(vectors)))
    yield absolute("text_ensemble/embeddings", ensemble, golden["embeddings"], _TOLERANCE)
    official = zero_shot_protocol().templates
    yield exact("head of the prompt templates", np.asarray(official[: len(templates)]), np.asarray(templates))
    count = info["text_ensemble"]["number_of_templates_in_the_official_list"]
    yield exact("number of prompt templates", np.asarray(len(official)), np.asarray(count))


def _refinement(
    golden: Mapping[str, np.ndarray], settings: Mapping[str, Mapping[str, float]], scale: float
) -> Iterator[Check]:
    """On official logits and keys, so that rounding elsewhere cannot move a patch over a threshold."""
    yield exact("refinement_softmax_scale", np.asarray(REFINEMENT_SCALE), np.asarray(scale))
    for key, expected in golden.items():
        match = re.fullmatch(r"(.+)/logits_refined_(\w+)", key)
        if not match:
            continue
        thresholds = settings[match[2]]
        refined = jnp.asarray(golden[f"{match[1]}/logits"].transpose(0, 2, 3, 1))
        keys = jnp.asarray(golden[f"{match[1]}/k_out_projected"].reshape(*refined.shape[:3], -1))
        if "pd_thresh" in thresholds:
            refined = denoise_prompts(refined, thresholds["pd_thresh"])
        if "ks_thresh" in thresholds:
            refined = smooth_by_keys(refined, keys, thresholds["ks_thresh"])
        yield absolute(key, _channels_first(refined), expected, _TOLERANCE)


def _stages(
    found: Mapping[str, jax.Array | np.ndarray], golden: Mapping[str, np.ndarray], prefix: str
) -> Iterator[Check]:
    for name, ours in found.items():
        expected = golden[f"{prefix}{name}"]
        yield absolute(f"{prefix}{name}", np.asarray(ours), expected, _TOLERANCE * _size(expected))


def _size(array: np.ndarray) -> float:
    """What the tolerance grows with: the largest element, where that is above 1."""
    return max(1.0, float(np.abs(array).max()))


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _channels_first(grid: jax.Array) -> np.ndarray:
    return np.asarray(grid).transpose(0, 3, 1, 2)

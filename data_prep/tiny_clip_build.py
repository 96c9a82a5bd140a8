"""The tiny CLIP from a world to a judged folder: what the command `data_prep.tiny_clip` does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax import nnx

from data_prep.tiny_clip_captions import phrases_about, read_kinds, train_tokenizer
from data_prep.tiny_clip_data import read_pictures
from data_prep.tiny_clip_evaluation import evaluate_teacher
from data_prep.tiny_clip_training import Schedule, train_images, train_text, whiten_patches
from pop3d_jax.models.clip import CLIP, LoadedCLIP, load_clip, save_clip, tower_configs
from pop3d_jax.protocol import zero_shot_protocol
from pop3d_jax.text import embed_phrases

_MODEL_CARD = """# A stand-in, not CLIP

This folder has CLIP's architecture and file format, made very small, and was trained from scratch for {steps} steps
on pictures and captions of a synthetic driving world (seed {seed}). It knows the colours, things and surfaces of
that world and nothing else. It serves demos and tests that must run without a download; for anything real, use a
real CLIP.

Give it whole pictures at {height} x {width} pixels. Zero-shot accuracy at the lidar points of held-out scenes of its
world: {accuracy:.3f} of the points, {mean_class_accuracy:.3f} mean over classes (zero_shot.json).
"""


def clip_config(vocabulary: int) -> Any:
    """Sizes of the tiny CLIP as a `transformers.CLIPConfig`."""
    from transformers import CLIPConfig

    common = {"projection_dim": 64, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    return CLIPConfig(
        projection_dim=64,
        text_config={
            "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 77, "vocab_size": vocabulary, "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1, **common,
        },
        vision_config={
            "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": 64, "patch_size": 8, **common,
        },
    )  # fmt: skip


def make_tiny_clip(
    world: Path, out: Path, *, schedule: Schedule, image_hw: tuple[int, int], max_pictures: int, max_key_frames: int
) -> tuple[list[float], dict[str, Any]]:
    """Trains, saves, loads again and judges.

    Returns:
      The loss of every step of the image tower, and what `evaluate_teacher` says about the saved
      folder (also in zero_shot.json).
    """
    scenes = json.loads((world / "world.json").read_text())["train_scenes"]
    kinds, numbers = read_kinds(world, scenes)
    phrases = phrases_about(kinds)
    tokenizer = train_tokenizer(phrases.texts, out)
    config = clip_config(len(tokenizer))
    vision, text = tower_configs(config)
    pictures = read_pictures(
        world,
        numbers,
        image_hw=image_hw,
        crop_side=vision.image_size,
        max_pictures=max_pictures,
        random=np.random.default_rng(schedule.seed),
    )
    logging.info(
        "%d pictures, %d crops, %d kinds of things, %d phrases, %d tokens",
        len(pictures.images), len(pictures.crops), len(kinds), len(phrases.texts), len(tokenizer),
    )  # fmt: skip
    model = CLIP(vision, text, rngs=nnx.Rngs(schedule.seed))
    train_text(model, phrases, tokenizer, schedule)
    # Every fifth template says as much as all of them, in a fifth of the time.
    texts = embed_phrases(
        LoadedCLIP(model, tokenizer, config, str(out)), phrases.texts, templates=zero_shot_protocol().templates[::5]
    )
    whiten_patches(model, pictures)
    losses = train_images(model, pictures, phrases, texts, schedule)
    save_clip(out, model, config, tokenizer)
    result = evaluate_teacher(load_clip(out), world, split="val", image_hw=image_hw, max_key_frames=max_key_frames)
    height, width = image_hw
    result |= {"image_hw": [height, width], "steps": schedule.steps, "seed": schedule.seed}
    (out / "zero_shot.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "README.md").write_text(_MODEL_CARD.format(height=height, width=width, **result))
    return losses, result

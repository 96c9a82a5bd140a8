"""CLIP as one module, and its Hugging Face folder: loaded and saved without PyTorch.

Config and tokenizer are read by `transformers`, weights from safetensors (one file or shards with an index).
"""

import dataclasses
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from pop3d_jax.models.clip_towers import TextConfig, TextTower, VisionConfig, VisionTower
from pop3d_jax.models.hugging_face import (
    Place,
    find_folder,
    open_tensors,
    read_config,
    to_published,
    weight_files,
    with_tensors,
)

# Our parameter paths -> the names `transformers` gives them. Blocks have the same names in both.
_RENAMES = (
    ("vision.class_embedding", "vision_model.embeddings.class_embedding"),
    ("vision.patch_embedding", "vision_model.embeddings.patch_embedding.weight"),
    ("vision.position_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("vision.pre_layernorm.", "vision_model.pre_layrnorm."),  # misspelt in every published checkpoint
    ("vision.layers.", "vision_model.encoder.layers."),
    ("vision.post_layernorm.", "vision_model.post_layernorm."),
    ("vision.projection.", "visual_projection."),
    ("text.token_embedding", "text_model.embeddings.token_embedding.weight"),
    ("text.position_embedding", "text_model.embeddings.position_embedding.weight"),
    ("text.layers.", "text_model.encoder.layers."),
    ("text.final_layer_norm.", "text_model.final_layer_norm."),
    ("text.projection.", "text_projection."),
    ("logit_scale", "logit_scale"),
)
# Old checkpoints carry these counters 0, 1, 2, ...; they are not parameters.
_BUFFERS = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")
# OpenAI's configs say 2, a mistake kept for compatibility: the end token is then the largest id.
_LEGACY_END_TOKEN = 2
# Sizes of the published teacher, as its config.json has them: to compile a program no weights are needed.
_COMMON = {"embedding": 512, "layers": 12, "activation": "quick_gelu", "layer_norm_epsilon": 1e-5}
_PUBLISHED = {
    "openai/clip-vit-base-patch16": (
        VisionConfig(image_size=224, patch_size=16, width=768, heads=12, mlp_width=3072, **_COMMON),
        TextConfig(vocabulary=49_408, positions=77, end_token=49_407, width=512, heads=8, mlp_width=2048, **_COMMON),
    )
}


class CLIP(nnx.Module):
    """Both towers and the learned temperature: similarity = exp(logit_scale) * cosine."""

    def __init__(self, vision: VisionConfig, text: TextConfig, *, dtype: str = "float32", rngs: nnx.Rngs):
        self.vision = VisionTower(vision, dtype=dtype, rngs=rngs)
        self.text = TextTower(text, dtype=dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)))


@dataclasses.dataclass(frozen=True)
class LoadedCLIP:
    """A CLIP with its tokenizer (`transformers` tokenizer), its `transformers` config and where it came from."""

    model: CLIP
    tokenizer: Any
    config: Any
    name: str


def tower_configs(config: Any) -> tuple[VisionConfig, TextConfig]:
    """Sizes of both towers from a `transformers.CLIPConfig`.

    Raises:
      ValueError: the vision tower does not take three channels.
    """
    vision, text = config.vision_config, config.text_config
    if vision.num_channels != 3:
        raise ValueError(f"a CLIP for {vision.num_channels} channels; pictures here have 3")

    def common(tower: Any) -> dict[str, Any]:
        return {
            "width": tower.hidden_size,
            "layers": tower.num_hidden_layers,
            "heads": tower.num_attention_heads,
            "mlp_width": tower.intermediate_size,
            "embedding": config.projection_dim,
            "activation": tower.hidden_act,
            "layer_norm_epsilon": tower.layer_norm_eps,
        }

    end_token = text.vocab_size - 1 if text.eos_token_id == _LEGACY_END_TOKEN else text.eos_token_id
    return (
        VisionConfig(image_size=vision.image_size, patch_size=vision.patch_size, **common(vision)),
        TextConfig(
            vocabulary=text.vocab_size,
            positions=text.max_position_embeddings,
            end_token=end_token,
            **common(text),
        ),
    )


def load_clip(name_or_path: str | os.PathLike[str], *, dtype: str = "float32") -> LoadedCLIP:
    """Loads a CLIP.

    Args:
      name_or_path: a folder in Hugging Face format, or a hub name such as `openai/clip-vit-base-patch16`, which is
        downloaded once into the Hugging Face cache; `name@revision` picks a revision.
      dtype: what the towers compute in; parameters are always float32.

    Raises:
      FileNotFoundError: no such folder or hub name, or a file of it is missing.
      ValueError: the folder holds something else than a CLIP, has weights in PyTorch's format only, or its tensors
        are not exactly those of its config (all missing, unknown and misshapen keys are listed).
    """
    name = os.fspath(name_or_path)
    folder = find_folder(name, "CLIP")
    config = read_config(folder, name, "CLIP", ["clip"])
    weights = weight_files(folder, name, "CLIPModel")
    vision, text = tower_configs(config)
    abstract = nnx.eval_shape(lambda: CLIP(vision, text, dtype=dtype, rngs=nnx.Rngs(0)))
    places = {path: Place(key) for path, key, _ in _named_parameters(abstract)}
    with open_tensors(weights) as (shapes, read):
        model = with_tensors(abstract, places, shapes, read, unused=_BUFFERS, name=name)
    tokenizer = _read_tokenizer(folder, name)
    if len(tokenizer) > text.vocabulary:
        raise ValueError(
            f"{name}: the tokenizer knows {len(tokenizer)} tokens, the text tower {text.vocabulary}: they do not "
            "belong together; copy the tokenizer files that came with the weights"
        )
    return LoadedCLIP(model, tokenizer, config, name)


def abstract_clip(name_or_path: str | os.PathLike[str], *, dtype: str = "float32") -> CLIP:
    """The structure of a CLIP without its weights.

    Args:
      name_or_path: a folder in Hugging Face format, or the published "openai/clip-vit-base-patch16", for which
        neither files nor network are needed.
      dtype: what the towers compute in.

    Raises:
      FileNotFoundError, ValueError: neither of the two, or no CLIP.
    """
    name = os.fspath(name_or_path)
    if Path(name).is_dir():
        vision, text = tower_configs(read_config(Path(name), name, "CLIP", ["clip"]))
    elif name in _PUBLISHED:
        vision, text = _PUBLISHED[name]
    else:
        raise FileNotFoundError(f"the sizes of {name} are not known here: give a folder that has its config.json")
    return nnx.eval_shape(lambda: CLIP(vision, text, dtype=dtype, rngs=nnx.Rngs(0)))


def save_clip(
    folder: str | os.PathLike[str], model: CLIP, config: Any, tokenizer: Any, *, readme: str | None = None
) -> None:
    """Writes a folder that `load_clip` and `transformers` load: config, weights, tokenizer files.

    Args:
      folder: created if need be; files of an earlier save are overwritten.
      model: the towers; their sizes must be those of `config`.
      config: a `transformers.CLIPConfig`.
      tokenizer: a `transformers.CLIPTokenizer`.
      readme: text of the model card, if any.

    Raises:
      ValueError: sizes of model and config differ.
    """
    if tower_configs(config) != (model.vision.config, model.text.config):
        raise ValueError(f"cannot save to {folder}: the config does not describe this model")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: np.array(to_published(np.asarray(parameter[...], np.float32), path), order="C")
        for path, key, parameter in _named_parameters(model)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["CLIPModel"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for older readers
    if readme is not None:
        (folder / "README.md").write_text(readme)


def _read_tokenizer(folder: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise FileNotFoundError(f"{name} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        return AutoTokenizer.from_pretrained(folder)


def _named_parameters(model: CLIP) -> Iterator[tuple[tuple[Any, ...], str, nnx.Variable]]:
    """(our path, published key, parameter) of every parameter."""
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        key = ".".join(map(str, path))
        ours, published = next(rename for rename in _RENAMES if key.startswith(rename[0]))
        key = published + key.removeprefix(ours)
        yield path, key.replace(".kernel", ".weight").replace(".scale", ".weight"), parameter

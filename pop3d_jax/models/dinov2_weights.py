"""DINOv2's weights: from a Hugging Face folder, or from a checkpoint of the original code (facebookresearch/dinov2).

Strictly: the official loading leaves out silently what does not fit (`strict=False`); here that is an error.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from flax import nnx

from pop3d_jax.models.dinov2 import DINOv2, DINOv2Config
from pop3d_jax.models.hugging_face import (
    ParameterPath,
    Place,
    find_folder,
    open_tensors,
    read_config,
    weight_files,
    with_tensors,
)

_MODEL_TYPES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
# Our module or parameter -> its name in Hugging Face's files; those of a block follow the block's number.
_HUGGING_FACE = {
    "class_token": Place("embeddings.cls_token"),
    "register_tokens": Place("embeddings.register_tokens"),
    "position_embedding": Place("embeddings.position_embeddings"),
    "patch_embedding": Place("embeddings.patch_embeddings.projection.weight"),
    "patch_bias": Place("embeddings.patch_embeddings.projection.bias"),
    "layer_norm1": Place("norm1"),
    "self_attn.q_proj": Place("attention.attention.query"),
    "self_attn.k_proj": Place("attention.attention.key"),
    "self_attn.v_proj": Place("attention.attention.value"),
    "self_attn.out_proj": Place("attention.output.dense"),
    "layer_scale1": Place("layer_scale1.lambda1"),
    "layer_norm2": Place("norm2"),
    "mlp.fc1": Place("mlp.fc1"),
    "mlp.fc2": Place("mlp.fc2"),
    "mlp.gate_proj": Place("mlp.weights_in", 0, 2),
    "mlp.up_proj": Place("mlp.weights_in", 1, 2),
    "mlp.down_proj": Place("mlp.weights_out"),
    "layer_scale2": Place("layer_scale2.lambda1"),
    "final_layer_norm": Place("layernorm"),
}
# The same in files of the original code.
_ORIGINAL = {
    "class_token": Place("cls_token"),
    "register_tokens": Place("register_tokens"),
    "position_embedding": Place("pos_embed"),
    "patch_embedding": Place("patch_embed.proj.weight"),
    "patch_bias": Place("patch_embed.proj.bias"),
    "layer_norm1": Place("norm1"),
    "self_attn.q_proj": Place("attn.qkv", 0, 3),
    "self_attn.k_proj": Place("attn.qkv", 1, 3),
    "self_attn.v_proj": Place("attn.qkv", 2, 3),
    "self_attn.out_proj": Place("attn.proj"),
    "layer_scale1": Place("ls1.gamma"),
    "layer_norm2": Place("norm2"),
    "mlp.fc1": Place("mlp.fc1"),
    "mlp.fc2": Place("mlp.fc2"),
    "mlp.gate_proj": Place("mlp.w12", 0, 2),
    "mlp.up_proj": Place("mlp.w12", 1, 2),
    "mlp.down_proj": Place("mlp.w3"),
    "layer_scale2": Place("ls2.gamma"),
    "final_layer_norm": Place("norm"),
}
_LEAVES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}
# Stands in for patches that pretraining hides: of no use to a finished network.
_MASK_TOKEN, _ORIGINAL_MASK_TOKEN = "embeddings.mask_token", "mask_token"
_HEAD_WIDTH = 64  # of every published size; arrays do not tell it

# Published sizes, as their config.json has them: to compile a program no files are needed.
_SIZES = {
    "small": DINOv2Config(width=384, layers=12, heads=6, mlp_width=1536, image_size=518, patch_size=14),
    "base": DINOv2Config(width=768, layers=12, heads=12, mlp_width=3072, image_size=518, patch_size=14),
    "large": DINOv2Config(width=1024, layers=24, heads=16, mlp_width=4096, image_size=518, patch_size=14),
    "giant": DINOv2Config(width=1536, layers=40, heads=24, mlp_width=4096, image_size=518, patch_size=14, swiglu=True),
}
PUBLISHED = {f"facebook/dinov2-{size}": config for size, config in _SIZES.items()} | {
    f"facebook/dinov2-with-registers-{size}": dataclasses.replace(config, registers=4)
    for size, config in _SIZES.items()
}


def load_dinov2(
    name_or_path: str | os.PathLike[str] = "",
    *,
    weights: epath.PathLike = "",
    position_rule: str = "official",
    dtype: str = "float32",
) -> DINOv2:
    """Loads a DINOv2.

    Args:
      name_or_path: a folder in Hugging Face format, or a hub name such as `facebook/dinov2-large`, which is downloaded
        once into the Hugging Face cache. With `weights` it only tells the sizes; "" leaves that to the arrays.
      weights: a .pth file of the original code, or the same arrays as .safetensors.
      position_rule: a key of `pop3d_jax.models.dinov2.POSITION_RULES`.
      dtype: what matrix products are computed in; parameters are always float32.

    Raises:
      FileNotFoundError: no such folder or hub name, or a file of it is missing.
      ValueError: no DINOv2, an unknown rule, weights in another format, or tensors that are not exactly those of the
        config (all missing, unknown and misshapen ones are listed).
      WeightFileError: see `pop3d_jax.torch_files.read_state_dict`.
    """
    name = os.fspath(name_or_path)
    if weights:
        return _load_original(name, os.fspath(weights), position_rule, dtype)
    folder = find_folder(name, "DINOv2")
    config = read_config(folder, name, "DINOv2", _MODEL_TYPES)
    abstract = _abstract(network_config(config, name), position_rule, dtype)
    with open_tensors(weight_files(folder, name, _MODEL_TYPES[config.model_type])) as (shapes, read):
        return with_tensors(abstract, places(abstract), shapes, read, unused=[_MASK_TOKEN], name=name)


def abstract_dinov2(
    name_or_path: str | os.PathLike[str],
    *,
    weights: epath.PathLike = "",
    position_rule: str = "official",
    dtype: str = "float32",
) -> DINOv2:
    """The structure of a DINOv2 without its weights.

    Args:
      name_or_path: a folder in Hugging Face format, or one of `PUBLISHED`, for which no files are needed.
      weights: as `load_dinov2`; read for the sizes where `name_or_path` is "".
      position_rule, dtype: see `load_dinov2`.

    Raises:
      FileNotFoundError, ValueError, WeightFileError: nothing that tells the sizes, or no DINOv2.
    """
    name = os.fspath(name_or_path)
    if weights and not name:
        config = original_config(_original_arrays(os.fspath(weights)), os.fspath(weights))
    else:
        config = _known_config(name)
    return _abstract(config, position_rule, dtype)


def network_config(config: Any, name: str) -> DINOv2Config:
    """Sizes from a `transformers` config.

    Args:
      config: a Dinov2Config or Dinov2WithRegistersConfig.
      name: where it is from, for messages.

    Raises:
      ValueError: not three channels, or pictures or patches that are no squares.
    """
    if config.num_channels != 3:
        raise ValueError(f"{name}: a DINOv2 for {config.num_channels} channels; pictures here have 3")
    hidden = int(config.hidden_size * config.mlp_ratio)
    return DINOv2Config(
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        # SwiGLU has three matrices for two: two thirds of the width, rounded up to a multiple of 8.
        mlp_width=(int(hidden * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else hidden,
        image_size=_square(config.image_size, f"{name}: image_size"),
        patch_size=_square(config.patch_size, f"{name}: patch_size"),
        registers=getattr(config, "num_register_tokens", 0),
        swiglu=config.use_swiglu_ffn,
        qkv_bias=config.qkv_bias,
        activation=config.hidden_act,
        layer_norm_epsilon=config.layer_norm_eps,
    )


def places(model: DINOv2, *, original: bool = False) -> dict[ParameterPath, Place]:
    """Where a file keeps each parameter of a network, which may be abstract.

    Args:
      model: the network.
      original: under the names of the original code, which has query, key and value in one tensor; else under those of
        Hugging Face's files.
    """
    table, blocks = (_ORIGINAL, "blocks") if original else (_HUGGING_FACE, "encoder.layer")
    found = {}
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        names = [str(part) for part in path]
        ending = _LEAVES.get(names[-1], "")
        if ending:
            names.pop()
        prefix = ""
        if names[0] == "layers":
            prefix, names = f"{blocks}.{names[1]}.", names[2:]
        place = table[".".join(names)]
        found[path] = dataclasses.replace(place, key=prefix + place.key + ending)
    return found


def original_config(arrays: Mapping[str, np.ndarray], name: str) -> DINOv2Config:
    """Sizes from the arrays of the original code; heads are 64 wide, as in every published size.

    Args:
      arrays: by their names there, blocks not in chunks.
      name: of the file, for messages.

    Raises:
      ValueError: arrays that tell the sizes are not there, or the width is no multiple of 64.
    """
    swiglu = "blocks.0.mlp.w3.weight" in arrays
    hidden = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, hidden: 2}
    absent = [key for key, axes in needed.items() if key not in arrays or arrays[key].ndim != axes]
    if absent:
        raise ValueError(
            f"{name} is no checkpoint of the original DINOv2 code: without {', '.join(absent)}. Expected is a file "
            "such as dinov2_vitl14_pretrain.pth"
        )
    width, patch = arrays["cls_token"].shape[-1], arrays["patch_embed.proj.weight"].shape[-1]
    if width % _HEAD_WIDTH:
        raise ValueError(
            f"{name}: how many heads a DINOv2 of width {width} has cannot be told from its arrays: name a folder with "
            "its config.json too, by --config.teacher.path"
        )
    blocks = [re.match(r"blocks\.(\d+)\.", key) for key in arrays]
    return DINOv2Config(
        width=width,
        layers=1 + max(int(block[1]) for block in blocks if block),
        heads=width // _HEAD_WIDTH,
        mlp_width=arrays[hidden].shape[1],
        image_size=math.isqrt(arrays["pos_embed"].shape[1] - 1) * patch,
        patch_size=patch,
        registers=arrays["register_tokens"].shape[1] if "register_tokens" in arrays else 0,
        swiglu=swiglu,
        qkv_bias="blocks.0.attn.qkv.bias" in arrays,
    )


def _load_original(name: str, weights: str, position_rule: str, dtype: str) -> DINOv2:
    arrays = _original_arrays(weights)
    abstract = _abstract(_known_config(name) if name else original_config(arrays, weights), position_rule, dtype)
    shapes = {key: array.shape for key, array in arrays.items()}
    # Arrays leave the dictionary as they are read, so that the file's copy shrinks while the model grows.
    return with_tensors(
        abstract, places(abstract, original=True), shapes, arrays.pop, unused=[_ORIGINAL_MASK_TOKEN], name=weights
    )


def _original_arrays(weights: str) -> dict[str, np.ndarray]:
    """The arrays of a file of the original code; chunks of blocks (`blocks.CHUNK.NUMBER.`) keep the blocks' numbers."""
    # Here, not above: whoever has a folder needs no reader of .pth files.
    from pop3d_jax.torch_files import read_state_dict

    state = read_state_dict(weights)
    arrays: dict[str, np.ndarray] = {}
    for key in list(state):
        plain = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)
        if plain in arrays:
            raise ValueError(f"{weights} has {plain} twice, once as {key}: it is no checkpoint of one network")
        arrays[plain] = state.pop(key)
    return arrays


def _known_config(name: str) -> DINOv2Config:
    """Sizes from a folder's config.json or of a published network."""
    if Path(name).is_dir():
        return network_config(read_config(Path(name), name, "DINOv2", _MODEL_TYPES), name)
    if name in PUBLISHED:
        return PUBLISHED[name]
    raise FileNotFoundError(
        f"the sizes of {name!r} are not known here: give a folder that has its config.json, or one of "
        + ", ".join(PUBLISHED)
        + '; or "" beside weights of the original code, which tell theirs'
    )


def _abstract(config: DINOv2Config, position_rule: str, dtype: str) -> DINOv2:
    return nnx.eval_shape(lambda: DINOv2(config, position_rule, dtype=dtype, rngs=nnx.Rngs(0)))


def _square(size: Any, what: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"{what} is {size}: only squares are known here")
    return sides.pop()

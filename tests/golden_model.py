"""The golden sets' small network, built from their config and reference weights; shared by several tests."""

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from flax import nnx

from pop3d_jax.convert import computed_buffers, state_dict_to_model
from pop3d_jax.models.pop3d import Pop3D, Pop3DConfig

GoldenFile = Callable[[str], Path]


def reference_weights(golden_file: GoldenFile) -> ModuleType:
    """The golden set's own `reference_weights.py`."""
    spec = importlib.util.spec_from_file_location("reference_weights", golden_file("pop3d/reference_weights.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_from_official(official: Mapping[str, Any]) -> Pop3DConfig:
    """Our config of an official one, as `tiny_config.json` writes it."""
    model = official["model"]
    head, aggregator, backbone = model["tpv_head"], model["tpv_aggregator"], model["img_backbone"]
    encoder = head["encoder"]
    layers = encoder["transformerlayers"]
    images = layers["attn_cfgs"][1]["deformable_attention"]
    return Pop3DConfig(
        backbone_depth=backbone["depth"],
        deformable_stages=tuple(backbone["stage_with_dcn"]),
        grid_size=(head["tpv_w"], head["tpv_h"], head["tpv_z"]),
        volume_minimum=tuple(head["pc_range"][:3]),
        volume_maximum=tuple(head["pc_range"][3:]),
        num_cameras=head["num_cams"],
        num_levels=head["num_feature_levels"],
        embed_dims=head["embed_dims"],
        num_heads=official["num_heads"],
        num_layers=encoder["num_layers"],
        self_attention_points=official["self_attention"]["num_points"],
        cross_attention_anchors=tuple(images["num_z_anchors"]),
        cross_attention_points=tuple(images["num_points"]),
        feedforward_dims=layers["feedforward_channels"],
        dropout=layers["ffn_dropout"],
        occupancy_classes=aggregator["nbr_classes"],
        hidden_dims=aggregator["hidden_dims"],
        out_dims=aggregator["out_dims"],
        decoder_layers=aggregator["dec_layers_occupancy"],
        feature_dim=aggregator["feature_dim"],
        feature_hidden_dims=aggregator["hidden_dims_ft"],
        feature_out_dims=aggregator["out_dims_ft"],
        feature_decoder_layers=aggregator["dec_layers_features"],
        upscale=(aggregator["scale_w"], aggregator["scale_h"], aggregator["scale_z"]),
        grid_mask=model["use_grid_mask"],
        remat="none",
    )


def reference_state(
    weights: ModuleType, inventory: Iterable[tuple[str, list[int]]], buffers: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A whole official state dict: drawn weights, and the buffers that the network computes."""
    return {
        key: buffers[key] if weights.is_computed_buffer(key) else weights.reference_weight(key, shape)
        for key, shape in inventory
    }


def tiny_model(golden_file: GoldenFile) -> Pop3D:
    """The network of `tiny_model.npz`, reference weights loaded."""
    official = json.loads(golden_file("pop3d/tiny_config.json").read_text())
    model = nnx.eval_shape(lambda: Pop3D(config_from_official(official), rngs=nnx.Rngs(0)))
    weights = reference_weights(golden_file)
    state_dict_to_model(reference_state(weights, official["state_dict"], computed_buffers(model)), model)
    return model

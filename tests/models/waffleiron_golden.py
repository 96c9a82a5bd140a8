"""The small WaffleIron of a golden set, and its inputs, in our layout."""

import json

import jax.numpy as jnp
import numpy as np
from flax import nnx
from official_weights import reference_weight_function

from pop3d_jax.models.waffleiron import WaffleIron, WaffleIronConfig
from pop3d_jax.models.waffleiron_weights import official_shapes, state_dict_to_waffleiron


class TinyGolden:
    """`tiny_model.npz` and what belongs to it; `norms` are those that the set has."""

    def __init__(self, golden_file):
        self.arrays = dict(np.load(golden_file("scalr/tiny_model.npz")))
        self.info = json.loads(golden_file("scalr/tiny_config.json").read_text())
        self.reference_weight = reference_weight_function(golden_file("scalr/reference_weights.py"))
        self.norms = sorted({name.split("/")[0] for name in self.arrays if name.endswith("/out")})
        self.modes = sorted({name.split("/")[1] for name in self.arrays if name.endswith("/out")})

    def config(self, norm, **settings):
        """Sizes of the network, other `settings` instead."""
        sizes = self.info["config"]
        official = {
            "input_channels": sizes["input_channels"],
            "channels": sizes["feat_channels"],
            "depth": sizes["depth"],
            "grid_shapes": sizes["grid_shape"],
            "projection_axes": sizes["dim_proj"],
            "output_channels": sizes["nb_class"],
            "drop_path": sizes["drop_path_prob"],
            "norm": norm,
        }
        return WaffleIronConfig(**official | settings)

    def model(self, norm, **settings):
        """The network with reference weights."""
        return filled(WaffleIron(self.config(norm, **settings), rngs=nnx.Rngs(0)), self.reference_weight)

    def inputs(self):
        """Arguments of the network's call."""
        return {
            "point_features": jnp.asarray(points_last(self.arrays["in/feat"])),
            "neighbors": jnp.asarray(points_last(self.arrays["in/neighbors_emb"])),
            "cells": jnp.asarray(self.arrays["in/cell_ind"]),
            "point_mask": jnp.asarray(self.arrays["in/occupied_cell"] > 0),
        }

    def noise(self, norm, mode):
        """Float32 noise of the official run, as a share of its largest output."""
        exact = self.arrays[f"{norm}/{mode}/out_float64"]
        return np.abs(self.arrays[f"{norm}/{mode}/out"] - exact).max() / np.abs(exact).max()


def filled(model, reference_weight):
    """The model, with reference weights by the official names."""
    shapes = official_shapes(model)
    state_dict_to_waffleiron({key: reference_weight(key, shape) for key, shape in shapes.items()}, model)
    return model


def points_last(array):
    """(cloud, channel, point) <-> (cloud, point, channel)."""
    return np.asarray(array).swapaxes(1, 2)

"""WaffleIron's forward pass against the official numbers of a small network, and what other families need of it."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from pop3d_jax.models.waffleiron import WaffleIron, WaffleIronConfig
from pop3d_jax.models.waffleiron_layers import cell_weights, flatten
from pop3d_jax.models.waffleiron_weights import official_shapes, state_dict_to_waffleiron, waffleiron_to_state_dict
from pop3d_jax.verification.checks import Check, absolute, relative
from pop3d_jax.verification.golden_model import GoldenFile, golden_arrays, golden_json, reference_weights

# Two float32 runs differ by the noise of both, which the official one against float64 is a sample of.
NOISE_FACTOR = 6.0
# A few roundings of float32.
_FLOAT32 = 1e-6
_STATISTICS = 1e-5


class TinyWaffleIron:
    """`tiny_model.npz` and what belongs to it.

    Attributes:
      arrays: by their names there, in PyTorch's layout.
      info: `tiny_config.json`.
      norms, modes: those that the set has: "layernorm", "batchnorm"; "eval", "train".
    """

    def __init__(self, golden_file: GoldenFile):
        self.arrays = golden_arrays(golden_file("scalr/tiny_model.npz"))
        self.info: dict[str, Any] = golden_json(golden_file("scalr/tiny_config.json"))
        self._weights = reference_weights(golden_file, "scalr")
        self.norms = sorted({name.split("/")[0] for name in self.arrays if name.endswith("/out")})
        self.modes = sorted({name.split("/")[1] for name in self.arrays if name.endswith("/out")})

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose names begin with a prefix, which is taken off."""
        return {name.removeprefix(prefix): value for name, value in self.arrays.items() if name.startswith(prefix)}

    def config(self, norm: str, **settings: Any) -> WaffleIronConfig:
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

    def model(self, norm: str, **settings: Any) -> WaffleIron:
        """The network with reference weights."""
        return self.filled(WaffleIron(self.config(norm, **settings), rngs=nnx.Rngs(0)))

    def filled(self, model: WaffleIron, *, with_head: bool = True) -> WaffleIron:
        """A network, abstract or not, with reference weights by the official names."""
        weight = self._weights.reference_weight
        arrays = {key: weight(key, shape) for key, shape in official_shapes(model).items()}
        state_dict_to_waffleiron(arrays, model, with_head=with_head)
        return model

    def inputs(self) -> dict[str, jax.Array]:
        """Arguments of the network's call."""
        return {
            "point_features": jnp.asarray(points_last(self.arrays["in/feat"])),
            "neighbors": jnp.asarray(points_last(self.arrays["in/neighbors_emb"])),
            "cells": jnp.asarray(self.arrays["in/cell_ind"]),
            "point_mask": jnp.asarray(self.arrays["in/occupied_cell"] > 0),
        }

    def noise(self, norm: str, mode: str) -> float:
        """Float32 noise of the official run, as a share of its largest output."""
        exact = self.arrays[f"{norm}/{mode}/out_float64"]
        return float(np.abs(self.arrays[f"{norm}/{mode}/out"] - exact).max() / np.abs(exact).max())


def points_last(array: Shaped[Any, "cloud a b"]) -> Shaped[np.ndarray, "cloud b a"]:
    """(cloud, channel, point) <-> (cloud, point, channel)."""
    return np.asarray(array).swapaxes(1, 2)


def share_of_largest(
    name: str, ours: Shaped[np.ndarray, "..."], official: Shaped[np.ndarray, "..."], tolerance: float
) -> Check:
    """Compares by the largest difference, against a share of the largest official number."""
    note = f"tolerance: {tolerance:.1e} of the largest"
    return absolute(name, ours, official, tolerance * float(np.abs(official).max()), note)


def layers(golden_file: GoldenFile) -> Iterator[Check]:
    """Tokens after every layer that the set has, in inference and in training."""
    tiny = TinyWaffleIron(golden_file)

    @nnx.jit(static_argnames="training")
    def captured_tokens(model: WaffleIron, inputs: dict[str, jax.Array], training: bool) -> dict[str, jax.Array]:
        captured: dict[str, jax.Array] = {}
        model.tokens(**inputs, training=training, capture=captured)
        return captured

    for norm in tiny.norms:
        for mode in tiny.modes:
            captured = captured_tokens(tiny.model(norm), tiny.inputs(), mode == "train")
            for name, official in tiny.under(f"{norm}/{mode}/").items():
                if name.startswith(("embed", "spatial_mix", "channel_mix")):
                    ours, tolerance = points_last(captured[name]), NOISE_FACTOR * tiny.noise(norm, mode)
                    yield share_of_largest(f"{norm}/{mode}/{name}", ours, official, tolerance)


def outputs(golden_file: GoldenFile) -> Iterator[Check]:
    """The network's output and the running statistics after it, every block kept or computed again."""
    tiny = TinyWaffleIron(golden_file)
    for norm in tiny.norms:
        for mode in tiny.modes:
            tolerance = NOISE_FACTOR * tiny.noise(norm, mode)
            for remat in ("none", "all"):
                model = tiny.model(norm, remat=remat)
                before = waffleiron_to_state_dict(model)
                out = points_last(forward(model, tiny.inputs(), training=mode == "train"))
                after = waffleiron_to_state_dict(model)
                case = f"{norm}/{mode}, remat {remat}"
                for name in ("out", "out_float64"):
                    yield share_of_largest(f"{case}: {name}", out, tiny.arrays[f"{norm}/{mode}/{name}"], tolerance)
                official = _counters_aside(tiny.under(f"{norm}/{mode}/stats/"))
                yield from statistics(case, after, official, {})
                moved = [key for key in before.keys() - official.keys() if not np.array_equal(before[key], after[key])]
                yield Check(f"{case}: other arrays that moved", 0.0, float(len(moved)), ", ".join(moved[:3]))


def a_cloud_alone(golden_file: GoldenFile) -> Iterator[Check]:
    """A cloud without the padding that a larger one beside it brings."""
    tiny = TinyWaffleIron(golden_file)
    cloud = tiny.info["cloud_run_alone"]
    points = tiny.info["points_per_cloud"][cloud]
    inputs = {name: array[cloud : cloud + 1] for name, array in tiny.inputs().items()}
    alone = {name: array[:, :points] for name, array in inputs.items() if name != "cells"}
    alone["cells"] = inputs["cells"][:, :, :points]
    for norm in tiny.norms:
        name = f"{norm}/eval/out_cloud{cloud}_alone"
        out = points_last(forward(tiny.model(norm), alone))
        yield share_of_largest(name, out, tiny.arrays[name], NOISE_FACTOR * tiny.noise(norm, "eval"))


def projections(golden_file: GoldenFile) -> Iterator[Check]:
    """Weights of points in their cells, and the cells' means."""
    tiny = TinyWaffleIron(golden_file)
    cells, mask = tiny.inputs()["cells"], tiny.inputs()["point_mask"]
    tokens = jnp.asarray(points_last(tiny.arrays["layernorm/eval/embed"]))
    for grid, shape in enumerate(tiny.config("layernorm").grid_shapes):
        weights = cell_weights(cells[:, grid], mask, shape[0] * shape[1])
        name = f"projection/weight_grid{grid}"
        yield relative(name, np.asarray(weights), tiny.arrays[name][:, 0], _FLOAT32)
        means = flatten(tokens, cells[:, grid], weights, shape)
        name = f"projection/grid{grid}_of_layernorm_eval_embed"
        ours = points_last(means.reshape(means.shape[0], -1, means.shape[-1]))
        yield share_of_largest(name, ours, tiny.arrays[name], _FLOAT32)


@nnx.jit(static_argnames=("training", "train_backbone"))
def forward(model: WaffleIron, inputs: dict[str, jax.Array], **settings: bool) -> jax.Array:
    """The network's output, compiled as a whole; a training call updates the model's statistics."""
    return model(**inputs, **settings)


def statistics(
    case: str, ours: Mapping[str, np.ndarray], official: Mapping[str, np.ndarray], noise: Mapping[str, float]
) -> Iterator[Check]:
    """Running statistics by official names.

    Args:
      case: begins the checks' names.
      ours: may have more than the official ones.
      official: counters are left aside: ours has none.
      noise: absolute tolerance of what cannot be as exact as the others.
    """
    for key, value in _counters_aside(official).items():
        if key in noise:
            yield absolute(f"{case}: {key}", ours[key], value, noise[key])
        else:
            yield relative(f"{case}: {key}", ours[key], value, _STATISTICS, floor=0.1)


def _counters_aside(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value for key, value in arrays.items() if not key.endswith("num_batches_tracked")}

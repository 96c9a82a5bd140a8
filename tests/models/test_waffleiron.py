"""WaffleIron where the golden numbers (`tests/test_golden.py`) say nothing: padding, drop-path, loops, meshes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pop3d_jax.models import waffleiron_layers
from pop3d_jax.models.parameters import merge_model, split_model
from pop3d_jax.models.waffleiron import WaffleIron, WaffleIronConfig
from pop3d_jax.models.waffleiron_layers import Block, cell_weights, drop_path, flatten, inflate
from pop3d_jax.models.waffleiron_weights import waffleiron_to_state_dict
from pop3d_jax.verification.waffleiron import NOISE_FACTOR, TinyWaffleIron, points_last

_PROJECT = Path(__file__).resolve().parents[2]

SMALL = WaffleIronConfig(
    channels=8, depth=5, grid_shapes=((4, 3), (3, 5)), projection_axes=(2, 0), output_channels=6, head_hidden=7
)


@pytest.fixture(scope="module")
def tiny(golden_file):
    return TinyWaffleIron(golden_file)


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def small_inputs(clouds=3, points=11, present=(11, 7, 9), seed=0):
    """Random clouds for `SMALL`, the padding as the pipeline makes it."""
    rng = np.random.default_rng(seed)
    mask = np.arange(points) < np.asarray(present)[:clouds, None]
    own = np.broadcast_to(np.arange(points)[:, None], (clouds, points, 1))
    others = rng.integers(0, np.asarray(present)[:clouds, None, None], (clouds, points, 4))
    neighbors = np.where(mask[..., None], np.concatenate([own, others], -1), points - 1)
    cells = [rng.integers(0, rows * columns, (clouds, points)) for rows, columns in SMALL.grid_shapes]
    return {
        "point_features": jnp.asarray(rng.standard_normal((clouds, points, 5)) * mask[..., None], jnp.float32),
        "neighbors": jnp.asarray(neighbors, jnp.int32),
        "cells": jnp.asarray(np.stack(cells, 1) * mask[:, None], jnp.int32),
        "point_mask": jnp.asarray(mask),
    }


def with_capacity(inputs, capacity):
    """The same clouds with room for more points."""
    points = inputs["point_mask"].shape[1]
    more = capacity - points

    def padded(name, axis):
        array = np.asarray(inputs[name])
        return np.pad(array, [(0, more if i == axis else 0) for i in range(array.ndim)])

    neighbors = padded("neighbors", 1)
    mask = padded("point_mask", 1)
    neighbors[~mask] = capacity - 1
    return {
        "point_features": jnp.asarray(padded("point_features", 1)),
        "neighbors": jnp.asarray(neighbors),
        "cells": jnp.asarray(padded("cells", 2)),
        "point_mask": jnp.asarray(mask),
    }


@nnx.jit(static_argnames=("method", "training", "train_backbone"))
def call(model, inputs, dropout_key=None, *, method="__call__", **settings):
    """The network's output or tokens, compiled as a whole."""
    return getattr(model, method)(**inputs, dropout_key=dropout_key, **settings)


def close(ours, expected, tolerance):
    """Largest difference against a share of the largest expected number."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.golden
@pytest.mark.slow
def test_capacity_beyond_the_largest_cloud_leaves_no_trace(tiny):
    inputs = tiny.inputs()
    points = inputs["point_mask"].shape[1]
    for norm in tiny.norms:
        model = tiny.model(norm, head="probe")
        wide = tiny.model(norm, head="probe")
        expected = call(model, inputs, training=True)
        out = call(wide, with_capacity(inputs, points + 37), training=True)[:, :points]
        tolerance = NOISE_FACTOR * tiny.noise(norm, "train")
        close(np.asarray(out), np.asarray(expected), tolerance)
        ours, theirs = waffleiron_to_state_dict(wide), waffleiron_to_state_dict(model)
        for key, value in theirs.items():
            np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.golden
@pytest.mark.slow
def test_full_network_on_a_real_cloud(golden_file):
    golden = np.load(golden_file("scalr/full_model_forward.npz"))
    clouds = np.load(golden_file("scalr/preprocess.npz"))
    grids = json.loads(golden_file("scalr/preprocess_info.json").read_text())["settings"]
    cloud = {name: clouds[f"nuscenes/pretrain/CAM_FRONT/{name}"] for name in ("feat", "neighbors_emb", "cell_ind")}
    config = WaffleIronConfig(
        input_channels=cloud["feat"].shape[1],
        depth=len(golden["block_mean_std_absmax"]),
        output_channels=len(golden["out_points_0_8"]),
        grid_shapes=grids["grids_shape"],
        projection_axes=grids["dim_proj"],
    )
    model = TinyWaffleIron(golden_file).filled(nnx.eval_shape(lambda: WaffleIron(config, rngs=nnx.Rngs(0))))
    inputs = {
        "point_features": jnp.asarray(points_last(cloud["feat"])),
        "neighbors": jnp.asarray(points_last(cloud["neighbors_emb"]).astype(np.int32)),
        "cells": jnp.asarray(cloud["cell_ind"]),
        "point_mask": jnp.ones((1, cloud["feat"].shape[2]), bool),
    }
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state, inputs):
        captured = {}
        model = nnx.merge(graph, state)
        tokens = model.tokens(**inputs, capture=captured)
        blocks = [captured[f"channel_mix_{d}"] for d in range(config.depth)]
        statistics = jnp.stack([jnp.stack([x.mean(), x.std(ddof=1), jnp.abs(x).max()]) for x in blocks])
        return captured["embed"], tokens, model.head(tokens), statistics

    embed, tokens, out, statistics = jax.device_get(forward(state, inputs))
    for name, array in (("embed", embed), ("tokens", tokens), ("out", out)):
        expected = golden[f"{name}_channels_0_32"]
        close(array[0].T[: len(expected)], expected, 1e-4)
    close(out[0, : golden["out_points_0_8"].shape[1]].T, golden["out_points_0_8"], 1e-4)
    for name, array in (("tokens", tokens), ("out", out)):
        np.testing.assert_allclose(
            np.linalg.norm(array[0].astype(np.float64), axis=1), golden[f"{name}_norm_per_point"], rtol=1e-4
        )
    # Means are near zero: all three against the blocks' spread.
    close(statistics / statistics[:, 1:2], golden["block_mean_std_absmax"] / statistics[:, 1:2], 1e-4)


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"norm": "groupnorm"}, "model.norm = 'groupnorm' must be one of 'layernorm', 'batchnorm'"),
            ({"remat": "blocks"}, "model.remat = 'blocks' must be one of 'none', 'all'"),
            ({"grid_shapes": ((4, 3, 2),), "projection_axes": (2,)}, "must be pairs"),
            ({"projection_axes": (2, 1)}, "for each of the 3 model.grid_shapes"),
            ({"drop_path": 1.0}, "model.drop_path = 1.0 must be at least 0 and below 1"),
            ({"depth": 0}, "model.depth = 0 must be at least 1"),
        ],
    )
    def test_what_does_not_fit_is_said(self, settings, message):
        with pytest.raises(ValueError, match=message):
            WaffleIronConfig(**settings)

    def test_arrays_of_another_network_are_refused(self):
        model = WaffleIron(SMALL, rngs=nnx.Rngs(0))
        inputs = small_inputs()
        with pytest.raises(ValueError, match=r"cells has grids: 1, this network .* needs 2"):
            model(**inputs | {"cells": inputs["cells"][:, :1]})
        with pytest.raises(ValueError, match=r"point_features has 4, this network .* needs 5"):
            model(**inputs | {"point_features": inputs["point_features"][..., :4]})


def replaced(config, **settings):
    return WaffleIronConfig(**vars(config) | settings)


class TestNetwork:
    @pytest.mark.slow
    @pytest.mark.parametrize(("depth", "norm"), [(1, "layernorm"), (2, "batchnorm"), (5, "batchnorm")])
    def test_the_loop_is_the_blocks_one_by_one(self, depth, norm):
        """Also for depths that are no multiple of the number of grids, with drop-path, with and without remat."""
        inputs, key = small_inputs(), jax.random.key(5)
        results = []
        for remat, capture in (("none", {}), ("none", None), ("all", None)):
            config = replaced(SMALL, depth=depth, norm=norm, drop_path=0.4, remat=remat)
            graph, parameters, statistics = split_model(WaffleIron(config, rngs=nnx.Rngs(1)))

            def loss(parameters, graph=graph, statistics=statistics, capture=capture):
                model = merge_model(graph, parameters, statistics)
                tokens = model.tokens(**inputs, training=True, dropout_key=key, capture=capture)
                return jnp.sum(jnp.sin(tokens)), (tokens, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

            results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters))
        for other in results[1:]:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), results[0], other)

    @pytest.mark.parametrize("head", ["linear", "mlp", "probe"])
    def test_heads(self, head):
        model = WaffleIron(replaced(SMALL, head=head), rngs=nnx.Rngs(0))
        out = call(model, small_inputs())
        assert out.shape == (3, 11, 6)
        assert out.dtype == jnp.float32
        assert bool(jnp.any(out)) == (head != "probe")

    def test_gelu_is_the_exact_one(self):
        block = {
            name: Block(8, norm="layernorm", activation=name, drop_path_rate=0.0, dtype="float32", rngs=nnx.Rngs(2))
            for name in ("relu", "gelu")
        }
        tokens = jax.random.normal(jax.random.key(0), (1, 9, 8))
        mix = block["gelu"].channel_mix
        normalised = mix.norm(tokens)
        hidden = normalised @ mix.hidden.kernel[...] + mix.hidden.bias[...]
        hidden = hidden * (1 + jax.lax.erf(hidden / np.sqrt(2))) / 2
        expected = (hidden @ mix.output.kernel[...] + mix.output.bias[...]) * mix.layer_scale[...]
        counted = jnp.ones((1, 9), bool)
        np.testing.assert_allclose(mix.residual(tokens, False, counted), expected, rtol=1e-5, atol=1e-6)
        assert np.abs(block["relu"].channel_mix.residual(tokens, False, counted) - expected).max() > 1e-2

    def test_a_frozen_backbone_stays_as_it_is_while_the_probe_trains(self):
        config = replaced(SMALL, head="probe", norm="batchnorm", drop_path=0.5)
        model = WaffleIron(config, rngs=nnx.Rngs(0))
        model.head.output.kernel[...] = jax.random.normal(jax.random.key(0), (8, 6))
        inputs = small_inputs()
        expected = call(model, inputs, method="tokens")
        graph, parameters, statistics = split_model(model)

        def loss(parameters):
            model = merge_model(graph, parameters, statistics)
            out = model(**inputs, training=True, train_backbone=False, dropout_key=jax.random.key(1))
            return jnp.sum(out**2), (out, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

        (_, (out, after)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters)
        head = merge_model(graph, parameters, statistics).head
        np.testing.assert_allclose(
            out, head(expected, training=True, counted=jnp.ones((3, 11), bool)), rtol=1e-5, atol=1e-5
        )
        changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), statistics, after)
        assert all(jax.tree.leaves(changed.pop("head")))
        assert not any(jax.tree.leaves(changed))
        moved = jax.tree.map(lambda gradient: bool(np.any(gradient)), gradients)
        assert any(jax.tree.leaves(moved.pop("head")))
        assert not any(jax.tree.leaves(moved))

    def test_bfloat16_is_near_float32(self):
        inputs = small_inputs()
        outs = [
            call(WaffleIron(replaced(SMALL, compute_dtype=dtype), rngs=nnx.Rngs(0)), inputs, training=True)
            for dtype in ("float32", "bfloat16")
        ]
        assert outs[1].dtype == jnp.float32
        close(np.asarray(outs[1]), np.asarray(outs[0]), 0.03)
        assert np.any(outs[0] != outs[1])

    def test_initial_values_are_pytorchs_defaults(self):
        """Uniform within 1/sqrt(fan-in): LayerScale in [-1, 1]."""
        state = waffleiron_to_state_dict(WaffleIron(replaced(SMALL, channels=64, depth=2), rngs=nnx.Rngs(0)))
        for key, bound in (
            ("embed.conv1.bias", 5**-0.5),
            ("embed.conv2.4.weight", 64**-0.5),
            ("embed.final.weight", 128**-0.5),
            ("waffleiron.spatial_mix.1.ffn.2.weight", 1 / 3),
            ("waffleiron.spatial_mix.1.ffn.0.bias", 1 / 3),
            ("waffleiron.spatial_mix.0.scale.weight", 1.0),
            ("waffleiron.channel_mix.1.scale.weight", 1.0),
            ("waffleiron.channel_mix.1.mlp.2.bias", 1 / 8),
            ("classif.weight", 1 / 8),
        ):
            assert 0.9 * bound < np.abs(state[key]).max() <= bound, key
            assert abs(state[key].mean()) < 0.3 * bound, key


@pytest.mark.parametrize("block", [3, 11, 64])
def test_blocks_of_neighbours_change_nothing(monkeypatch, block):
    model, inputs = WaffleIron(SMALL, rngs=nnx.Rngs(0)), small_inputs()
    whole = call(model, inputs)
    monkeypatch.setattr(waffleiron_layers, "_BLOCK", block)
    close(call(model, inputs), whole, 1e-6)


class TestDropPath:
    def test_whole_clouds_are_dropped_and_the_others_scaled(self):
        residual = 1.0 + jax.random.uniform(jax.random.key(0), (400, 3, 2))
        out = np.asarray(drop_path(residual, 0.2, jax.random.key(1)))
        kept = out.reshape(400, -1).any(axis=1)
        np.testing.assert_allclose(out[kept], np.asarray(residual)[kept] / 0.8, rtol=1e-6)
        # Five standard deviations of a binomial share.
        assert abs(kept.mean() - 0.8) < 5 * np.sqrt(0.8 * 0.2 / 400)
        assert drop_path(residual, 0.2, None) is residual

    def test_the_two_halves_of_a_block_draw_apart(self):
        rate, clouds = 0.5, 200
        block = Block(4, norm="layernorm", activation="relu", drop_path_rate=rate, dtype="float32", rngs=nnx.Rngs(0))
        tokens = jax.random.normal(jax.random.key(0), (clouds, 5, 4))
        cells = jnp.broadcast_to(jnp.arange(5), (clouds, 5))
        seen = {"embed": tokens}
        weights, counted = jnp.ones((clouds, 5)), jnp.ones((clouds, 5), bool)
        key = jax.random.key(3)
        block(
            tokens, cells, weights, key, counted, grid_shape=(2, 3), training=True, watch=lambda *at: seen.update([at])
        )
        kept = [
            np.any(np.asarray(seen[after] != seen[before]), axis=(1, 2))
            for before, after in (("embed", "spatial_mix"), ("spatial_mix", "channel_mix"))
        ]
        for share in (kept[0].mean(), kept[1].mean(), (kept[0] == kept[1]).mean()):
            assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(clouds)


class TestProjection:
    def test_means_of_cells_by_hand(self):
        tokens = jnp.asarray([[[1.0, 2.0], [3.0, 4.0], [10.0, 20.0], [7.0, 7.0]]])
        cells = jnp.asarray([[5, 5, 0, 0]])
        weights = cell_weights(cells, jnp.asarray([[True, True, True, False]]), 6)
        grid = flatten(tokens, cells, weights, (2, 3))
        expected = np.zeros((1, 2, 3, 2))
        expected[0, 1, 2], expected[0, 0, 0] = (2.0, 3.0), (10.0, 20.0)
        np.testing.assert_allclose(grid, expected, rtol=1e-5)
        np.testing.assert_allclose(inflate(grid, cells)[0], expected[0].reshape(6, 2)[np.asarray(cells[0])], rtol=1e-5)


_ON_A_MESH = """
import sys
import jax, numpy as np
from flax import nnx
from test_waffleiron import SMALL, replaced, small_inputs
from pop3d_jax.hlo_text import collectives
from pop3d_jax.models import waffleiron_layers
from pop3d_jax.models.parameters import merge_model, split_model
from pop3d_jax.models.waffleiron import WaffleIron
from pop3d_jax.sharding import make_mesh, replicated, shard_batch

inputs = jax.device_get(small_inputs(4, 11, (11, 7, 9, 10)))
config = replaced(SMALL, norm="batchnorm", drop_path=0.3)
graph, parameters, statistics = split_model(WaffleIron(config, rngs=nnx.Rngs(0)))

def loss(parameters, inputs):
    model = merge_model(graph, parameters, statistics)
    out = model(**inputs, training=True, dropout_key=jax.random.key(0))
    return (out**2).mean(), (out, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

results = []
for devices in (1, 4):
    mesh = make_mesh(devices, 1, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss, has_aux=True))
        arguments = jax.device_put(parameters, replicated(mesh)), shard_batch(inputs, mesh)
        results.append(jax.device_get(program(*arguments)))
        if devices > 1:
            # Every device keeps its clouds: only sums travel.
            kinds = set(collectives(program.lower(*arguments).compile().as_text()))
            assert kinds == {"all-reduce"}, kinds
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), *results)
"""


@pytest.mark.slow
def test_four_devices_compute_what_one_does():
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{_PROJECT}:{_PROJECT / 'tests' / 'models'}"}
    finished = subprocess.run(
        [sys.executable, "-c", _ON_A_MESH], env=environment, cwd=_PROJECT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr

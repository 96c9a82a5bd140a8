"""WaffleIron against the official numbers, and what they do not cover: padding, drop-path, loops, meshes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from waffleiron_golden import TinyGolden, filled, points_last

from pop3d_jax.models.batch_norm import MOMENTUM
from pop3d_jax.models.parameters import merge_model, split_model
from pop3d_jax.models.waffleiron import WaffleIron, WaffleIronConfig
from pop3d_jax.models.waffleiron_layers import Block, cell_weights, drop_path, flatten, inflate
from pop3d_jax.models.waffleiron_weights import (
    official_shapes,
    state_dict_to_waffleiron,
    waffleiron_to_state_dict,
)

# Two float32 runs differ by the noise of both, which the official one against float64 is a sample of.
NOISE_FACTOR = 6.0
_PROJECT = Path(__file__).resolve().parents[2]

SMALL = WaffleIronConfig(
    channels=8, depth=5, grid_shapes=((4, 3), (3, 5)), projection_axes=(2, 0), output_channels=6, head_hidden=7
)


@pytest.fixture(scope="module")
def tiny(golden_file):
    return TinyGolden(golden_file)


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


@nnx.jit(static_argnames="training")
def captured_tokens(model, inputs, training):
    """The tokens after every layer."""
    captured = {}
    model.tokens(**inputs, training=training, capture=captured)
    return captured


def close(ours, expected, tolerance):
    """Largest difference against a share of the largest expected number."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.golden
class TestForward:
    def test_tokens_after_every_layer(self, tiny):
        for norm in tiny.norms:
            for mode in tiny.modes:
                tolerance = NOISE_FACTOR * tiny.noise(norm, mode)
                captured = captured_tokens(tiny.model(norm), tiny.inputs(), mode == "train")
                prefix = f"{norm}/{mode}/"
                compared = [name for name in captured if prefix + name in tiny.arrays]
                assert compared
                for name in compared:
                    close(points_last(captured[name]), tiny.arrays[prefix + name], tolerance)
                unknown = {
                    name.removeprefix(prefix)
                    for name in tiny.arrays
                    if name.startswith((prefix + "spatial", prefix + "channel", prefix + "embed"))
                } - set(captured)
                assert not unknown

    @pytest.mark.parametrize("remat", ["none", "all"])
    def test_outputs_and_running_statistics(self, tiny, remat):
        for norm in tiny.norms:
            for mode in tiny.modes:
                tolerance = NOISE_FACTOR * tiny.noise(norm, mode)
                model = tiny.model(norm, remat=remat)
                before = waffleiron_to_state_dict(model)
                out = points_last(call(model, tiny.inputs(), training=mode == "train"))
                close(out, tiny.arrays[f"{norm}/{mode}/out_float64"], tolerance)
                close(out, tiny.arrays[f"{norm}/{mode}/out"], tolerance)
                after = waffleiron_to_state_dict(model)
                prefix = f"{norm}/{mode}/stats/"
                official = {k.removeprefix(prefix): v for k, v in tiny.arrays.items() if k.startswith(prefix)}
                official = {key: value for key, value in official.items() if not key.endswith("num_batches_tracked")}
                assert bool(official) == (mode == "train")
                for key, value in official.items():
                    np.testing.assert_allclose(after[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
                for key in before.keys() - official.keys():
                    np.testing.assert_array_equal(after[key], before[key], err_msg=key)

    def test_a_cloud_alone_as_in_a_batch(self, tiny):
        cloud = tiny.info["cloud_run_alone"]
        points = tiny.info["points_per_cloud"][cloud]
        inputs = {name: array[cloud : cloud + 1] for name, array in tiny.inputs().items()}
        alone = {name: array[:, :points] for name, array in inputs.items() if name != "cells"}
        alone["cells"] = inputs["cells"][:, :, :points]
        for norm in tiny.norms:
            out = points_last(call(tiny.model(norm), alone))
            tolerance = NOISE_FACTOR * tiny.noise(norm, "eval")
            close(out, tiny.arrays[f"{norm}/eval/out_cloud{cloud}_alone"], tolerance)

    def test_capacity_beyond_the_largest_cloud_leaves_no_trace(self, tiny):
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

    def test_projections(self, tiny):
        cells, mask = tiny.inputs()["cells"], tiny.inputs()["point_mask"]
        tokens = jnp.asarray(points_last(tiny.arrays["layernorm/eval/embed"]))
        shapes = tiny.config("layernorm").grid_shapes
        for i, shape in enumerate(shapes):
            weights = cell_weights(cells[:, i], mask, shape[0] * shape[1])
            np.testing.assert_allclose(weights, tiny.arrays[f"projection/weight_grid{i}"][:, 0], rtol=1e-6)
            grid = flatten(tokens, cells[:, i], weights, shape)
            expected = tiny.arrays[f"projection/grid{i}_of_layernorm_eval_embed"]
            close(points_last(grid.reshape(grid.shape[0], -1, grid.shape[-1])), expected, 1e-6)

    def test_probe_head(self, tiny, golden_file):
        probing = np.load(golden_file("scalr/losses_metrics.npz"))
        settings = json.loads(golden_file("scalr/schedules_protocol.json").read_text())["linear_probe_steps"]
        model = tiny.model(settings["norm"], head="probe", output_channels=settings["num_classes"])
        prefix = f"linear_probe_steps/head_after_{settings['steps']}_steps/"
        trained = {f"classif.{k.removeprefix(prefix)}": probing[k] for k in probing.files if k.startswith(prefix)}
        assert set(trained) == {key for key in official_shapes(model) if key.startswith("classif.")}
        state_dict_to_waffleiron(waffleiron_to_state_dict(model) | trained, model)
        expected = probing[f"linear_probe_steps/eval_logits_after_{settings['steps']}_steps"]
        logits = points_last(call(model, tiny.inputs(), train_backbone=False))
        close(logits, expected, NOISE_FACTOR * tiny.noise(settings["norm"], "eval"))


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def distillation_loss(predicted, targets):
    """Mean over pairs of the distance of unit vectors; its gradient is zero where they are equal."""
    squared = jnp.sum(jnp.square(unit(predicted) - unit(targets)), axis=-1)
    apart = squared > 0.0
    return jnp.mean(jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0))


def warmup_cosine(settings):
    """Linear from zero, then half a cosine down to `min_lr`; the step counts the updates made before."""
    base, smallest, warmup = settings["base_lr"], settings["min_lr"], settings["warmup_steps"]
    falling = optax.cosine_decay_schedule(base, settings["max_steps"] - warmup, alpha=smallest / base)
    return optax.join_schedules([optax.linear_schedule(0.0, base, warmup), falling], [warmup])


@pytest.fixture(scope="module")
def runs(tiny):
    """By norm: losses, first gradients, and the network after the last step, all by official names."""
    settings = tiny.info["distill"]
    clouds = range(tiny.info["number_of_clouds"])
    points = [tiny.arrays[f"in/pairing_points_{b}"] for b in clouds]
    pixels = [tiny.arrays[f"in/pairing_images_{b}"] for b in clouds]
    teacher = tiny.arrays["in/teacher_feat"]
    targets = jnp.asarray(np.concatenate([teacher[b][:, p[:, 1], p[:, 2]].T for b, p in enumerate(pixels)]))
    inputs = tiny.inputs()
    optimizer = optax.adamw(
        warmup_cosine(settings),
        *settings["betas"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )

    def run(norm):
        graph, parameters, statistics = split_model(tiny.model(norm))

        def loss(parameters, statistics):
            model = merge_model(graph, parameters, statistics)
            out = model(**inputs, training=True)
            predicted = jnp.concatenate([out[b, points[b]] for b in clouds])
            return distillation_loss(predicted, targets), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

        @jax.jit
        def step(parameters, statistics, state):
            (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(parameters, statistics)
            updates, state = optimizer.update(gradients, state, parameters)
            return value, gradients, optax.apply_updates(parameters, updates), statistics, state

        state, losses, first = optimizer.init(parameters), [], None
        for _ in range(settings["steps"]):
            value, gradients, parameters, statistics, state = step(parameters, statistics, state)
            losses.append(float(value))
            first = gradients if first is None else first
        first = waffleiron_to_state_dict(merge_model(graph, first, statistics))
        return losses, first, waffleiron_to_state_dict(merge_model(graph, parameters, statistics))

    return {norm: run(norm) for norm in tiny.norms if f"{norm}/distill/loss_per_step" in tiny.arrays}


@pytest.mark.golden
class TestDistillation:
    """Four official updates, gradients included."""

    @staticmethod
    def official(tiny, prefix):
        return {name.removeprefix(prefix): value for name, value in tiny.arrays.items() if name.startswith(prefix)}

    def test_rates(self, tiny):
        settings = tiny.info["distill"]
        rates = [float(warmup_cosine(settings)(step)) for step in range(settings["steps"])]
        for norm in tiny.norms:
            np.testing.assert_allclose(rates, tiny.arrays[f"{norm}/distill/lr_per_step"], rtol=1e-5)

    def test_losses(self, tiny, runs):
        assert runs
        for norm, (losses, _, _) in runs.items():
            np.testing.assert_allclose(losses, tiny.arrays[f"{norm}/distill/loss_per_step_float64"], rtol=1e-6)

    def test_gradients(self, tiny, runs):
        for norm, (_, gradients, _) in runs.items():
            official = self.official(tiny, f"{norm}/distill/grad/")
            exact = self.official(tiny, f"{norm}/distill/grad_float64/")
            assert official.keys() == exact.keys() == set(tiny.info["distill"]["named_parameters"])
            noise = max(np.abs(official[key] - exact[key]).max() / np.abs(exact[key]).max() for key in exact)
            for key, value in exact.items():
                close(gradients[key], value, NOISE_FACTOR * noise)
            trained = [value for key, value in gradients.items() if "running" not in key and "num_batches" not in key]
            norm_of_all = np.sqrt(sum(np.sum(np.square(value, dtype=np.float64)) for value in trained))
            np.testing.assert_allclose(norm_of_all, tiny.arrays[f"{norm}/distill/grad_global_norm"], rtol=1e-5)

    def test_parameters_and_statistics_after_the_last_step(self, tiny, runs):
        for norm, (_, _, state) in runs.items():
            steps = tiny.info["distill"]["steps"]
            rates = tiny.arrays[f"{norm}/distill/lr_per_step"]
            parameters = self.official(tiny, f"{norm}/distill/param_after_{steps}_steps/")
            assert parameters
            for key, value in parameters.items():
                # Adam divides by the gradient's size: noise of small gradients counts as much as of large ones.
                np.testing.assert_allclose(state[key], value, rtol=0, atol=2e-3 * rates.sum(), err_msg=key)
            statistics = self.official(tiny, f"{norm}/distill/stats_after_{steps}_steps/")
            assert statistics
            # The shift before this BatchNorm has no gradient but noise, of which Adam makes whole updates of any sign:
            # by so much may the mean that it takes away differ.
            row = np.abs(state["embed.conv2.1.weight"]).sum(axis=1).max()
            noise = {"embed.conv2.2.running_mean": MOMENTUM * 2 * np.cumsum(rates).sum() * row}
            for key, value in statistics.items():
                np.testing.assert_allclose(state[key], value, rtol=1e-4, atol=noise.get(key, 1e-5), err_msg=key)


@pytest.mark.golden
@pytest.mark.slow
def test_full_network_on_a_real_cloud(golden_file):
    golden = np.load(golden_file("scalr/full_model_forward.npz"))
    clouds = np.load(golden_file("scalr/preprocess.npz"))
    grids = json.loads(golden_file("scalr/preprocess_info.json").read_text())["settings"]
    reference_weight = TinyGolden(golden_file).reference_weight
    cloud = {name: clouds[f"nuscenes/pretrain/CAM_FRONT/{name}"] for name in ("feat", "neighbors_emb", "cell_ind")}
    config = WaffleIronConfig(
        input_channels=cloud["feat"].shape[1],
        depth=len(golden["block_mean_std_absmax"]),
        output_channels=len(golden["out_points_0_8"]),
        grid_shapes=grids["grids_shape"],
        projection_axes=grids["dim_proj"],
    )
    model = filled(nnx.eval_shape(lambda: WaffleIron(config, rngs=nnx.Rngs(0))), reference_weight)
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


def test_four_devices_compute_what_one_does():
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{_PROJECT}:{_PROJECT / 'tests' / 'models'}"}
    finished = subprocess.run(
        [sys.executable, "-c", _ON_A_MESH], env=environment, cwd=_PROJECT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr

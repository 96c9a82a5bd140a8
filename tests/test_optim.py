import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from pop3d_jax import optim


def small_config(**changes):
    config = ml_collections.ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 1e-2,
            "backbone_multiplier": 0.1,
            "weight_decay": 0.0,
            "betas": (0.9, 0.999),
            "epsilon": 1e-8,
            "clip_norm": 1e9,
            "warmup_steps": 0,
            "warmup_start": 1e-5,
            "final_learning_rate": 1e-2,
        }
    )
    config.update(changes)
    return config


def parameters():
    return {
        "backbone": {"conv1": {"kernel": jnp.ones(3)}, "layer2": {"kernel": jnp.ones(3)}},
        "encoder": {"kernel": jnp.ones(3)},
    }


def groups():
    return optim.parameter_groups(parameters(), lambda path: "conv1" in path)


def one_update(config, gradient_of_frozen=0.0):
    optimizer = optim.make_optimizer(config, 100, groups())
    gradients = jax.tree.map(jnp.ones_like, parameters())
    gradients["backbone"]["conv1"]["kernel"] = jnp.full(3, gradient_of_frozen)
    updates, _ = optimizer.update(gradients, optimizer.init(parameters()), parameters())
    return jax.tree.map(lambda update: float(update[0]), updates)


def test_groups_by_path():
    assert groups()["backbone"]["conv1"]["kernel"] == "frozen"
    assert groups()["backbone"]["layer2"]["kernel"] == "backbone"
    assert groups()["encoder"]["kernel"] == "main"


def test_the_backbone_moves_slower_and_frozen_parameters_stay():
    updates = one_update(small_config(final_learning_rate=1e-2, backbone_multiplier=1.0), gradient_of_frozen=5.0)
    assert updates["backbone"]["conv1"]["kernel"] == 0.0
    assert np.isclose(updates["encoder"]["kernel"], -1e-2, rtol=1e-5)
    slow = one_update(small_config(warmup_start=0.0, final_learning_rate=0.0))
    assert np.isclose(slow["backbone"]["layer2"]["kernel"], 0.1 * slow["encoder"]["kernel"], rtol=1e-5)


def test_weight_decay_also_reaches_what_has_no_gradient():
    optimizer = optim.make_optimizer(small_config(weight_decay=0.5), 100, groups())
    gradients = jax.tree.map(jnp.zeros_like, parameters())
    updates, _ = optimizer.update(gradients, optimizer.init(parameters()), parameters())
    assert np.allclose(updates["encoder"]["kernel"], -1e-2 * 0.5, rtol=1e-5)
    assert np.all(updates["backbone"]["conv1"]["kernel"] == 0.0)


def test_clipping_scales_by_the_norm_of_what_trains():
    gradients = jax.tree.map(lambda x: 3.0 * x, parameters())
    norm = optim.trainable_norm(gradients, groups())
    assert np.isclose(norm, 3.0 * np.sqrt(6.0))  # the three frozen elements do not count
    clip = optim._clip_trainable(1.0, groups())
    clipped, _ = clip.update(gradients, optax.EmptyState())
    assert np.isclose(optim.trainable_norm(clipped, groups()), 1.0, rtol=1e-5)
    kept, _ = optim._clip_trainable(100.0, groups()).update(gradients, optax.EmptyState())
    assert np.array_equal(kept["encoder"]["kernel"], gradients["encoder"]["kernel"])


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adamw():
    key = jax.random.key(0)
    tree = {
        "backbone": {"conv1": {"kernel": jax.random.normal(key, (3, 3, 4, 8)), "bias": jnp.ones(8)}},
        "encoder": {"kernel": jax.random.normal(key, (16, 8)), "tpv_embedding_hw": jnp.ones((5, 4))},
    }
    tree_groups = optim.parameter_groups(tree, lambda path: False)

    def update(name):
        config = small_config(name=name, backbone_multiplier=1.0, warmup_start=1e-2)
        optimizer = optim.make_optimizer(config, 100, tree_groups)
        return optimizer.update(tree, optimizer.init(tree), tree)[0]

    muon, adamw = update("muon"), update("adamw")
    for path in (("backbone", "conv1", "bias"), ("encoder", "tpv_embedding_hw")):
        ours, theirs = muon, adamw
        for key in path:
            ours, theirs = ours[key], theirs[key]
        # Not the same numbers: optax's Muon runs its Adam with Nesterov momentum.
        assert np.all(np.sign(ours) == np.sign(theirs))
    for kernel in (muon["backbone"]["conv1"]["kernel"], muon["encoder"]["kernel"]):
        matrix = np.asarray(kernel).reshape(-1, kernel.shape[-1])
        singular = np.linalg.svd(matrix, compute_uv=False)
        assert singular.max() / singular.min() < 2.5  # five Newton-Schulz steps bring them near each other
        assert 0.5 < np.sqrt(np.mean(matrix**2)) / (0.2 * 1e-2) < 1.5
    assert not np.allclose(muon["encoder"]["kernel"], adamw["encoder"]["kernel"])


def test_an_unknown_optimiser_is_named():
    with pytest.raises(ValueError, match=r"config\.optim\.name is 'sgd'"):
        optim.make_optimizer(small_config(name="sgd"), 100, groups())


def test_no_clipping_leaves_large_gradients_to_the_optimiser():
    """The second step of AdamW depends on the gradients' size relative to the first: clipping would change it."""

    def second_update(clip_norm):
        optimizer = optim.make_optimizer(small_config(clip_norm=clip_norm), 100, groups())
        state, tree = optimizer.init(parameters()), parameters()
        for size in (1e-3, 1e3):
            gradients = jax.tree.map(lambda x, size=size: size * x, parameters())
            updates, state = optimizer.update(gradients, state, tree)
        return float(updates["encoder"]["kernel"][0])

    assert second_update(0.0) == second_update(1e9)
    assert second_update(0.0) != second_update(1.0)


def scalr_config(**changes):
    schedule = {"schedule": "warmup_cosine", "warmup_steps": 2, "final_learning_rate": 1e-5, "clip_norm": 0.0}
    with (config := small_config()).unlocked():
        config.update(schedule | changes)
    return config


def waffleiron_parameters():
    rng = np.random.default_rng(0)
    block = {mix: {"norm": {"bias": 0}, "scale": 0} for mix in ("channel_mix", "spatial_mix")}
    tree = {"embedding": {"norm": {"bias": 0}}, "blocks": {0: block, 1: block}, "head": {"kernel": 0}}
    return jax.tree.map(lambda _: jnp.asarray(rng.normal(size=3), jnp.float32), tree)


def layer_of(path):
    return optim.waffleiron_layer(path, depth=2)


def test_layers_of_a_waffleiron_by_path():
    tree = optim.layer_scales(waffleiron_parameters(), 0.5, layer_of, last_layer=3)
    assert tree["embedding"]["norm"]["bias"] == 0.125
    assert set(jax.tree.leaves(tree["blocks"][0])) == {0.25}
    assert set(jax.tree.leaves(tree["blocks"][1])) == {0.5}
    assert tree["head"]["kernel"] == 1.0
    official = ("embed.norm.bias", "waffleiron.spatial_mix.0.norm.bias", "waffleiron.channel_mix.1.scale", "classif.1")
    assert [layer_of(tuple(name.split("."))) for name in official] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"parameter blocks\.2\.bias belongs to no layer .* depth 2"):
        layer_of(("blocks", "2", "bias"))


def test_finetuning_and_probing_by_hand():
    start, steps = waffleiron_parameters(), 5
    rng = np.random.default_rng(1)
    gradients = [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), start) for _ in range(steps)
    ]

    def ours(groups, **changes):
        optimizer = optim.make_optimizer(scalr_config(weight_decay=0.03, **changes), 10, groups, layer_of)
        tree, state = start, optimizer.init(start)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, tree)
            tree = optax.apply_updates(tree, updates)
        return tree, state

    def by_hand(trains, decay):
        paths = jax.tree_util.tree_flatten_with_path(start)[0]
        names = [tuple(str(step.key) for step in path) for path, _ in paths]
        values = [np.asarray(value, np.float64) for _, value in paths]
        for index, name in enumerate(names):
            if not trains(name):
                continue
            first = second = np.zeros_like(values[index])
            for step, gradient in enumerate(gradients):
                factor = step / 2 if step < 2 else 1e-3 + 0.5 * (1 - 1e-3) * (np.cos((step - 2) / 8 * np.pi) + 1)
                rate = 1e-2 * decay ** (3 - layer_of(name)) * factor
                now = np.asarray(jax.tree.leaves(gradient)[index], np.float64)
                first, second = 0.9 * first + 0.1 * now, 0.999 * second + 0.001 * now**2
                values[index] = values[index] * (1 - rate * 0.03)
                size = np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
                values[index] -= rate * first / (1 - 0.9 ** (step + 1)) / size
        return values

    everything = optim.parameter_groups(start, lambda path: False)
    tree, _ = ours(everything, layer_decay=0.9)
    for mine, theirs in zip(jax.tree.leaves(tree), by_hand(lambda name: True, 0.9), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)

    head = optim.parameter_groups(start, lambda path: path[0] != "head")
    tree, state = ours(head)
    for mine, theirs in zip(jax.tree.leaves(tree), by_hand(lambda name: name[0] == "head", 1.0), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)
    assert np.array_equal(tree["embedding"]["norm"]["bias"], start["embedding"]["norm"]["bias"])
    assert sum(leaf.shape == (3,) for leaf in jax.tree.leaves(state)) == 2  # two moments of the head, and no others


def test_the_first_update_of_scalr_moves_nothing():
    tree = waffleiron_parameters()
    optimizer = optim.make_optimizer(
        scalr_config(weight_decay=0.5), 10, optim.parameter_groups(tree, lambda path: False)
    )
    updates, state = optimizer.update(tree, optimizer.init(tree), tree)
    assert not any(np.any(update) for update in jax.tree.leaves(updates))
    updates, _ = optimizer.update(tree, state, tree)
    assert all(np.all(update) for update in jax.tree.leaves(updates))


def test_layer_decay_needs_layers():
    with pytest.raises(ValueError, match=r"config\.optim\.layer_decay is 0\.9, .* set it to 0"):
        optim.make_optimizer(scalr_config(layer_decay=0.9), 10, groups())

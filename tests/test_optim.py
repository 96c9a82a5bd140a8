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

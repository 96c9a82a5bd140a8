"""Losses and their gradients, against official numbers and against plain definitions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.losses import distillation_loss, feature_loss, lovasz_softmax, pop3d_loss, segmentation_loss
from pop3d_jax.nuscenes import IGNORE

lovasz_and_gradient = jax.jit(jax.value_and_grad(lovasz_softmax))
jitted_loss = jax.jit(
    pop3d_loss,
    static_argnames=("per_sample", "cross_entropy_weight", "lovasz_weight", "feature_weight", "ignore_label"),
)

# Losses of a few hundred float32 terms, summed in another order.
RTOL = 5e-6


def channels_last(array):
    return jnp.asarray(np.moveaxis(array, 1, -1))


def lovasz_of_logits(logits, labels):
    return lovasz_softmax(jax.nn.softmax(logits), labels)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["plain", "weighted_ignore"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_losses_of_the_tiny_model(golden_file, name, per_sample):
    with np.load(golden_file("pop3d/tiny_model.npz")) as arrays:
        logits = channels_last(arrays["voxel_logits"][:1])
        target = arrays["loss_voxel_target" if name == "plain" else "loss_voxel_target_ignore"]
        features, feature_target = arrays["loss_point_features"], arrays["loss_feature_target"]
        weights = None if name == "plain" else jnp.asarray(arrays["loss_class_weights"])
        expected = arrays[f"loss_{name}"]
    settings = json.loads(golden_file("pop3d/tiny_config.json").read_text())["loss"]
    mask = jnp.ones(features.shape[:2], bool)
    result = jitted_loss(
        logits,
        jnp.asarray(target),
        jnp.asarray(features),
        jnp.asarray(feature_target),
        mask,
        class_weights=weights,
        feature_weight=float(settings["ft_loss_weight"]),
        ignore_label=settings["ignore_label"],
        per_sample=per_sample,
    )
    terms = [result[term] for term in ("cross_entropy", "lovasz", "feature", "total")]
    np.testing.assert_allclose(terms, expected, rtol=RTOL)


def lovasz_reference(probabilities, labels):
    """Mean over present classes of the Jaccard loss's Lovász extension, in float64, from its definition."""
    losses = []
    for index in range(probabilities.shape[-1]):
        foreground = labels == index
        if not foreground.any():
            continue
        errors = np.abs(foreground - probabilities[:, index])
        order = np.argsort(-errors, kind="stable")
        wrong = np.tri(len(order), dtype=bool)  # row i: the i + 1 voxels of largest error are predicted wrongly
        union = (foreground[order] | wrong).sum(1)
        jaccard = 1 - (foreground[order] & ~wrong).sum(1) / union
        losses.append(np.sum(errors[order] * np.diff(jaccard, prepend=0)))
    return np.mean(losses) if losses else 0.0


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 0.95, 1.0]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_lovasz_equals_its_definition(seed, share_ignored, tied):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(3), 60).astype(np.float32)
    if tied:
        probabilities = np.round(probabilities * 4) / 4
    labels = np.where(rng.random(60) < share_ignored, IGNORE, rng.integers(0, 3, 60))
    loss, gradient = lovasz_and_gradient(jnp.asarray(probabilities), jnp.asarray(labels))
    valid = labels != IGNORE
    np.testing.assert_allclose(loss, lovasz_reference(probabilities[valid].astype(float), labels[valid]), atol=2e-6)
    assert np.all(np.isfinite(gradient))
    assert not np.any(np.asarray(gradient)[~valid])


@given(st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_lovasz_gradient_is_the_slope(seed):
    rng = np.random.default_rng(seed)
    probabilities = rng.random((40, 2))
    labels = rng.integers(0, 2, 40)
    direction = rng.normal(size=(40, 2))
    step = 1e-7
    forward, back = (lovasz_reference(probabilities + sign * step * direction, labels) for sign in (1, -1))
    _, gradient = lovasz_and_gradient(jnp.asarray(probabilities, jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(np.sum(gradient * direction), (forward - back) / (2 * step), atol=1e-4)


def test_a_single_valid_voxel_works():
    probabilities = jnp.array([[0.3, 0.7], [0.6, 0.4]], jnp.float32)
    loss, _ = lovasz_and_gradient(probabilities, jnp.array([IGNORE, 1]))
    np.testing.assert_allclose(loss, 0.6, rtol=1e-6)


def test_nothing_to_learn_from_is_zero_with_zero_gradient():
    def total(logits, features):
        target = jnp.full(logits.shape[:-1], IGNORE, jnp.uint8)
        mask = jnp.zeros(features.shape[:-1], bool)
        return pop3d_loss(logits, target, features, jnp.full_like(features, jnp.nan), mask)["total"]

    logits, features = jnp.ones((2, 3, 4, 2, 2), jnp.float32), jnp.ones((2, 5, 7), jnp.float32)
    loss, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(logits, features)
    assert loss == 0
    assert not any(np.any(gradient) for gradient in gradients)


def test_feature_loss_counts_valid_points_only():
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(2, 3, 6, 4)).astype(np.float32)
    mask = rng.random((3, 6)) < 0.5
    expected = np.mean((prediction - target)[mask] ** 2)
    np.testing.assert_allclose(
        feature_loss(jnp.asarray(prediction), jnp.asarray(target), jnp.asarray(mask)), expected, rtol=1e-6
    )


def test_batch_terms_per_sample_and_flattened():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(3, 4, 3, 2, 2)).astype(np.float32))
    target = rng.choice([0, 1, IGNORE], (3, 4, 3, 2), p=[0.6, 0.3, 0.1]).astype(np.uint8)
    target[2] = IGNORE
    features, goal = jnp.asarray(rng.normal(size=(2, 3, 5, 4)).astype(np.float32))
    mask = jnp.asarray(rng.random((3, 5)) < np.array([[0.9], [0.5], [0.0]]))
    arguments = (logits, jnp.asarray(target), features, goal, mask)
    weights = {"cross_entropy_weight": 2.0, "lovasz_weight": 0.5, "feature_weight": 3.0}
    result = jitted_loss(*arguments, **weights)
    alone = [jitted_loss(*(argument[i : i + 1] for argument in arguments)) for i in range(3)]
    for term in ("cross_entropy", "lovasz", "feature"):
        np.testing.assert_allclose(result[term], np.mean([one[term] for one in alone]), rtol=1e-6)
    total = 2.0 * result["cross_entropy"] + 0.5 * result["lovasz"] + 3.0 * result["feature"]
    np.testing.assert_allclose(result["total"], total, rtol=1e-6)
    flattened = jitted_loss(*arguments, per_sample=False)
    np.testing.assert_allclose(
        flattened["lovasz"],
        lovasz_of_logits(logits.reshape(-1, 2), jnp.asarray(target.reshape(-1))),
        rtol=1e-6,
    )
    assert abs(flattened["lovasz"] - result["lovasz"]) > 1e-3


def test_without_features_the_term_is_left_out():
    logits = jnp.zeros((1, 2, 2, 2, 2), jnp.float32)
    result = jitted_loss(logits, jnp.ones((1, 2, 2, 2), jnp.uint8))
    assert set(result) == {"cross_entropy", "lovasz", "total"}
    np.testing.assert_allclose(result["cross_entropy"], np.log(2), rtol=1e-6)


jitted_distances = jax.jit(jax.value_and_grad(distillation_loss, argnums=(0, 1)))


def distances_reference(student, teacher, mask):
    student, teacher = (
        features / np.linalg.norm(features, axis=-1, keepdims=True)
        for features in (student[mask].astype(float), teacher[mask].astype(float))
    )
    return np.mean(np.linalg.norm(student - teacher, axis=-1))


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_distillation_is_the_mean_distance_of_unit_vectors_whatever_their_lengths(seed, scale):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, 3, 7, 5)).astype(np.float32)
    mask = rng.random((3, 7)) < 0.6
    mask[0, 0] = True
    loss, _ = jitted_distances(jnp.asarray(student), jnp.asarray(scale * teacher), jnp.asarray(mask))
    np.testing.assert_allclose(loss, distances_reference(student, teacher, mask), rtol=2e-6)


def test_unrelated_features_are_the_root_of_two_apart_and_opposite_ones_two():
    rng = np.random.default_rng(0)
    student, teacher = jnp.asarray(rng.normal(size=(2, 500, 1024)), jnp.float32)
    mask = jnp.ones(500, bool)
    loss, _ = jitted_distances(student, teacher, mask)
    np.testing.assert_allclose(loss, np.sqrt(2), atol=5e-3)
    loss, _ = jitted_distances(student, -2 * student, mask)
    np.testing.assert_allclose(loss, 2.0, rtol=1e-6)


def test_distillation_gradient_is_the_slope_and_zero_at_equality():
    rng = np.random.default_rng(1)
    student, teacher, direction = rng.normal(size=(3, 1, 6, 8))
    teacher[0, 0] = 0.5 * student[0, 0]  # a power of two: equal to the last bit once normalised
    direction[0, 0] = 0.0
    mask = np.ones((1, 6), bool)
    step = 1e-6
    forward, back = (distances_reference(student + sign * step * direction, teacher, mask) for sign in (1, -1))
    arrays = (jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32), jnp.asarray(mask))
    _, gradients = jitted_distances(*arrays)
    np.testing.assert_allclose(np.sum(gradients[0] * direction), (forward - back) / (2 * step), rtol=1e-4)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert not np.any(np.asarray(gradient)[0, 0])


@pytest.mark.parametrize("padding", [np.nan, np.inf, 0.0])
def test_padded_pairs_have_no_influence(padding):
    rng = np.random.default_rng(2)
    student, teacher = rng.normal(size=(2, 2, 4, 8)).astype(np.float32)
    mask = np.array([[True, True, False, True], [False, False, False, True]])
    expected, expected_gradients = jitted_distances(jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(mask))
    student[~mask] = teacher[~mask] = padding
    loss, gradients = jitted_distances(jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(mask))
    assert loss == expected
    for gradient, same in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_array_equal(gradient, same)
        assert not np.any(np.asarray(gradient)[~mask])


def test_no_pair_and_zero_features_give_no_nan():
    features = jnp.full((1, 3, 4), jnp.nan)
    loss, gradients = jitted_distances(features, features, jnp.zeros((1, 3), bool))
    assert loss == 0
    assert not any(np.any(gradient) for gradient in gradients)
    loss, gradients = jitted_distances(jnp.zeros((1, 3, 4)), jnp.ones((1, 3, 4)), jnp.ones((1, 3), bool))
    np.testing.assert_allclose(loss, 1.0, rtol=1e-6)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_segmentation_takes_the_batch_as_one_cloud():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(2, 30, 4)).astype(np.float32)
    labels = rng.choice([0, 1, 3, IGNORE], (2, 30)).astype(np.uint8)
    loss = jax.jit(segmentation_loss, static_argnames="lovasz_weight")
    found = loss(jnp.asarray(logits), jnp.asarray(labels), lovasz_weight=0.5)
    valid = labels != IGNORE
    kept = jnp.asarray(logits[valid]), jnp.asarray(labels[valid])
    np.testing.assert_allclose(found["lovasz"], lovasz_of_logits(*kept), rtol=1e-6)
    log_probabilities = np.take_along_axis(np.asarray(jax.nn.log_softmax(kept[0])), labels[valid][:, None], 1)
    np.testing.assert_allclose(found["cross_entropy"], -log_probabilities.mean(), rtol=1e-6)
    np.testing.assert_allclose(found["total"], found["cross_entropy"] + 0.5 * found["lovasz"], rtol=1e-6)


def test_a_batch_without_labels_trains_nothing():
    def total(logits):
        return segmentation_loss(logits, jnp.full(logits.shape[:-1], IGNORE, jnp.uint8))["total"]

    loss, gradient = jax.jit(jax.value_and_grad(total))(jnp.ones((2, 9, 5)))
    assert loss == 0
    assert not np.any(gradient)

import dataclasses
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pop3d_jax.data.pipeline import make_example
from pop3d_jax.data.records import RecordSource
from pop3d_jax.experiment import example_settings
from pop3d_jax.grids.background import BACKGROUND_PHRASES
from pop3d_jax.images import network_images
from pop3d_jax.models.heads import TPVHeads
from pop3d_jax.models.tpv import TPVPlanes
from pop3d_jax.occ3d.centres import place_centres
from pop3d_jax.occ3d.grid import FREE
from pop3d_jax.occ3d.phrase_labels import LabelText, largest_leads
from pop3d_jax.occ3d.prompts import prompt_set
from pop3d_jax.occ3d.student_labels import CHUNK, StudentLabels, grid_labels, labels_at

GRID = (12, 10, 4)
DIM = 16
# Two numbers nearer to each other than this may be ordered otherwise by a program that rounds otherwise.
NEAR = 1e-4


@pytest.fixture(scope="module", params=[(1, 1, 1), (2, 1, 3)], ids=["plain", "upscaled"])
def heads(request):
    heads = TPVHeads(
        GRID,
        request.param,
        embed_dims=8,
        occupancy_classes=2,
        hidden_dims=12,
        out_dims=12,
        decoder_layers=2,
        feature_dim=DIM,
        feature_hidden_dims=12,
        feature_out_dims=12,
        feature_decoder_layers=2,
        dtype=jnp.float32,
        rngs=nnx.Rngs(3),
    )
    # About half of the voxels are occupied.
    heads.occupancy.classifier.bias[...] = jnp.array([-0.15, 0.15])
    return heads


@pytest.fixture(scope="module")
def planes():
    x, y, z = GRID
    generator = np.random.default_rng(0)
    return TPVPlanes(
        *(jnp.asarray(generator.normal(size=(1, *size, 8)), jnp.float32) for size in ((y, x), (z, y), (x, z)))
    )


@pytest.fixture(scope="module")
def text():
    generator = np.random.default_rng(1)
    labels = np.array([4, 11, 4, 16, FREE, 0, 8], np.uint8)
    vectors = generator.normal(size=(len(labels) + len(BACKGROUND_PHRASES), DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    rivals = generator.random((len(labels), len(BACKGROUND_PHRASES))) < 0.7
    return LabelText(*map(jnp.asarray, (vectors[: len(labels)], labels, vectors[len(labels) :], rivals)))


def with_margins(features, logits, vectors, labels):
    """Labels of voxels in NumPy, and where a program that rounds otherwise must say the same."""
    products = features.astype(np.float64) @ np.asarray(vectors, np.float64).T
    products[:, labels == 255] = -np.inf
    best = np.sort(products, -1)
    sure = (best[:, -1] - best[:, -2] > NEAR) & (np.abs(logits[:, 1] - logits[:, 0]) > NEAR)
    found = labels[products.argmax(-1)]
    occupied = logits[:, 1] > logits[:, 0]
    return np.where(occupied & (found != 255), found, FREE), sure | ~occupied & (logits[:, 0] - logits[:, 1] > NEAR)


def random_cells(heads, number=4 * CHUNK):
    size = [cells * factor for cells, factor in zip(heads.grid_size, heads.upscale, strict=True)]
    cells = np.random.default_rng(2).uniform(0, size, (number, 3)).astype(np.float32)
    return jnp.asarray(cells), np.arange(number) % 5 == 0


def test_chunks_change_nothing(heads, planes, text):
    cells, unseen = random_cells(heads)
    output = heads(planes, cells[None], cells[None])
    features, logits = np.asarray(output.point_features[0]), np.asarray(output.point_occupancy_logits[0])
    expected, sure = with_margins(features, logits, text.phrases, np.asarray(text.labels))
    found = np.asarray(jax.jit(labels_at, static_argnums=5)(heads, planes, cells, unseen, text, None))
    assert set(found[unseen]) == {FREE}
    assert sure.mean() > 0.98
    np.testing.assert_array_equal(found[sure & ~unseen], expected[sure & ~unseen])
    # The comparison says something: labels of several phrases occur, and more than one chunk is occupied.
    assert len(set(found)) > 3
    assert (logits[~unseen, 1] > logits[~unseen, 0]).sum() > CHUNK

    voxels = np.asarray(heads(planes).voxel_features[0]).reshape(-1, DIM)
    logits = np.asarray(heads(planes).occupancy_logits[0]).reshape(-1, 2)
    expected, sure = with_margins(voxels, logits, text.phrases, np.asarray(text.labels))
    found = np.asarray(grid_labels(heads, planes, text, None)).reshape(-1)
    np.testing.assert_array_equal(found[sure], expected[sure])


def test_sky_is_free(heads, planes, text):
    cells, unseen = random_cells(heads)
    labelled = text._replace(labels=jnp.where(text.labels == FREE, jnp.uint8(5), text.labels))
    run = jax.jit(labels_at, static_argnums=5)
    found, named = (np.asarray(run(heads, planes, cells, unseen, words, None)) for words in (text, labelled))
    assert (named == 5).any()
    np.testing.assert_array_equal(found, np.where(named == 5, FREE, named))


def test_absent_classes_take_no_part(heads, planes, text):
    cells, unseen = random_cells(heads)
    run = jax.jit(labels_at, static_argnums=5)
    usual = np.asarray(run(heads, planes, cells, unseen, text, None))
    np.testing.assert_array_equal(run(heads, planes, cells, unseen, text, float("-inf")), usual)
    free = run(heads, planes, cells, unseen, text._replace(labels=text.labels.at[4].set(7)), float("inf"))
    assert set(np.asarray(free)) == {FREE}

    output = heads(planes, cells[None], cells[None])
    features, logits = np.asarray(output.point_features[0]), np.asarray(output.point_occupancy_logits[0])
    counted = (logits[:, 1] > logits[:, 0]) & ~unseen
    leads = np.asarray(largest_leads(jnp.asarray(features), jnp.asarray(counted), text))
    labels = np.asarray(text.labels)
    of_class = {label: leads[labels == label].max() for label in set(labels) - {FREE}}
    in_order = sorted(of_class, key=of_class.get)
    # The first classes of that order up to one that the grid has; others stay.
    absent = in_order[: 1 + next(number for number, label in enumerate(in_order) if label in usual)]
    threshold = float(of_class[absent[-1]] + of_class[in_order[len(absent)]]) / 2
    kept = np.where(np.isin(labels, absent), 255, labels)
    expected, sure = with_margins(features, logits, text.phrases, kept)
    found = np.asarray(run(heads, planes, cells, unseen, text, threshold))
    assert not set(found) & set(absent)
    assert set(found) != {FREE}
    np.testing.assert_array_equal(found[sure & ~unseen], expected[sure & ~unseen])


def test_absence_is_judged_by_the_grid_for_the_grid(heads, planes, text):
    usual = np.asarray(grid_labels(heads, planes, text, None))
    np.testing.assert_array_equal(grid_labels(heads, planes, text, float("-inf")), usual)
    sky_first = text._replace(phrases=text.phrases[::-1], labels=text.labels[::-1], rivals=text.rivals[::-1])
    assert set(np.unique(grid_labels(heads, planes, sky_first, float("inf")))) == {FREE}
    output = heads(planes)
    occupied = np.asarray(output.occupancy_logits[0, ..., 1] > output.occupancy_logits[0, ..., 0]).reshape(-1)
    features = output.voxel_features[0].reshape(-1, DIM)
    leads = np.asarray(largest_leads(features, jnp.asarray(occupied), text))
    labels = np.asarray(text.labels)
    of_class = {label: leads[labels == label].max() for label in set(labels) - {FREE}}
    worst, second = sorted(of_class, key=of_class.get)[:2]
    found = np.asarray(grid_labels(heads, planes, text, float(of_class[worst] + of_class[second]) / 2))
    assert worst not in found
    others = usual != worst
    np.testing.assert_array_equal(found[others], usual[others])


@pytest.fixture(scope="module")
def key_frames(small_records):
    """Two key frames; the lidar of the second looks left and is mounted elsewhere."""
    source = RecordSource(small_records, "train")
    frames = [source[0], source[1]]
    turned = np.array([[0.0, -1.0, 0.0, 12.0], [1.0, 0.0, 0.0, -7.0], [0.0, 0.0, 1.0, 2.5], [0.0, 0.0, 0.0, 1.0]])
    frames[1] = dataclasses.replace(frames[1], lidar_to_ego=turned)
    return frames


@pytest.fixture(scope="module")
def labeller(small_run):
    return StudentLabels(small_run, None, prompt_set("gausstr"))


@pytest.fixture(scope="module")
def labelled(labeller, key_frames):
    return list(labeller.many(key_frames))


def test_a_run_is_asked_at_the_centres(labeller, labelled, key_frames, small_run):
    run = labeller.run
    assert run.step == 8
    settings = example_settings(run.config, training=False)

    @jax.jit
    def direct(restored, images, lidar_to_image, cells):
        return run.model(restored)(network_images(images), lidar_to_image, cells, cells)

    vectors, labels = (np.asarray(array) for array in labeller._text[:2])
    for frame, grid in zip(key_frames, labelled, strict=True):
        assert grid.sample_token == frame.sample_token
        placed = place_centres(frame.lidar_to_ego, run.student.volume)
        np.testing.assert_array_equal(grid.unseen.reshape(-1), placed.unseen)
        assert set(grid.queried[grid.unseen]) | set(grid.resampled[grid.unseen]) == {FREE}
        example = make_example(frame, settings, None)
        some = np.random.default_rng(0).choice(np.flatnonzero(~placed.unseen), 20_000, replace=False)
        arrays = (example["images"][None], example["lidar_to_image"][None], placed.cells[None, some])
        output = direct(run.restored, *arrays)
        features, logits = np.asarray(output.point_features[0]), np.asarray(output.point_occupancy_logits[0])
        expected, sure = with_margins(features, logits, vectors, labels)
        assert sure.mean() > 0.9
        np.testing.assert_array_equal(grid.queried.reshape(-1)[some][sure], expected[sure])

        features = np.asarray(output.voxel_features[0]).reshape(-1, DIM)
        logits = np.asarray(output.occupancy_logits[0]).reshape(-1, 2)
        expected, sure = with_margins(features, logits, vectors, labels)
        sure = sure[placed.voxels] & ~placed.unseen
        np.testing.assert_array_equal(grid.resampled.reshape(-1)[sure], expected[placed.voxels][sure])
        for found in (grid.queried, grid.resampled):
            assert 0.001 < (found != FREE).mean() < 0.999
    assert (labelled[0].unseen != labelled[1].unseen).any()


@pytest.mark.slow
def test_several_devices_say_the_same(labeller, labelled, small_run, small_records, tmp_path):
    third = labeller.many([RecordSource(small_records, "train")[2]])
    program = """
        import dataclasses, sys
        import jax, numpy as np
        from pop3d_jax.data.records import RecordSource
        from pop3d_jax.occ3d.prompts import prompt_set
        from pop3d_jax.occ3d.student_labels import StudentLabels
        assert len(jax.local_devices()) == 2
        source = RecordSource(sys.argv[2], "train")
        frames = [source[number] for number in (0, 1, 2)]
        turned = np.array([[0.0, -1.0, 0.0, 12.0], [1.0, 0.0, 0.0, -7.0], [0.0, 0.0, 1.0, 2.5], [0.0, 0.0, 0.0, 1.0]])
        frames[1] = dataclasses.replace(frames[1], lidar_to_ego=turned)
        grids = list(StudentLabels(sys.argv[1], None, prompt_set("gausstr")).many(frames))
        np.savez(sys.argv[3], *[np.stack([grid.queried, grid.resampled, grid.unseen]) for grid in grids])
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), small_run, small_records, tmp_path / "grids.npz"],
        env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    with np.load(tmp_path / "grids.npz") as grids:
        assert len(grids.files) == 3
        for name, expected in zip(grids.files, [*labelled, *third], strict=True):
            found = grids[name]
            np.testing.assert_array_equal(found[2], expected.unseen)
            # Two programs round otherwise: a voxel on the edge of a decision may fall to the other side.
            for labels, others in ((found[0], expected.queried), (found[1], expected.resampled)):
                assert (labels != others).mean() < 1e-4


def test_a_threshold_that_is_no_number_is_named(small_run):
    with pytest.raises(ValueError, match="absent_threshold must be a number"):
        StudentLabels(small_run, None, prompt_set("plain"), float("nan"))

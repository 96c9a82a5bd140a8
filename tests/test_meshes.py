"""The same experiment on one device and on meshes of simulated ones: the same losses, parameters and counts."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import small_fields

from configs import demo

_PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run_on(small_records, tiny_clip_folder, tmp_path_factory):
    """Runs tests/mesh_worker.py on eight simulated devices: `run_on("1x1,4x2")` gives its arrays."""

    def run(*meshes):
        folder = tmp_path_factory.mktemp("meshes")
        config = demo.get_config()
        config.update_from_flattened_dict(small_fields(small_records, tiny_clip_folder))
        config.batch_size = 8
        config.optim.warmup_steps = 0  # parameters move at once
        # At the demo's rate the first steps overshoot, and every rounding grows tenfold with each.
        config.optim.learning_rate = 3e-4
        # Muon, and Adam with a tiny epsilon, would turn the rounding of tiny gradients into whole steps.
        config.optim.name, config.optim.epsilon = "adamw", 1e-4
        # The backbone must see the same bits: a rounding that lifts one activation of a flat wall over a ReLU's kink
        # changes the sum behind a BatchNorm bias by 1e-4 of itself. What distortion does to images is compared apart.
        config.data.photometric = False
        (folder / "config.json").write_text(config.to_json())
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        worker = str(_PROJECT / "tests" / "mesh_worker.py")
        done = subprocess.run(
            [sys.executable, worker, "config.json", "out.npz", "checkpoints", *meshes],
            cwd=folder,
            env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(_PROJECT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        with np.load(folder / "out.npz") as arrays:
            return dict(arrays)

    return run


def assert_same(runs, mesh):
    losses = runs["1x1/losses"]
    assert len(set(losses.tolist())) == len(losses)  # something was learned
    # Measured: at most 2e-7, and 4e-6 for parameters.
    np.testing.assert_allclose(runs[f"{mesh}/losses"], losses, rtol=1e-6)
    names = [name.removeprefix("1x1/") for name in runs if name.startswith("1x1/parameters")]
    assert len(names) > 50
    for name in names:
        expected, found = runs[f"1x1/{name}"], runs[f"{mesh}/{name}"]
        assert np.linalg.norm(found - expected) <= 2e-5 * max(np.linalg.norm(expected), 1e-3), name
    for field in ("occupancy", "voxels_all", "points"):
        expected = runs[f"1x1/confusion_{field}"]
        assert expected.sum() > 100
        np.testing.assert_array_equal(runs[f"{mesh}/confusion_{field}"], expected)
    distorted = runs["1x1/distorted"]
    assert distorted.std() > 20
    np.testing.assert_allclose(runs[f"{mesh}/distorted"], distorted, atol=1e-3)  # of 255
    data = int(mesh.split("x")[0])
    assert runs[f"{mesh}/largest_share_of_optimizer"] == 1 / data


@pytest.mark.slow
def test_batch_and_views_over_eight_devices(run_on):
    assert_same(run_on("1x1,4x2"), "4x2")


@pytest.mark.slow
def test_every_mesh_and_a_checkpoint_that_moves_between_them(run_on):
    runs = run_on("1x1,8x1,4x2,2x3,1x6", "4x2,2x3")
    for mesh in ("8x1", "4x2", "2x3", "1x6"):
        assert_same(runs, mesh)
    np.testing.assert_allclose(runs["moved/losses"], runs["1x1/losses"], rtol=1e-6)

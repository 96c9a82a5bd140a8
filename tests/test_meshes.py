"""The same experiment on one device and on meshes of simulated ones: the same losses, parameters and counts."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

_PROJECT = Path(__file__).resolve().parent.parent
MESHES = ("8x1", "4x2", "2x3", "1x6")


@pytest.fixture(scope="module")
def runs(small_records, tiny_clip_folder, tmp_path_factory):
    """Arrays of tests/mesh_worker.py."""
    from conftest import small_fields

    from configs import demo

    folder = tmp_path_factory.mktemp("meshes")
    config = demo.get_config()
    config.update_from_flattened_dict(small_fields(small_records, tiny_clip_folder))
    config.batch_size = 8
    # A schedule that moves parameters at once.
    config.optim.warmup_steps = 0
    (folder / "config.json").write_text(config.to_json())
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, str(_PROJECT / "tests" / "mesh_worker.py"), "config.json", "out.npz", "checkpoints"],
        cwd=folder,
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(_PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    with np.load(folder / "out.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("mesh", MESHES)
def test_training_is_the_same_on_every_mesh(runs, mesh):
    losses = runs["1x1/losses"]
    assert len(set(losses.tolist())) == len(losses)  # something was learned
    np.testing.assert_allclose(runs[f"{mesh}/losses"], losses, rtol=2e-5)
    names = [name.removeprefix("1x1/") for name in runs if name.startswith("1x1/parameters")]
    assert len(names) > 50
    for name in names:
        expected, found = runs[f"1x1/{name}"], runs[f"{mesh}/{name}"]
        np.testing.assert_allclose(
            np.linalg.norm(found - expected), 0, atol=1e-4 * max(np.linalg.norm(expected), 1e-3), err_msg=name
        )


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("field", ["occupancy", "voxels_all", "points"])
def test_evaluation_counts_the_same_on_every_mesh(runs, mesh, field):
    expected = runs[f"1x1/confusion_{field}"]
    assert expected.sum() > 1000
    np.testing.assert_array_equal(runs[f"{mesh}/confusion_{field}"], expected)


@pytest.mark.parametrize(("mesh", "share"), [("8x1", 1 / 8), ("4x2", 1 / 4), ("2x3", 1 / 2), ("1x6", 1)])
def test_the_optimizer_is_spread_over_the_data_axis(runs, mesh, share):
    assert runs[f"{mesh}/largest_share_of_optimizer"] == share


def test_a_checkpoint_goes_on_on_another_mesh(runs):
    np.testing.assert_allclose(runs["moved/losses"], runs["1x1/losses"], rtol=2e-5)

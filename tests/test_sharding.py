import subprocess
import sys
import textwrap

import pytest
from jax.sharding import PartitionSpec

from pop3d_jax import sharding


def test_logical_axes_become_mesh_axes():
    assert sharding.partition_spec("batch", "camera", None) == PartitionSpec("data", "camera", None)


def test_two_axes_on_one_mesh_axis_collide():
    with pytest.raises(ValueError, match="collide"):
        sharding.partition_spec("batch", "batch")


def test_an_axis_without_a_rule_is_named():
    with pytest.raises(ValueError, match="height"):
        sharding.partition_spec("batch", "height")


def test_a_mesh_must_cover_the_devices():
    with pytest.raises(ValueError, match="does not cover"):
        sharding.make_mesh(data=3, camera=1)


def test_batches_are_split_over_eight_simulated_devices():
    program = """
        import numpy as np, jax
        from pop3d_jax.sharding import make_mesh, shard_batch
        mesh = make_mesh(data=-1, camera=2)
        assert dict(mesh.shape) == {"data": 4, "camera": 2}
        batch = {"images": np.arange(8 * 6 * 2.0).reshape(8, 6, 2), "points": np.ones((8, 5, 3))}
        arrays = shard_batch(batch, mesh)
        assert {shard.data.shape for shard in arrays["images"].addressable_shards} == {(2, 3, 2)}
        assert {shard.data.shape for shard in arrays["points"].addressable_shards} == {(2, 5, 3)}
        np.testing.assert_array_equal(arrays["images"], batch["images"])
        try:
            shard_batch({"points": np.ones((6, 5, 3))}, mesh)
        except ValueError as error:
            assert "do not divide over 4" in str(error)
        else:
            raise AssertionError("6 examples over 4 devices were accepted")
        print("done")
    """
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PATH": ""}
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.stdout.strip() == "done", finished.stderr

"""`implementation="auto"`: the nearest measured shape decides, the platform first."""

import json

import jax
import jax.numpy as jnp
import pytest

from pop3d_jax.ops import choice
from pop3d_jax.ops.deformable_attention import deformable_attention, resolve
from pop3d_jax.ops.deformable_conv import deformable_conv2d


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty table of its own."""
    path = tmp_path / "times.json"
    monkeypatch.setattr(choice, "TABLE", path)
    choice._rows.cache_clear()
    yield path
    choice._rows.cache_clear()


def _row(queries, **seconds):
    return {"sizes": {"queries": queries, "texels": 100, "samples": 8}, "seconds": seconds}


def test_without_measurements_the_default_is_taken(table):
    assert choice.fastest("deformable_attention", "gather", {"queries": 5}) == "gather"


def test_the_nearest_shape_decides(table):
    small, large = _row(10, gather=2.0, matmul=1.0), _row(10_000, gather=2.0, packed=1.0)
    choice.write_rows("deformable_attention", [small, large])
    for queries, expected in ((1, "matmul"), (50, "matmul"), (5_000, "packed"), (10**6, "packed")):
        assert resolve("auto", 100, (queries, 2, 1, 4)) == expected
    assert resolve("matmul", 100, (1, 2, 1, 4)) == "matmul"


def test_only_what_is_clearly_faster_replaces_the_default_and_never_the_reference(table):
    choice.write_rows("deformable_attention", [_row(10, gather=1.0, packed=0.9, reference=0.1)])
    assert resolve("auto", 100, (10, 2, 1, 4)) == "gather"
    choice.write_rows("deformable_attention", [_row(10, gather=1.0, packed=0.7, reference=0.1)])
    assert resolve("auto", 100, (10, 2, 1, 4)) == "packed"


def test_a_row_without_times_is_refused(table):
    choice.write_rows("deformable_attention", [_row(10, gather=1.0)])
    with pytest.raises(ValueError, match="nothing was measured of deformable_attention"):
        choice.write_rows("deformable_attention", [_row(10)])
    assert resolve("auto", 100, (10, 2, 1, 4)) == "gather"


def test_rows_of_other_operations_and_platforms_stay(table):
    other = {"operation": "deformable_attention", "platform": "tpu", **_row(10, pallas=1.0)}
    table.write_text(json.dumps({"rows": [other]}))
    choice._rows.cache_clear()
    choice.write_rows("deformable_conv2d", [{"sizes": {"cells": 1}, "seconds": {"taps": 1.0}}])
    choice.write_rows("deformable_attention", [_row(10, gather=1.0)])
    choice.write_rows("deformable_attention", [_row(20, packed=1.0)])
    rows = json.loads(table.read_text())["rows"]
    assert other in rows
    assert [(row["operation"], row["platform"]) for row in rows] == [
        ("deformable_attention", "cpu"),
        ("deformable_attention", "tpu"),
        ("deformable_conv2d", "cpu"),
    ]
    # The row of the other platform is not asked here.
    assert resolve("auto", 100, (10, 2, 1, 4)) == "packed"


def test_the_platform_is_that_of_the_mesh():
    assert choice.platform() == "cpu"
    mesh = jax.sharding.AbstractMesh(
        (1,), ("data",), abstract_device=jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert choice.platform() == "tpu"


@pytest.mark.slow
def test_the_committed_table_names_implementations_that_exist():
    rows = json.loads(choice.TABLE.read_text())["rows"]
    assert {row["operation"] for row in rows} == {"deformable_attention", "deformable_conv2d"}
    values, locations = jnp.ones((4, 1, 2)), jnp.full((1, 1, 1, 1, 2), 0.5)
    weights = jnp.ones((1, 1, 1, 1))
    x, offset, mask, kernel = (
        jnp.ones((1, 2, 2, 1)),
        jnp.zeros((1, 2, 2, 9, 2)),
        jnp.ones((1, 2, 2, 9)),
        jnp.ones((3, 3, 1, 1)),
    )
    for row in rows:
        for implementation in row["seconds"]:
            if row["operation"] == "deformable_attention":
                result = deformable_attention(values, ((2, 2),), locations, weights, implementation=implementation)
            else:
                result = deformable_conv2d(x, offset, mask, kernel, padding=1, implementation=implementation)
            assert jnp.isfinite(result).all()

"""Counting a traced program's work: loops by their turns, devices all of them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from pop3d_jax.ops.deformable_attention import deformable_attention
from pop3d_jax.traced_cost import TracedCost, traced_cost

FLOAT = 4


def _shape(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_matrix_product_and_a_convolution():
    cost = traced_cost(lambda a, b: a @ b, _shape(3, 5), _shape(5, 7))
    assert cost == TracedCost(2 * 3 * 5 * 7, FLOAT * (15 + 35 + 21), 0)
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    cost = traced_cost(convolve, _shape(2, 8, 9, 4), _shape(3, 3, 4, 6))
    assert cost.flops == 2 * (2 * 6 * 7 * 6) * (3 * 3 * 4)
    strided = functools.partial(convolve, window_strides=(2, 2))
    for arguments in ((0,), (1,)):
        gradient = jax.grad(lambda *arrays: strided(*arrays).sum(), arguments)
        once = 2 * (2 * 4 * 4 * 6) * 4
        # Of a 1 x 1 kernel both gradients are as much work as the forward pass.
        cost = traced_cost(gradient, _shape(2, 8, 8, 4), _shape(1, 1, 4, 6))
        assert once <= cost.flops <= 2 * once


def test_loops_count_as_often_as_they_run_and_conditions_by_their_dearest_branch():
    def loop(a):
        return jax.lax.scan(lambda total, _: (total @ total, None), a, length=11)[0]

    assert traced_cost(loop, _shape(4, 4)).flops == 11 * 2 * 4**3
    assert traced_cost(jax.jit(jax.checkpoint(loop)), _shape(4, 4)).flops == 11 * 2 * 4**3

    def condition(a):
        return jax.lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a, a)

    assert traced_cost(condition, _shape(4, 4)).flops == 2 * 2 * 4**3


def test_rows_read_and_added_to():
    index = jax.ShapeDtypeStruct((6,), jnp.int32)
    cost = traced_cost(lambda table, index: table[index], _shape(10, 3), index)
    assert cost.gathered_rows == 6
    assert cost.bytes == 2 * FLOAT * 18
    cost = traced_cost(lambda table, index, rows: table.at[index].add(rows), _shape(10, 3), index, _shape(6, 3))
    assert cost.gathered_rows == 6


def test_devices_are_counted_together():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    spread = jax.shard_map(
        lambda a: a @ a.T, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")
    )
    assert traced_cost(spread, _shape(8, 5)).flops == 4 * (2 * 2 * 2 * 5)


@pytest.mark.parametrize(("implementation", "gathers"), [("gather", True), ("packed", True), ("matmul", False)])
def test_what_gathers_says_so(implementation, gathers):
    values, locations, weights = _shape(12, 2, 4), _shape(300, 2, 1, 5, 2), _shape(300, 2, 1, 5)
    attend = functools.partial(deformable_attention, implementation=implementation)
    cost = traced_cost(lambda *arrays: attend(arrays[0], ((3, 4),), *arrays[1:]), values, locations, weights)
    # Whole groups are read, so a little more than the samples' corners (or samples, packed).
    samples = 300 * 2 * 5 * (4 if implementation == "gather" else 1)
    assert (samples <= cost.gathered_rows < 2 * samples) if gathers else cost.gathered_rows == 0
    assert (cost.flops > 0) == (implementation == "matmul")


def test_a_kernel_counts_by_its_estimate():
    values, locations, weights = _shape(12, 2, 4), _shape(32, 2, 1, 5, 2), _shape(32, 2, 1, 5)
    attend = functools.partial(deformable_attention, implementation="pallas")
    cost = traced_cost(lambda *arrays: attend(arrays[0], ((3, 4),), *arrays[1:]), values, locations, weights)
    # Two heads, 32 queries, a map padded to 8 x 128 texels, five samples and four channels.
    texels = 2 * 32 * 8 * 128
    assert cost.flops == 2 * texels * (5 + 4)
    backward = traced_cost(
        jax.grad(lambda *arrays: attend(arrays[0], ((3, 4),), *arrays[1:]).sum()), values, locations, weights
    )
    assert backward.flops == 2 * texels * (5 + 4) + 2 * texels * (3 * 5 + 2 * 4)

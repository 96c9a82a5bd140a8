"""What a traced program computes, counted from its jaxpr: loops count as often as they run.

XLA's own count (`compiled.cost_analysis()`) takes a loop's body once, which says little of a network made of loops.
Here matrix products, convolutions, gathers, scatters and Pallas kernels are counted before XLA fuses anything, times
the lengths of the loops around them. Elementwise work is left out.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


@dataclasses.dataclass(frozen=True)
class TracedCost:
    """Work of a program.

    Attributes:
      flops: of matrix products, convolutions and kernels; two for a multiplication with its addition.
      bytes: read and written by matrix products, convolutions, gathers, scatters and kernels if nothing was fused: an
        upper bound of their traffic.
      gathered_rows: rows that gathers read and scatters add to: what is slow where there is no hardware for it.
    """

    flops: float | int = 0
    bytes: float | int = 0
    gathered_rows: float | int = 0

    def __add__(self, other: "TracedCost") -> "TracedCost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return TracedCost(*(a + b for a, b in pairs))

    def __mul__(self, factor: float | int) -> "TracedCost":
        return TracedCost(*(factor * value for value in dataclasses.astuple(self)))


def traced_cost(function: Any, *arguments: Any) -> TracedCost:
    """Cost of ``function(*arguments)``; arguments may be shapes. Inside `shard_map` all devices are counted."""
    return jaxpr_cost(jax.make_jaxpr(function)(*arguments).jaxpr)


def jaxpr_cost(jaxpr: Jaxpr) -> TracedCost:
    """Cost of a traced program."""
    return sum((_equation_cost(equation) for equation in jaxpr.eqns), TracedCost())


def _equation_cost(equation: JaxprEqn) -> TracedCost:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return TracedCost(2.0 * depth * equation.outvars[0].aval.size, _moved(equation))
    if name == "conv_general_dilated":
        out_channel_axis = parameters["dimension_numbers"].rhs_spec[0]
        kernel = equation.invars[1].aval
        taps = kernel.size / kernel.shape[out_channel_axis]
        # Zeros between the inputs, as in the gradient of a strided convolution, are no work.
        zeros = math.prod(parameters["lhs_dilation"])
        return TracedCost(2.0 * taps * equation.outvars[0].aval.size / zeros, _moved(equation))
    if name == "gather":
        rows = equation.outvars[0].aval
        row_size = math.prod(parameters["slice_sizes"])
        return TracedCost(bytes=2.0 * _bytes(rows), gathered_rows=rows.size / max(row_size, 1))
    if name.startswith("scatter"):
        updates = equation.invars[2].aval
        inside = [updates.shape[axis] for axis in parameters["dimension_numbers"].update_window_dims]
        return TracedCost(bytes=3.0 * _bytes(updates), gathered_rows=updates.size / max(math.prod(inside), 1))
    if name == "pallas_call":
        estimate = parameters["cost_estimate"]
        return TracedCost(float(estimate.flops), float(estimate.bytes_accessed)) if estimate else TracedCost()
    if name == "cond":
        # One of the branches runs: the dearest.
        costs = [jaxpr_cost(branch.jaxpr) for branch in parameters["branches"]]
        if parameters.get("branches_platforms"):
            # The same work for other platforms; the first is the one it was written for.
            return costs[0]
        return max(costs, key=lambda cost: (cost.flops, cost.bytes))
    inner = sum((jaxpr_cost(jaxpr) for jaxpr in _subprograms(parameters)), TracedCost())
    if name == "scan":
        return inner * parameters["length"]
    if name == "shard_map":
        return inner * math.prod(parameters["mesh"].shape.values())
    return inner


def _subprograms(parameters: dict[str, Any]) -> list[Jaxpr]:
    found = []
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                found.append(item)
    return found


def _bytes(aval: Any) -> float | int:
    return float(aval.size * aval.dtype.itemsize)


def _moved(equation: JaxprEqn) -> float | int:
    return sum(_bytes(variable.aval) for variable in (*equation.invars, *equation.outvars))

"""How the benchmarks take a time and a compiler's word."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from pop3d_jax.traced_cost import TracedCost


def median_seconds(function: Callable[..., Any], arguments: tuple, repeats: int) -> float:
    """Median run time; one run before does not count."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def outcome(function: Callable[..., Any], arguments: tuple, repeats: int, place: Any = None) -> dict[str, Any]:
    """Compiles a function, and runs it unless it is for a chip that is not here.

    Args:
      function: not yet jitted.
      arguments: its arrays.
      repeats: timed runs.
      place: sharding on a chip that is not here: compile only.

    Returns:
      compile_seconds, temporary_bytes and, when run, seconds; or refused, why it does not fit.
    """
    start = time.perf_counter()
    given = arguments
    if place is not None:
        given = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in arguments)
    try:
        compiled = jax.jit(function).lower(*given).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"refused": "does not fit into the chip's memory"}
    row: dict[str, Any] = {
        "compile_seconds": time.perf_counter() - start,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    if place is None:
        row["seconds"] = median_seconds(compiled, arguments, repeats)
    return row


def absent_chip(topology: str) -> Any:
    """Where `outcome` compiles for: one chip of a TPU that is not here. JAX itself stays on the CPU."""
    from configs.pop3d_nuscenes import get_config
    from pop3d_jax.compile_report import topology_mesh
    from pop3d_jax.sharding import make_mesh, replicated

    jax.config.update("jax_platforms", "cpu")
    chip = topology_mesh(topology, get_config()).devices.flat[0]
    return replicated(make_mesh(1, 1, [chip]))


# What `figures` tells.
FIGURES = ["median", "temporaries", "matrix FLOPs", "bytes unfused", "rows gathered or scattered"]


def figures(row: dict[str, Any], cost: TracedCost) -> tuple[str, ...]:
    """Cells of a table: the outcome and the traced cost of one function."""
    if "refused" in row:
        return row["refused"], "", *_cells(cost)
    seconds = f"{row['seconds'] * 1e3:.1f} ms" if "seconds" in row else "not run"
    return seconds, f"{row['temporary_bytes'] / 1e6:.0f} MB", *_cells(cost)


def _cells(cost: TracedCost) -> tuple[str, str, str]:
    return f"{cost.flops / 1e9:.1f} G", f"{cost.bytes / 1e9:.2f} GB", f"{cost.gathered_rows / 1e6:.2f} M"

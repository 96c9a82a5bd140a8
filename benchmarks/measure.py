"""How the benchmarks take a time and a compiler's word."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.report import Table
from pop3d_jax.traced_cost import TracedCost, traced_cost

COLUMNS = [
    "shape",
    "implementation",
    "pass",
    "median",
    "temporaries",
    "matrix FLOPs",
    "bytes unfused",
    "rows gathered or scattered",
    "largest difference",
]


def timed(function: Callable[..., Any], arguments: tuple) -> float:
    """Seconds of one call, results included."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def peak_mebibytes() -> float:
    """Largest resident set of this program. Not getrusage's, which a child inherits from the process that forked it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def medians_in_turns(calls: Sequence[tuple[Callable[..., Any], tuple]], repeats: int) -> list[float]:
    """Median seconds of each of several calls, one after the other in rounds, so that other work hits all alike.

    One round before does not count.
    """
    rounds = [[timed(function, arguments) for function, arguments in calls] for _ in range(repeats + 1)]
    return [statistics.median(seconds) for seconds in zip(*rounds[1:], strict=True)]


def compiled_for(function: Callable[..., Any], arguments: tuple, place: Any = None) -> Any:
    """The compiled function, or None where it does not fit into the memory of the chip it is for.

    Args:
      function: not yet jitted.
      arguments: its arrays.
      place: sharding on a chip that is not here; None compiles for this machine.
    """
    if place is not None:
        arguments = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in arguments)
    try:
        return jax.jit(function).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def absent_chip(topology: str) -> Any:
    """Where `compiled_for` compiles for: one chip of a TPU that is not here. JAX itself stays on the CPU."""
    from configs.pop3d_nuscenes import get_config
    from pop3d_jax.compile_report import topology_mesh
    from pop3d_jax.sharding import make_mesh, replicated

    jax.config.update("jax_platforms", "cpu")
    chip = topology_mesh(topology, get_config()).devices.flat[0]
    return replicated(make_mesh(1, 1, [chip]))


def compare(
    table: Table,
    shape: str,
    functions: Callable[[str], dict[str, Callable[..., Any]]],
    implementations: Sequence[str],
    arguments: tuple,
    repeats: int,
    place: Any = None,
) -> dict[str, float]:
    """Adds a row for each implementation and pass; they run in turns, so that other work on the machine hits all alike.

    Args:
      table: with the columns `COLUMNS`.
      shape: its name.
      functions: from an implementation to its two passes by name, forward first.
      implementations: the first one is what the others' results are compared with.
      arguments: arrays.
      repeats: timed rounds; one before does not count.
      place: see `compiled_for`; where it is given nothing runs.

    Returns:
      Shortest seconds of the second pass by implementation, of those that ran.
    """
    passes = {(name, what): f for name in implementations for what, f in functions(name).items()}
    programs = {key: compiled_for(function, arguments, place) for key, function in passes.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in passes}
    if place is None:
        for round_ in range(repeats + 1):
            for key, program in programs.items():
                if program is not None:
                    taken = timed(program, arguments)
                    seconds[key] += [taken] if round_ else []
    times, expected = {}, None
    for number, ((name, what), function) in enumerate(passes.items()):
        program, key = programs[name, what], (name, what)
        difference = ""
        if number % 2 == 0 and seconds[key]:
            result = np.asarray(program(*arguments), np.float64)
            expected = result if expected is None else expected
            difference = f"{np.abs(result - expected).max():.1e}"
        elif seconds[key]:
            times[name] = min(seconds[key])
        took = f"{statistics.median(seconds[key]) * 1e3:.1f} ms" if seconds[key] else "not run"
        memory = "does not fit" if program is None else f"{program.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB"
        table.add(shape, name, what, took, memory, *_cells(traced_cost(function, *arguments)), difference)
    return times


def _cells(cost: TracedCost) -> tuple[str, str, str]:
    return f"{cost.flops / 1e9:.2f} G", f"{cost.bytes / 1e9:.3f} GB", f"{cost.gathered_rows / 1e6:.2f} M"

"""Compiles an experiment's programs for TPUs that are not there, and tells what each chip would need.

    python -m pop3d_jax.train --config configs/pop3d_nuscenes.py --compile_only --topology v5e:4x4

Needs the extra `tpu` (libtpu, which compiles for any TPU without having one). All numbers are the compiler's own;
nothing is executed, and no time is predicted: that needs the machine.
"""

import contextlib
import dataclasses
import logging as standard_logging
import os
import re
import time
from collections.abc import Iterator

import jax
import ml_collections
from jax.experimental import topologies
from jax.sharding import Mesh

from pop3d_jax.abstract_programs import AbstractProgram
from pop3d_jax.hlo_text import LargeArray, collectives, largest_arrays
from pop3d_jax.sharding import make_mesh
from pop3d_jax.tasks import abstract_inference, abstract_training, describe_sizes
from pop3d_jax.traced_cost import jaxpr_cost

# Main memory of a chip in bytes, by the name of its topologies (Cloud TPU documentation).
CAPACITY = {"v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}
_LARGEST = 10
# Share of a chip's memory from which on a program is said to be tight.
_TIGHT = 0.95


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program on one chip.

    Attributes:
      name: "training step" or "inference step".
      seconds: how long compilation took here.
      arguments, outputs, aliased, temporaries: bytes; `aliased` outputs lie in arguments' memory.
      peak: bytes that are alive at the same time at most, without the gaps between them.
      matrix_flops: of matrix products and convolutions, every turn of a loop counted, before the compiler
        (`traced_cost`), divided by the chips: right as long as all of it follows the batch (Muon's updates do not);
        None where the mesh has a camera axis, over which some of the work is repeated and not shared.
      flops, bytes_accessed: the compiler's count, in which a loop's body counts once; None where it does not say.
      collectives: by kind, how many and the bytes of their results; inside loops once.
      largest: arrays in main memory.
      refused: the compiler's words where the program does not fit at all; all numbers are 0 then.
    """

    name: str
    seconds: float
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    peak: int = 0
    matrix_flops: float | None = 0.0
    flops: float | None = None
    bytes_accessed: float | None = None
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    largest: tuple[LargeArray, ...] = ()
    refused: str = ""

    @property
    def with_gaps(self) -> int:
        """Bytes that the chip must have at most: all that is laid out for the program.

        The compiler refuses a program by a count of its own, which it does not tell of those that it accepts. Small
        programs near a v5e's limit showed it to be within a few percent of this sum, below.
        """
        return max(self.arguments + self.temporaries + self.outputs - self.aliased, self.peak)


def topology_mesh(topology: str, config: ml_collections.ConfigDict) -> Mesh:
    """The experiment's mesh over the chips of a topology such as "v5e:4x4".

    Raises:
      ValueError: unknown topology, libtpu is not installed, or the mesh does not cover the chips.
    """
    family = topology.partition(":")[0]
    if family not in CAPACITY:
        raise ValueError(f"--topology={topology}: known are {', '.join(CAPACITY)}, for example v5e:4x4")
    # Several compilations may run side by side: no chip is touched.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # libtpu wants to know the machine it runs on, which is none; what is said here does not touch the topology.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise ValueError(
            f"--topology={topology} cannot be described ({' '.join(str(error).split())[:300]}): is the extra installed "
            "(pip install 'pop3d-jax[tpu]'), and does this topology exist?"
        ) from error
    return make_mesh(config.mesh.data, config.mesh.camera, description.devices)


def compile_programs(config: ml_collections.ConfigDict, topology: str, steps: int = 100_000) -> list[Compiled]:
    """Compiles the training and the inference step of the experiment's task.

    Args:
      config: the experiment; its records and weights are not read.
      topology: of the TPU; `config.batch_size` key frames are spread over its chips.
      steps: length of the schedule, a constant of the program.
    """
    mesh = topology_mesh(topology, config)
    training = compile_training(config, mesh, steps)
    with jax.set_mesh(mesh):
        return [training, _compiled(abstract_inference(config, mesh))]


def compile_training(config: ml_collections.ConfigDict, mesh: Mesh, steps: int = 100_000) -> Compiled:
    """Compiles the training step alone, for any mesh."""
    with jax.set_mesh(mesh):
        return _compiled(abstract_training(config, mesh, steps))


def _compiled(abstract: AbstractProgram) -> Compiled:
    start = time.monotonic()
    try:
        with _quiet():
            traced = abstract.function.trace(*abstract.arguments)
            program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(abstract.name, time.monotonic() - start, refused=_first_lines(str(error)))
    seconds = time.monotonic() - start
    mesh = jax.sharding.get_abstract_mesh()
    memory, cost, text = program.memory_analysis(), program.cost_analysis() or {}, program.as_text()
    return Compiled(
        abstract.name,
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
        None if mesh.shape.get("camera", 1) > 1 else jaxpr_cost(traced.jaxpr.jaxpr).flops / mesh.size,
        cost.get("flops"),
        cost.get("bytes accessed"),
        collectives(text),
        tuple(largest_arrays(text, _LARGEST)),
    )


def _first_lines(message: str) -> str:
    """What was asked for and the largest allocations, of a message of hundreds of lines."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    kept = [line for line in lines if re.search(r"Used .* of |Program hbm|exceed|Size:|Operator:|Shape:", line)]
    return "\n".join((kept or lines)[:40])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without JAX's warnings of buffers that cannot be donated: the batch is no part of the state."""
    logger = standard_logging.getLogger("jax")
    before = logger.level
    logger.setLevel(standard_logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def format_report(programs: list[Compiled], topology: str, config: ml_collections.ConfigDict) -> str:
    """The tables as a person reads them."""
    capacity = CAPACITY[topology.partition(":")[0]]
    lines = [
        f"{topology}, batch {config.batch_size}, {config.model.compute_dtype}, remat {config.model.remat}, "
        f"{describe_sizes(config)}",
        "",
        f"{'per chip':<24}" + "".join(f"{program.name:>20}" for program in programs),
    ]
    rows = [
        ("arguments", lambda p: _size(p.arguments)),
        ("temporaries", lambda p: _size(p.temporaries)),
        ("outputs not in arguments", lambda p: _size(p.outputs - p.aliased)),
        ("alive at a time", lambda p: _size(p.peak)),
        ("of the chip's memory", lambda p: f"{100 * p.peak / capacity:.1f} %"),
        ("with gaps, at most", lambda p: _size(p.with_gaps)),
        ("of the chip's memory", lambda p: f"{100 * p.with_gaps / capacity:.1f} %"),
        ("matrix FLOPs", lambda p: "-" if p.matrix_flops is None else f"{p.matrix_flops / 1e12:.2f} T"),
        ("FLOPs, loop bodies once", lambda p: "-" if p.flops is None else f"{p.flops / 1e12:.2f} T"),
        ("bytes, loop bodies once", lambda p: "-" if p.bytes_accessed is None else _size(p.bytes_accessed)),
    ]
    for label, value in rows:
        cells = ["does not fit" if program.refused else value(program) for program in programs]
        lines.append(f"{label:<24}" + "".join(f"{cell:>20}" for cell in cells))
    lines.append(f"{'compiled in':<24}" + "".join(f"{program.seconds:>18.0f} s" for program in programs))
    lines += [
        f"{program.name}: the compiler accepts it, but it may need all of the chip's memory; leave it some room"
        for program in programs
        if not program.refused and program.with_gaps > _TIGHT * capacity
    ]
    for program in programs:
        lines += ["", f"{program.name}: collectives (in loops counted once)"]
        lines += [f"  {kind:<22}{count:>6}{_size(size):>14}" for kind, (count, size) in program.collectives.items()]
        if not program.collectives:
            lines.append("  none")
        if program.refused:
            lines += ["", f"{program.name}: the compiler says", *(f"  {line}" for line in program.refused.splitlines())]
            continue
        lines += ["", f"{program.name}: largest arrays in main memory"]
        for array in program.largest:
            lines.append(f"  {_size(array.bytes):>10}  {array.shape:<28}  {array.source or array.operation}")
    return "\n".join(lines)


def fits(programs: list[Compiled], topology: str) -> bool:
    """Whether every program stays within the chip's memory: the compiler's verdict."""
    capacity = CAPACITY[topology.partition(":")[0]]
    return all(not program.refused and program.peak <= capacity for program in programs)


def _size(count: float | int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"

"""Several hosts as one program: joining them, and stopping together when one of them is told to go."""

import glob
import os
import signal
from collections.abc import Mapping
from types import FrameType, TracebackType

import jax
from absl import logging
from jax.experimental import multihost_utils

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Exit status of a process that was asked to end (128 + SIGTERM): schedulers start it again.
STOPPED_STATUS = 128 + signal.SIGTERM


def join_hosts(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of this program, where the environment says that there are any.

    Cloud TPU, GKE, SLURM and Open MPI are recognised; elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say it. Must come before the first use of a device.

    Raises:
      ValueError: one of the three variables is given, and not all, or not as numbers.
    """
    given = [name for name in _VARIABLES if environment.get(name)]
    # Between processes on CPUs; accelerators have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if given:
        missing = [name for name in _VARIABLES if name not in given]
        numbers = [environment.get(name, "") for name in _VARIABLES[1:]]
        if missing or not all(number.isdigit() for number in numbers):
            raise ValueError(
                f"several processes need all of {', '.join(_VARIABLES)}, the last two as numbers; "
                f"given are {', '.join(f'{name}={environment[name]}' for name in given)}"
            )
        jax.distributed.initialize(environment[_VARIABLES[0]], *map(int, numbers))
    elif _scheduled(environment):
        jax.distributed.initialize()


def _scheduled(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler that JAX knows has started this process as one of several, or on a TPU."""
    tasks = max(int(environment.get(name, 1)) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    if environment.get("JAX_PLATFORMS", "").startswith("cpu"):
        return tasks > 1
    return tasks > 1 or bool(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"))


def meet(where: str) -> None:
    """Waits until all hosts are here; nothing where there is one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


class StopRequest:
    """Notices SIGTERM, which a scheduler sends some time before it takes the machine away.

    With several hosts JAX's own service passes the notice on, and all of them stop at the same step.
    """

    def __init__(self) -> None:
        self._received = False
        self._before = signal.SIG_DFL

    def __enter__(self) -> "StopRequest":
        if not jax.distributed.is_initialized():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not jax.distributed.is_initialized():
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._received = True
        logging.info("told to stop (SIGTERM): this step is finished and saved first")

    def at(self, step: int) -> bool:
        """Whether to save and stop after this step; every host must ask after every step."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

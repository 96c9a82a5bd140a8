"""Independent pieces of work over processes, with their progress."""

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from pop3d_jax.progress import progress

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class WorkerError(RuntimeError):
    """A worker process that ended without saying why."""


def _end_with_parent() -> None:
    """Ends this process as soon as its parent is gone: a killed build must not go on unseen."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run(function: Callable[[Piece], Result], pieces: Sequence[Piece], workers: int, description: str) -> list[Result]:
    """Results of a function over pieces of work, in their order, whatever the number of workers.

    Args:
      function: of a module's top level, as it is sent to other processes.
      pieces: its arguments.
      workers: number of processes; 1 works in this one.
      description: names the work in the progress.

    Raises:
      WorkerError: a worker process was killed.
      Exception: the first that a piece raises; pieces that have not begun are dropped.
    """
    workers = min(workers, len(pieces))
    if workers <= 1:
        return [function(piece) for piece in progress(pieces, len(pieces), description)]
    # Spawned, not forked: threads of the parent (epath, grain, jax) do not survive a fork.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    try:
        futures = [pool.submit(function, piece) for piece in pieces]
        for done in progress(concurrent.futures.as_completed(futures), len(futures), description):
            done.result()
        return [future.result() for future in futures]
    except concurrent.futures.process.BrokenProcessPool as error:
        raise WorkerError(f"{description}: a worker was killed; if for want of memory, give fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)

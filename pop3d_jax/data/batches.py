"""What the pipelines of all systems share: arrays of fixed size, hosts, workers.

A pipeline is a `grain.MapDataset` whose element at every position is a function of the position alone: resuming,
sharing among hosts and reading ahead are slices of it.
"""

from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

# Endless for any training, and still a length that fits an index.
EPOCHS = 2**31

Batch = dict[str, np.ndarray]


def spread(count: int, capacity: int) -> np.ndarray:
    """Indices of the elements kept: all, or `capacity` of them spread evenly over their order."""
    return np.arange(count) if count <= capacity else np.linspace(0, count - 1, capacity).round().astype(np.int64)


def pad(array: np.ndarray, keep: np.ndarray, capacity: int, fill: int = 0) -> np.ndarray:
    """The elements `keep` of the array, and `fill` behind them up to the capacity."""
    padded = np.full((capacity, *array.shape[1:]), fill, array.dtype)
    padded[: len(keep)] = array[keep]
    return padded


def iterate(dataset: grain.MapDataset, workers: int) -> Iterator[Batch]:
    """Iterates over batches, made ahead of time.

    Args:
      dataset: of batches.
      workers: processes; 0 makes the batches in a thread of this process.
    """
    # Threads overlap decoding with the step even without workers; a small buffer bounds the memory.
    iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags; in a notebook nobody has parsed them
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        iterable = iterable.mp_prefetch(options)
    return iter(iterable)


def local_batch_size(batch_size: int, host: int, hosts: int) -> int:
    """This host's share of the global batch.

    Raises:
      ValueError: there is no such host, or the batch does not divide among the hosts.
    """
    if not 0 <= host < hosts:
        raise ValueError(f"host {host} of {hosts} hosts: the index counts from 0")
    if batch_size % hosts:
        raise ValueError(f"the global batch size {batch_size} does not divide among {hosts} hosts")
    return batch_size // hosts

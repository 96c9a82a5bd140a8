"""Batches of lidar clouds for ScaLR, from one data set or a mixture of several.

As in `pop3d_jax/data/pipeline.py` every batch is a function of (seed, step) alone, for any number of hosts and workers:
element i of the global order draws everything from (seed, i).

A mixture of data sets whose weights are all the same is their plain concatenation, as official: an epoch is a uniform
shuffle that holds every record of the union once. Other weights say how often a record of one data set is drawn beside
a record of another: data set i of n_i records gets the share w_i n_i / sum(w n) of the examples, interleaved evenly,
and each data set goes through its own records epoch by epoch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int

from pop3d_jax.data.batches import EPOCHS, Batch, iterate, local_batch_size
from pop3d_jax.data.lidar_examples import LidarSettings, make_segmentation_example
from pop3d_jax.data.records import KeyFrame
from pop3d_jax.lidar_datasets import LidarDataset

MakeExample = Callable[[KeyFrame, LidarDataset, LidarSettings, np.random.Generator | None], Batch]


@runtime_checkable
class KeyFrames(Protocol):
    """Random access to key frames: a `RecordSource`, or what changes its key frames on the way."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> KeyFrame: ...


@dataclasses.dataclass(frozen=True)
class LidarSource:
    """Key frames of one data set, as a part of a mixture.

    Attributes:
      key_frames: the records.
      dataset: whose they are.
      weight: how often a record of this data set is drawn; see the module's text.
      records: indices of the records that take part, such as `label_subset` gives; None for all.
    """

    key_frames: KeyFrames
    dataset: LidarDataset
    weight: float = 1.0
    records: Int[np.ndarray, " records"] | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(
                f"data set {self.dataset.name} has weight {self.weight}: leave it out, or give it more than 0"
            )

    def __len__(self) -> int:
        return len(self.key_frames) if self.records is None else len(self.records)

    def record_index(self, position: int) -> int:
        """Index among all records of the one at this position."""
        return position if self.records is None else int(self.records[position])


class _LoadTraining(grain.transforms.RandomMap):
    """Number of a record of the union to its example; `rng` depends on (seed, position) only."""

    def __init__(self, sources: Sequence[LidarSource], make_example: MakeExample, settings: LidarSettings):
        self._sources = sources
        self._make = make_example
        self._settings = settings
        self._starts = np.cumsum([0, *map(len, sources)])

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        number = int(np.searchsorted(self._starts, element, side="right")) - 1
        source = self._sources[number]
        index = source.record_index(int(element) - int(self._starts[number]))
        example = self._make(source.key_frames[index], source.dataset, self._settings, rng)
        return example | {"record_index": np.asarray(index, np.int64), "dataset_index": np.asarray(number, np.int32)}


class _LoadEvaluation(grain.transforms.Map):
    """Position to example; positions behind the last record repeat it, marked as not valid."""

    def __init__(self, source: LidarSource, settings: LidarSettings):
        self._source = source
        self._settings = settings

    def map(self, element: int) -> Batch:
        index = self._source.record_index(min(int(element), len(self._source) - 1))
        example = make_segmentation_example(self._source.key_frames[index], self._source.dataset, self._settings, None)
        return example | {
            "record_index": np.asarray(index, np.int64),
            "valid": np.asarray(element < len(self._source)),
        }


def _order(sources: Sequence[LidarSource], seed: int) -> grain.MapDataset:
    """Endless numbers of records of the union."""
    sizes = [len(source) for source in sources]
    if len({source.weight for source in sources}) == 1:
        return grain.MapDataset.range(sum(sizes)).seed(seed).shuffle().repeat(EPOCHS)
    starts = np.cumsum([0, *sizes]).tolist()
    seeds = np.random.SeedSequence(seed).generate_state(len(sources)).tolist()
    parts = [
        grain.MapDataset.range(start, start + size).seed(part_seed).shuffle().repeat(EPOCHS)
        for start, size, part_seed in zip(starts, sizes, seeds, strict=False)
    ]
    return grain.MapDataset.mix(parts, mixture_shares(sources)).seed(seed)


def mixture_shares(sources: Sequence[LidarSource]) -> list[float]:
    """Share of each data set in the examples of a long training."""
    parts = np.array([source.weight * len(source) for source in sources])
    return (parts / parts.sum()).tolist()


def training_batches(
    sources: Sequence[LidarSource],
    make_example: MakeExample,
    settings: LidarSettings,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Endless training batches from `start_step` on, each a function of (seed, step) alone.

    Args:
      sources: the data sets of the mixture.
      make_example: `make_distillation_example` or `make_segmentation_example`.
      settings: sizes, capacities and rules, the same for all data sets.
      batch_size: global batch size, over all hosts.
      seed: of the shuffle and of all draws.
      start_step: step of the first batch returned.
      host: index of this host.
      hosts: number of hosts; this one gets batch_size / hosts examples a step.
      workers: processes; 0 works in a thread of this process.

    Yields:
      Dictionaries of the example's arrays, stacked, `record_index` [batch] in its data set, and `dataset_index`
      [batch], the data set's number among `sources`.

    Raises:
      ValueError: no records, or the batch does not divide among the hosts.
    """
    local = local_batch_size(batch_size, host, hosts)
    empty = [source.dataset.name for source in sources if len(source) == 0]
    if empty or not sources:
        raise ValueError(f"no records of {', '.join(empty) or 'any data set'}: build them, or leave the data set out")
    dataset = (
        _order(sources, seed)
        .random_map(_LoadTraining(tuple(sources), make_example, settings))
        .slice(slice(host, None, hosts))
        .batch(local)
        .slice(slice(start_step, None))
    )
    return iterate(dataset, workers)


def evaluation_batches(
    source: LidarSource,
    settings: LidarSettings,
    *,
    batch_size: int,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Every record once, in order; the last batch is filled up with examples whose `valid` is False.

    Args and errors as in `training_batches`; the examples are those of segmentation without draws.
    """
    local = local_batch_size(batch_size, host, hosts)
    padded = -(-len(source) // batch_size) * batch_size
    dataset = (
        grain.MapDataset.range(padded)
        .map(_LoadEvaluation(source, settings))
        .slice(slice(host, None, hosts))
        .batch(local)
    )
    return iterate(dataset, workers)

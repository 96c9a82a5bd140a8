"""What is scored: a trained run, an exported store, or files of any method, all asked in the same way."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Bool, UInt8

from pop3d_jax.data.records import KeyFrame, RecordSource
from pop3d_jax.occ3d.predictions import PredictionFiles
from pop3d_jax.occ3d.prompts import PromptSet
from pop3d_jax.occ3d.store_labels import StoreLabels
from pop3d_jax.occ3d.student_labels import StudentLabels

# Names of sets of labels, and what they are.
LABEL_SETS = {
    "queried": "the network's planes read at Occ3D's voxel centres",
    "resampled": "the network's own grid, looked up at Occ3D's voxel centres",
    "files": "as they are in the files",
}

# Grids of labels by the name of the set, and the voxels outside the network's volume (None for files).
Grids = tuple[dict[str, UInt8[np.ndarray, "x y z"]], Bool[np.ndarray, "x y z"] | None]


@runtime_checkable
class Scored(Protocol):
    """What can be scored.

    Attributes:
      sample_tokens: of the key frames it has labels for.
      label_sets: which of `LABEL_SETS` it gives for each.
      prompts: what its classes are asked with; None where the labels are fixed.
      details: what else a report should say of it.
    """

    sample_tokens: list[str]
    label_sets: tuple[str, ...]
    prompts: PromptSet | None
    details: dict[str, Any]

    def grids(self, tokens: Sequence[str]) -> Iterator[Grids]:
        """Labels of key frames, in their order."""
        ...


class _KeyFramesOf(Sequence):
    """Chosen key frames of a split, each read when it is asked for."""

    def __init__(self, source: RecordSource, tokens: Sequence[str]):
        numbers = {token: number for number, token in enumerate(source.sample_tokens)}
        self._source, self._numbers = source, [numbers[token] for token in tokens]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> KeyFrame:
        return self._source[self._numbers[index]]


class ScoredRun:
    """The student of a workdir on the key frames of a split; see `Scored`."""

    label_sets = ("queried", "resampled")

    def __init__(self, labels: StudentLabels, source: RecordSource):
        self._labels, self._source = labels, source
        self.sample_tokens = source.sample_tokens
        self.prompts = labels.prompts
        self.details = {"step": labels.run.step}

    def grids(self, tokens: Sequence[str]) -> Iterator[Grids]:
        for labelled in self._labels.many(_KeyFramesOf(self._source, tokens)):
            yield {"queried": labelled.queried, "resampled": labelled.resampled}, labelled.unseen


class ScoredStore:
    """An exported store; see `Scored`."""

    label_sets = ("resampled",)

    def __init__(self, labels: StoreLabels):
        self._labels = labels
        self.sample_tokens = labels.sample_tokens
        self.prompts = labels.prompts
        self.details = {}

    def grids(self, tokens: Sequence[str]) -> Iterator[Grids]:
        for labelled in self._labels.many(tokens):
            yield {"resampled": labelled.resampled}, labelled.unseen


class ScoredFiles:
    """Files of any method; see `Scored`."""

    label_sets = ("files",)
    prompts = None

    def __init__(self, files: PredictionFiles):
        self._files = files
        self.sample_tokens = files.sample_tokens
        self.details = {}

    def grids(self, tokens: Sequence[str]) -> Iterator[Grids]:
        for token in tokens:
            yield {"files": self._files[token]}, None


def is_run(path: epath.PathLike) -> bool:
    """Whether a folder is a workdir."""
    return (epath.Path(path) / "config.json").exists()


def is_store(path: epath.PathLike) -> bool:
    """Whether a folder is a store of grids."""
    return (epath.Path(path) / "zarr.json").exists()

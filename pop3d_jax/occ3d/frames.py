"""Which key frames make a whole score, and which of them a prediction lacks."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

from data_prep.splits import scene_names
from pop3d_jax.occ3d.grid import Occ3DFrame
from pop3d_jax.occ3d.label_files import OccupancyFileError

_NAMED = 3


@runtime_checkable
class GroundTruth(Protocol):
    """What can be scored against: Occ3D's files, or labels accumulated from records."""

    description: str
    sample_tokens: list[str]

    def scene_of(self, token: str) -> str: ...

    def __getitem__(self, token: str) -> Occ3DFrame: ...


@dataclasses.dataclass(frozen=True)
class FrameChoice:
    """The key frames of a score.

    Attributes:
      scored: sample tokens, in the order of the ground truth.
      missing: what is missing of a whole score, in words; empty where nothing is.
      left_out: how many predicted key frames belong to no part of it.
    """

    scored: list[str]
    missing: list[str]
    left_out: int

    @property
    def is_partial(self) -> bool:
        """Whether the score is one of a part only."""
        return bool(self.missing)


def choose_frames(
    truth: GroundTruth,
    predicted: Collection[str],
    *,
    split: str | None = None,
    record_tokens: Sequence[str] | None = None,
    partial: bool = False,
) -> FrameChoice:
    """The key frames to score.

    A whole score takes every key frame of the records and of their scenes where records are named, else of every scene
    of an official split, else of the whole ground truth.

    Args:
      truth: what there is to score against.
      predicted: sample tokens of the predictions.
      split: of nuScenes, such as "val"; without records.
      record_tokens: sample tokens of the records' split.
      partial: score what there is where something is missing.

    Raises:
      OccupancyFileError: something is missing, and `partial` does not allow it; or nothing is left.
    """
    missing = []
    known = set(truth.sample_tokens)
    whole = truth.sample_tokens
    if record_tokens is not None:
        unlabelled = [token for token in record_tokens if token not in known]
        if unlabelled:
            missing.append(f"ground truth of {_some(unlabelled, len(record_tokens))} key frames of the records")
        scenes = {truth.scene_of(token) for token in record_tokens if token in known}
        whole = [token for token in whole if truth.scene_of(token) in scenes]
    elif split is not None:
        names = scene_names(split)
        there = {truth.scene_of(token) for token in truth.sample_tokens}
        absent = [name for name in names if name not in there]
        if absent:
            missing.append(f"ground truth of {_some(absent, len(names))} scenes of the split {split}")
        whole = [token for token in whole if truth.scene_of(token) in set(names)]
    predicted = set(predicted)
    unpredicted = [token for token in whole if token not in predicted]
    if unpredicted:
        missing.append(f"predictions of {_some(unpredicted, len(whole))} key frames")
    choice = FrameChoice([token for token in whole if token in predicted], missing, len(predicted - set(whole)))
    if not choice.scored:
        raise OccupancyFileError(
            "no key frame has both ground truth and a prediction: are their sample tokens, folders or files nuScenes'?"
        )
    if missing and not partial:
        raise OccupancyFileError(
            f"not a whole score: missing are {'; '.join(missing)}. --partial scores the {len(choice.scored)} key "
            "frames there are, and says so"
        )
    return choice


def _some(names: Sequence[str], of: int) -> str:
    more = ", ..." if len(names) > _NAMED else ""
    return f"{len(names)} of {of} ({', '.join(names[:_NAMED])}{more})"

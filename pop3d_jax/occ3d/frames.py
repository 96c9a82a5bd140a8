"""Which key frames make a whole score, and which of them a prediction lacks."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

from data_prep.splits import KEY_FRAMES, scene_names
from pop3d_jax.occ3d.grid import Occ3DFrame
from pop3d_jax.occ3d.label_files import OccupancyFileError

# How many of a long list are named.
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
      left_out: how many key frames are predicted besides.
      scenes: how many scenes the scored ones are of.
    """

    scored: list[str]
    missing: list[str]
    left_out: int
    scenes: int

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

    A whole score takes every key frame of the records, those that their build skipped too, and of their scenes where
    records are named; else of every scene of an official split, as many as nuScenes has; else of the whole ground
    truth, and then every prediction must have its ground truth.

    Args:
      truth: what there is to score against.
      predicted: sample tokens of the predictions.
      split: such as "val"; without records one of nuScenes'.
      record_tokens: sample tokens of the records' split, skipped ones too.
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
            missing.append(f"ground truth of {some(unlabelled, len(record_tokens))} key frames of the records")
        scenes = {truth.scene_of(token) for token in record_tokens if token in known}
        if split in KEY_FRAMES:
            official = set(scene_names(split))
            beside = {truth.scene_of(token) for token in truth.sample_tokens} & official - scenes
            if beside:
                missing.append(f"records of {some(sorted(beside), len(beside | scenes))} scenes of the split {split}")
        whole = [token for token in whole if truth.scene_of(token) in scenes]
    elif split is not None:
        names = scene_names(split)
        there = {truth.scene_of(token) for token in truth.sample_tokens}
        absent = [name for name in names if name not in there]
        if absent:
            missing.append(f"ground truth of {some(absent, len(names))} scenes of the split {split}")
        whole = [token for token in whole if truth.scene_of(token) in set(names)]
        if not absent and len(whole) != KEY_FRAMES[split]:
            missing.append(f"ground truth: {len(whole)} key frames, the split {split} has {KEY_FRAMES[split]}")
    elif beside := sorted(set(predicted) - known):
        missing.append(f"ground truth of {some(beside, len(predicted))} predicted key frames")
    predicted = set(predicted)
    unpredicted = [token for token in whole if token not in predicted]
    if unpredicted:
        missing.append(f"predictions of {some(unpredicted, len(whole))} key frames")
    scored = [token for token in whole if token in predicted]
    scenes = {truth.scene_of(token) for token in scored}
    choice = FrameChoice(scored, missing, len(predicted - set(whole)), len(scenes))
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


def some(names: Sequence[str], of: int) -> str:
    """How many of how many, and the first of them by name."""
    more = ", ..." if len(names) > _NAMED else ""
    return f"{len(names)} of {of} ({', '.join(names[:_NAMED])}{more})"

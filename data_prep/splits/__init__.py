"""The official splits of nuScenes as lists of scene names."""

import functools
import importlib.resources
import json

SPLITS_OF_VERSION = {
    "v1.0-mini": ("mini_train", "mini_val"),
    "v1.0-trainval": ("train", "val"),
    "v1.0-test": ("test",),
}

# How many key frames the official splits have.
KEY_FRAMES = {"train": 28_130, "val": 6_019, "test": 6_008, "mini_train": 323, "mini_val": 81}


class SplitError(ValueError):
    """A split or version that does not exist; the message names those that do."""


@functools.cache
def _lists() -> dict[str, list[str]]:
    return json.loads(importlib.resources.files(__name__).joinpath("nuscenes.json").read_text())


def scene_names(split: str) -> tuple[str, ...]:
    """Names of the scenes of a split ("scene-0001", ...), in the official order.

    Raises:
      SplitError: no such split; names the splits there are.
    """
    lists = _lists()
    if split not in lists:
        raise SplitError(f"no split {split!r} in nuScenes; there are {', '.join(lists)}")
    return tuple(lists[split])


def check_split(version: str, split: str) -> None:
    """Checks that a data set version has a split.

    Raises:
      SplitError: unknown version, or a split that the version does not have; names those it has.
    """
    if version not in SPLITS_OF_VERSION:
        raise SplitError(f"no version {version!r} of nuScenes; there are {', '.join(SPLITS_OF_VERSION)}")
    if split not in SPLITS_OF_VERSION[version]:
        raise SplitError(
            f"{version} has no split {split!r}; it has {', '.join(SPLITS_OF_VERSION[version])} (see --version, --split)"
        )

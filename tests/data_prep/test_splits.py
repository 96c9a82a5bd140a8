"""The official split lists."""

import hashlib
import json
import re

import pytest

from data_prep.splits import SPLITS_OF_VERSION, SplitError, check_split, scene_names

# SHA-256 of the names, one a line: what the devkit's own lists give.
_OFFICIAL = {
    "train": (700, "182d90e54953d7b067e5488298daef0c46fcb51c8aecddd40f8e3f64934fbdd5"),
    "val": (150, "9c6d87239035bbd37818497915c95f6df980f62ffdb7dbcf1e527b997b74dc65"),
    "test": (150, "9e0f5aba17a92e175ff0ff233494b1bba57077627d07d64c94c8983a6b6cf9b1"),
    "mini_train": (8, "c849f160715c4c6f417e8595bd97978dda65bbacb6da8fbf8a0a3233e676c2c8"),
    "mini_val": (2, "12657200a28a6a68f33613640947e7d1a2804e4e54c2ffc53c43d6bcbd8ddd75"),
}


def _digest(split):
    return hashlib.sha256("\n".join(scene_names(split)).encode()).hexdigest()


@pytest.mark.parametrize("split", _OFFICIAL)
def test_lists_are_the_official_ones(split):
    assert (len(scene_names(split)), _digest(split)) == _OFFICIAL[split]


def test_every_split_belongs_to_one_version():
    assert sorted(split for of_version in SPLITS_OF_VERSION.values() for split in of_version) == sorted(_OFFICIAL)


@pytest.mark.golden
def test_lists_have_the_hashes_of_the_devkit(golden_file):
    splits = json.loads(golden_file("nuscenes/devkit_eval.json").read_text())["splits"]
    for split in _OFFICIAL:
        assert len(scene_names(split)) == splits[split]["count"]
        assert _digest(split) == splits[split]["sha256_in_devkit_order"]


def test_a_split_of_another_version_is_refused():
    check_split("v1.0-mini", "mini_val")
    with pytest.raises(SplitError, match=re.escape("v1.0-mini has no split 'train'; it has mini_train, mini_val")):
        check_split("v1.0-mini", "train")
    with pytest.raises(SplitError, match=re.escape("no version 'v2.0'")):
        check_split("v2.0", "train")
    with pytest.raises(SplitError, match="no split 'training'"):
        scene_names("training")

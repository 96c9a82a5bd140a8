"""Which key frames make a whole score."""

import dataclasses

import pytest

from data_prep.splits import scene_names
from pop3d_jax.occ3d.frames import choose_frames
from pop3d_jax.occ3d.label_files import OccupancyFileError


@dataclasses.dataclass
class Truth:
    scenes: dict[str, str]
    description: str = "made up"

    @property
    def sample_tokens(self):
        return list(self.scenes)

    def scene_of(self, token):
        return self.scenes[token]

    def __getitem__(self, token):
        raise AssertionError("nothing is read to choose")


TRUTH = Truth({"a": "scene-1", "b": "scene-1", "c": "scene-2"})


def test_all_of_the_ground_truth_by_default():
    choice = choose_frames(TRUTH, ["c", "b", "a"])
    assert choice.scored == ["a", "b", "c"]
    assert not choice.is_partial
    assert (choice.scenes, choice.left_out) == (2, 0)


def test_a_prediction_without_ground_truth_says_that_some_is_missing():
    with pytest.raises(OccupancyFileError, match=r"ground truth of 1 of 4 \(elsewhere\) predicted key frames"):
        choose_frames(TRUTH, ["c", "b", "a", "elsewhere"])
    choice = choose_frames(TRUTH, ["c", "b", "a", "elsewhere"], partial=True)
    assert choice.is_partial
    assert choice.left_out == 1


def test_a_missing_prediction_stops_unless_a_part_is_asked_for():
    with pytest.raises(OccupancyFileError, match=r"predictions of 1 of 3 \(b\) key frames. --partial scores the 2"):
        choose_frames(TRUTH, ["a", "c"])
    choice = choose_frames(TRUTH, ["a", "c"], partial=True)
    assert choice.scored == ["a", "c"]
    assert choice.is_partial
    assert choice.missing == ["predictions of 1 of 3 (b) key frames"]


def test_records_stand_for_their_whole_scenes():
    assert choose_frames(TRUTH, ["a", "b"], record_tokens=["a", "b"]).scored == ["a", "b"]
    # Records that skipped a key frame would make an easier set of the scene.
    with pytest.raises(OccupancyFileError, match=r"predictions of 1 of 2 \(b\)"):
        choose_frames(TRUTH, ["a"], record_tokens=["a"])
    with pytest.raises(OccupancyFileError, match=r"ground truth of 1 of 3 \(d\) key frames of the records"):
        choose_frames(TRUTH, ["a", "b", "d"], record_tokens=["a", "b", "d"])


def test_records_that_lack_scenes_of_their_split_are_a_part():
    first, second = scene_names("mini_val")
    truth = Truth({"a": first, "b": second, "c": "scene-1"})
    given = {"split": "mini_val", "record_tokens": ["a"]}
    with pytest.raises(OccupancyFileError, match=rf"records of 1 of 2 \({second}\) scenes of the split mini_val"):
        choose_frames(truth, ["a", "b", "c"], **given)
    assert choose_frames(truth, ["a", "b", "c"], **given, partial=True).scored == ["a"]


def test_an_official_split_is_all_its_scenes():
    names = scene_names("mini_val")
    per_scene = [41, 40]
    tokens = {f"{name} {k}": name for name, count in zip(names, per_scene, strict=True) for k in range(count)}
    truth = Truth(tokens | {"other": "scene-1"})
    predicted = truth.sample_tokens
    assert choose_frames(truth, predicted, split="mini_val").scored == list(tokens)
    half = Truth({token: name for token, name in truth.scenes.items() if token != f"{names[1]} 7"})
    with pytest.raises(OccupancyFileError, match="ground truth: 80 key frames, the split mini_val has 81"):
        choose_frames(half, predicted, split="mini_val")
    lacking = Truth({token: name for token, name in truth.scenes.items() if name != names[0]})
    with pytest.raises(OccupancyFileError, match=rf"ground truth of 1 of {len(names)} \({names[0]}\) scenes"):
        choose_frames(lacking, predicted, split="mini_val")
    assert choose_frames(lacking, predicted, split="mini_val", partial=True).is_partial


def test_nothing_in_common_is_no_score():
    with pytest.raises(OccupancyFileError, match="no key frame has both"):
        choose_frames(TRUTH, ["x"], partial=True)

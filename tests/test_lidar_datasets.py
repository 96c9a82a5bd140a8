"""Facts of the lidar data sets: label maps against what was published, and their shapes."""

import numpy as np
import pytest

from pop3d_jax.lidar_datasets import LIDAR_DATASETS, PANDAR64, PANDAR_GT, SEMANTIC_KITTI
from pop3d_jax.nuscenes import CLASS_NAMES, IGNORE, LIDARSEG_TO_CLASS

# The learning map of semantic-kitti.yaml: class of each id, 0 unlabelled.
_KITTI = {
    0: 0, 1: 0, 10: 1, 11: 2, 13: 5, 15: 3, 16: 5, 18: 4, 20: 5, 30: 6, 31: 7, 32: 8, 40: 9, 44: 10, 48: 11, 49: 12,
    50: 13, 51: 14, 52: 0, 60: 9, 70: 15, 71: 16, 72: 17, 80: 18, 81: 19, 99: 0, 252: 1, 253: 7, 254: 6, 255: 8,
    256: 5, 257: 5, 258: 4, 259: 5,
}  # fmt: skip
# ScaLR's class of the ids 0 to 42 of PandaSet, from 1; 0 is not scored.
_PANDASET = [
    0, 0, 0, 0, 0, 5, 16, 1, 6, 6, 6, 7, 17, 10, 12, 12, 12, 15, 11, 15, 15, 15, 0, 13, 0, 0, 14, 15, 15, 15, 4, 4, 0,
    0, 9, 3, 2, 9, 2, 3, 0, 8, 8,
]  # fmt: skip


def _from_zero(classes):
    return [IGNORE if number == 0 else number - 1 for number in classes]


def test_semantic_kitti_has_the_published_map():
    assert SEMANTIC_KITTI.raw_ids == tuple(sorted(_KITTI))
    assert SEMANTIC_KITTI.raw_to_class.tolist() == _from_zero(_KITTI[raw] for raw in sorted(_KITTI))
    assert SEMANTIC_KITTI.class_names[:2] == ("car", "bicycle")
    assert SEMANTIC_KITTI.class_names[18] == "traffic-sign"


@pytest.mark.parametrize("facts", [PANDAR64, PANDAR_GT], ids=lambda facts: facts.name)
def test_pandaset_has_the_map_of_scalr(facts):
    assert facts.raw_to_class.tolist() == _from_zero(_PANDASET)
    names = dict(enumerate(facts.class_names))
    assert [names[facts.raw_to_class[raw]] for raw in (7, 13, 30, 41, 5, 12, 20)] == [
        "road", "car", "pedestrian", "manmade", "vegetation", "driveway", "other vehicle",
    ]  # fmt: skip


def test_nuscenes_has_sixteen_of_its_classes():
    facts = LIDAR_DATASETS["nuscenes"]
    assert facts.class_names == CLASS_NAMES[1:17]
    for raw, number in enumerate(LIDARSEG_TO_CLASS):
        expected = IGNORE if number == 0 else number - 1
        assert facts.raw_to_class[raw] == expected


@pytest.mark.parametrize("name", LIDAR_DATASETS)
def test_classes_and_map_fit(name):
    facts = LIDAR_DATASETS[name]
    assert facts.name == name
    scored = facts.raw_to_class[facts.raw_to_class != IGNORE]
    assert sorted(set(scored.tolist())) == list(range(len(facts.class_names)))
    assert len(set(facts.class_names)) == len(facts.class_names)
    assert facts.raw_ids in ((), tuple(sorted(set(facts.raw_ids))))
    assert len(facts.raw_ids) in (0, len(facts.raw_to_class))
    assert facts.depth_of in ("camera", "lidar_x")
    assert facts.raw_to_class.dtype == np.uint8


def test_the_lidars_of_pandaset_differ_in_what_is_theirs():
    assert len(PANDAR64.cameras) == 6
    assert PANDAR_GT.cameras == ("front_camera",)
    assert (PANDAR64.intensity_mean, PANDAR64.intensity_std) != (PANDAR_GT.intensity_mean, PANDAR_GT.intensity_std)
    assert PANDAR64.z_shift == PANDAR_GT.z_shift == -1.6

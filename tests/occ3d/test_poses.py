"""Poses of scenes: rays start from all key frames of the own scene, in the order of time, and of no other."""

import numpy as np

from pop3d_jax.occ3d.origins import lidar_origins
from pop3d_jax.occ3d.poses import KeyFramePose, origins_by_token


def test_origins_are_those_of_the_scene_in_time():
    random = np.random.default_rng(0)
    poses = []
    for scene, count in (("a", 12), ("b", 3)):
        for number in range(count):
            lidar_to_ego, ego_to_global = np.eye(4), np.eye(4)
            lidar_to_ego[:3, 3] = 0.9, 0.0, 1.8
            ego_to_global[:3, 3] = 500 + 2.5 * number, 700 if scene == "a" else 702, 0
            poses.append(KeyFramePose(f"{scene}{number}", scene, 1_000 + number, lidar_to_ego, ego_to_global))
    origins = origins_by_token([poses[number] for number in random.permutation(len(poses))])
    assert set(origins) == {pose.sample_token for pose in poses}
    for scene in "ab":
        own = [pose for pose in poses if pose.scene_name == scene]
        mounted, placed = (np.stack([getattr(p, name) for p in own]) for name in ("lidar_to_ego", "ego_to_global"))
        for number, pose in enumerate(own):
            np.testing.assert_array_equal(origins[pose.sample_token], lidar_origins(mounted, placed, number))
    # Twelve places make eight, first and last among them; three make three, 2.5 m apart along the way.
    assert len(origins["a0"]) == 8
    np.testing.assert_allclose(origins["b1"][:, 0], [0.9 - 2.5, 0.9, 0.9 + 2.5], atol=1e-4)

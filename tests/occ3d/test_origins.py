"""Where rays begin, on drives that can be followed by hand."""

import numpy as np
import pytest

from pop3d_jax.geometry import rigid_transform
from pop3d_jax.occ3d.origins import lidar_origins

# The lidar looks along the car's -y, as on nuScenes' car.
LIDAR = rigid_transform(np.array([np.sqrt(0.5), 0, 0, -np.sqrt(0.5)]), np.array([1.0, 0.0, 1.8]))


def drive(places, yaw=None):
    """Calibrations and poses of key frames at these x, turned by these angles."""
    yaw = np.zeros(len(places)) if yaw is None else yaw
    halves = np.stack([np.cos(yaw / 2), 0 * yaw, 0 * yaw, np.sin(yaw / 2)], -1)
    poses = [rigid_transform(half, np.array([x + 600.0, 1000.0, 0.0])) for half, x in zip(halves, places, strict=True)]
    return np.stack([LIDAR] * len(places)), np.stack(poses)


def test_places_of_the_past_and_the_future_are_seen_from_the_reference():
    origins = lidar_origins(*drive([0.0, 5.0, 12.0]), 1)
    np.testing.assert_allclose(origins, [[-4, 0, 1.8], [1, 0, 1.8], [8, 0, 1.8]], atol=1e-5)
    # The reference's own is not rounded.
    assert origins[1].tolist() == [1.0, 0.0, 1.8]


def test_the_reference_turns_them():
    yaw = np.array([0.0, np.pi / 2])
    # From the turned car the other one's lidar lies to the right and behind: x is where it looks.
    np.testing.assert_allclose(lidar_origins(*drive([0.0, 10.0], yaw), 1), [[0, 9, 1.8], [1, 0, 1.8]], atol=1e-5)


def test_places_far_away_are_left_out_and_the_border_is_too():
    # The lidar is one metre ahead of the ego's origin.
    origins = lidar_origins(*drive([-40.5, -39.5, 0.0, 37.5, 38.0]), 2)
    np.testing.assert_allclose(origins[:, 0], [-38.5, 1, 38.5], atol=1e-5)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(8, range(8)), (9, [0, 1, 2, 3, 5, 6, 7, 8]), (20, [0, 3, 5, 8, 11, 14, 16, 19])],
)
def test_at_most_eight_are_spread_over_the_scene(count, expected):
    origins = lidar_origins(*drive(np.arange(count, dtype=float)), 0)
    np.testing.assert_allclose(origins[:, 0], np.array(expected) + 1.0, atol=1e-5)


def test_a_reference_that_is_not_in_the_scene_is_named():
    calibrations, poses = drive([0.0, 1.0])
    with pytest.raises(ValueError, match="reference 2 of 2 key frames"):
        lidar_origins(calibrations, poses, 2)

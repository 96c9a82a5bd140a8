import math

import numpy as np
import pytest

from pop3d_jax.occ3d.centres import place_centres
from pop3d_jax.occ3d.grid import FREE
from pop3d_jax.voxels import Volume

# A lidar that looks left, 1 m before and 2 m above the ego frame's origin: (a, b, c) is (1 - b, a, c + 2) in its frame.
LEFT = np.array([[0.0, -1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 1.0]])
VOLUME = Volume((-20.0, -30.0, -2.0), (44.0, 50.0, 1.0), (16, 10, 4))


def expected_places(index):
    """(lidar position, cell, whether inside) of one Occ3D voxel, in plain float64 numbers."""
    x, y, z = (-40 + 0.4 * (index[0] + 0.5), -40 + 0.4 * (index[1] + 0.5), -1 + 0.4 * (index[2] + 0.5))
    lidar = (y, 1 - x, z - 2)
    cell = [
        (p - low) * cells / (high - low)
        for p, low, high, cells in zip(lidar, VOLUME.minimum, VOLUME.maximum, VOLUME.grid_size, strict=True)
    ]
    inside = all(low <= p < high for p, low, high in zip(lidar, VOLUME.minimum, VOLUME.maximum, strict=True))
    return cell, inside


def test_a_turned_and_shifted_lidar():
    placed = place_centres(LEFT, VOLUME)
    labels = np.random.default_rng(0).integers(0, FREE, VOLUME.grid_size).astype(np.uint8)
    resampled = placed.resampled(labels)
    assert resampled.shape == (200, 200, 16)
    seen = 0
    for index in np.random.default_rng(1).integers(0, (200, 200, 16), (3000, 3)):
        flat = np.ravel_multi_index(tuple(index), (200, 200, 16))
        cell, inside = expected_places(index)
        assert placed.unseen[flat] == (not inside), index
        if inside:
            seen += 1
            np.testing.assert_allclose(placed.cells[flat], cell, rtol=1e-6, atol=1e-6)
            voxel = tuple(math.floor(c) for c in cell)
            # The arithmetic of the two differs in the last digit: no verdict on a border.
            if min(abs(c - round(c)) for c in cell) > 1e-9:
                assert placed.voxels[flat] == np.ravel_multi_index(voxel, VOLUME.grid_size)
                assert resampled[tuple(index)] == labels[voxel]
        else:
            assert resampled[tuple(index)] == FREE
    assert 500 < seen < 2500


def test_each_side_of_the_volume_is_the_end_of_what_is_seen():
    # Centres lie at odd multiples of 0.2 m: 18.2 is the first above 18, 17.8 the last below it.
    volume = Volume((-18.0, -20.0, 0.0), (18.0, 16.0, 4.0), (9, 9, 2))
    unseen = place_centres(np.eye(4), volume).unseen.reshape(200, 200, 16)
    x, y, z = (np.flatnonzero(~unseen.all(other)) for other in ((1, 2), (0, 2), (0, 1)))
    assert (x[0], x[-1]) == (55, 144)  # -17.8 and 17.8
    assert (y[0], y[-1]) == (50, 139)  # -19.8 and 15.8
    assert (z[0], z[-1]) == (2, 11)  # 0.0, on the lower side, which belongs to the volume; 3.6
    assert not unseen[55:145, 50:140, 2:12].any()


def test_every_mounting_has_its_own_places():
    volume = Volume()
    first = place_centres(np.eye(4), volume)
    shifted = np.eye(4)
    shifted[2, 3] = 1.84
    other = place_centres(shifted, volume)
    np.testing.assert_allclose((first.cells - other.cells)[~first.unseen & ~other.unseen][:, 2], 1.84, rtol=1e-4)
    np.testing.assert_array_equal(place_centres(np.eye(4), volume).cells, first.cells)


@pytest.mark.parametrize("upper", [5.4, 5.0])
def test_outside_is_free_whatever_the_labels_say(upper):
    volume = Volume((-40.0, -40.0, -1.0), (40.0, 40.0, upper), (4, 4, 4))
    placed = place_centres(np.eye(4), volume)
    resampled = placed.resampled(np.full(volume.grid_size, 4, np.uint8))
    assert set(np.unique(resampled[..., :15])) == {4}
    assert set(np.unique(resampled[..., 15])) == ({4} if upper == 5.4 else {FREE})
    assert placed.unseen.any() == (upper != 5.4)

"""Class weights from the records, by the command's own functions and by hand."""

import numpy as np
import pytest

from pop3d_jax.class_weights import count_voxels, enet_weights
from pop3d_jax.data.records import RecordSource
from pop3d_jax.voxels import Volume, grid_coordinates_float64


def test_the_rule():
    # Half and half: 1 / ln(1.52); a class that never occurs gets 1 / ln(1.02).
    np.testing.assert_allclose(enet_weights(np.array([5, 5])), [2.3882859, 2.3882859], rtol=1e-6)
    np.testing.assert_allclose(enet_weights(np.array([10, 0])), [1.422278, 50.4983498], rtol=1e-6)
    with pytest.raises(ValueError, match="no key frames"):
        enet_weights(np.array([0, 0]))


def test_counts_are_those_of_the_points(small_config, small_records):
    source = RecordSource(small_records, "train")
    counts = count_voxels(small_config, source)
    model = small_config.model
    volume = Volume(model.volume_minimum, model.volume_maximum, model.grid_size)
    occupied = 0
    for index in range(len(source)):
        cells = np.floor(grid_coordinates_float64(source[index].points[:, :3], volume)).astype(int)
        occupied += len(np.unique(cells, axis=0))
    assert counts.tolist() == [len(source) * int(np.prod(model.grid_size)) - occupied, occupied]

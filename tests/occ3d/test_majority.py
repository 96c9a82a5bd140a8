"""Votes for the labels of voxels."""

import numpy as np

from pop3d_jax.occ3d.grid import FREE
from pop3d_jax.occ3d.majority import majority_labels
from pop3d_jax.voxels import Volume

VOLUME = Volume((0.0, 0.0, 0.0), (2.0, 2.0, 1.0), (2, 2, 1))


def test_most_votes_win_the_lowest_class_in_a_tie_and_nobody_is_free():
    voxels = np.array([0, 0, 0, 1, 1, 3, -1, -1])
    classes = np.array([4, 16, 16, 15, 11, 0, 7, 7], np.uint8)
    labels = majority_labels(voxels, classes, VOLUME)
    assert labels.dtype == np.uint8
    assert labels[..., 0].tolist() == [[16, 11], [FREE, 0]]


def test_weights_outvote_numbers():
    voxels, classes = np.array([2, 2, 2]), np.array([4, 4, 16], np.uint8)
    assert majority_labels(voxels, classes, VOLUME, np.array([0.1, 0.1, 0.3]))[1, 0, 0] == 16


def test_without_votes_all_is_free():
    labels = majority_labels(np.zeros(0, np.int64), np.zeros(0, np.uint8), VOLUME)
    assert (labels == FREE).all()

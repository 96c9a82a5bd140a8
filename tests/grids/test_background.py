import numpy as np
import pytest

from pop3d_jax.grids.background import BACKGROUND_PHRASES, largest_lead, rivals_of

BACKGROUND = ("road", "car", "police car")
# Cosines of three voxels with the phrase and with each of the background.
SIMILARITY = np.array([0.9, 0.5, 0.2], np.float32)
BEHIND = np.array([[0.8, 0.7, 0.85], [0.1, 0.45, 0.2], [0.1, 0.0, 0.05]], np.float32)


def test_the_voxel_of_the_largest_lead_counts_not_the_most_similar():
    margin, rival = largest_lead(SIMILARITY, BEHIND, "a bus", BACKGROUND)  # leads 0.05, 0.05 and 0.1
    assert (margin, rival) == (pytest.approx(0.1), "road")


def test_a_phrase_does_not_compete_with_its_own_words():
    assert rivals_of("a police car", BACKGROUND) == [0]
    assert rivals_of("A Red CAR", BACKGROUND) == [0, 2]
    assert rivals_of("car", BACKGROUND_PHRASES) == [k for k, x in enumerate(BACKGROUND_PHRASES) if x != "car"]
    margin, rival = largest_lead(SIMILARITY, BEHIND, "a police car", BACKGROUND)
    assert (margin, rival) == (pytest.approx(0.4), "road")  # at the second voxel
    margin, rival = largest_lead(SIMILARITY, BEHIND, "a red car", BACKGROUND)
    assert (margin, rival) == (pytest.approx(0.3), "police car")


def test_a_phrase_that_is_nowhere_ahead_has_a_negative_lead():
    assert largest_lead(SIMILARITY - 1, BEHIND, "a bus", BACKGROUND) == (pytest.approx(-0.9), "road")


def test_nothing_to_beat_and_nothing_to_judge():
    assert largest_lead(SIMILARITY, BEHIND[:, :0], "a bus", ()) == (np.inf, "")
    assert largest_lead(SIMILARITY, BEHIND[:, 1:2], "a car", ("car",)) == (np.inf, "")
    assert largest_lead(SIMILARITY[:0], BEHIND[:0], "a bus", BACKGROUND) == (-np.inf, "")
    assert largest_lead(SIMILARITY[:0], BEHIND[:0, :0], "a bus", ()) == (-np.inf, "")

import numpy as np

from pop3d_jax.viewer.colours import SIMILARITY_STOPS, similarity_colours, similarity_range


def test_half_of_the_voxels_are_grey_and_the_best_have_the_last_colour():
    similarity = np.linspace(-0.2, 0.3, 1001)
    low, high = similarity_range(similarity)
    np.testing.assert_allclose((low, high), (0.05, 0.299))
    colours = similarity_colours(similarity, low, high)
    stops = [list(bytes.fromhex(stop[1:])) for stop in SIMILARITY_STOPS]
    assert (colours[:501] == stops[0]).all()
    assert (colours[-2:] == stops[-1]).all()
    between = similarity_colours(np.linspace(0, 1, 11), 0.0, 1.0)
    np.testing.assert_array_equal(between[::2], stops)
    np.testing.assert_allclose(between[1], np.mean(stops[:2], axis=0), atol=0.51)


def test_no_voxel_and_equal_voxels():
    low, high = similarity_range(np.zeros(0))
    assert (low, high) == (0.0, 1.0)
    assert similarity_colours(np.zeros(0), low, high).shape == (0, 3)
    low, high = similarity_range(np.full(3, 0.5))
    assert len(np.unique(similarity_colours(np.full(3, 0.5), low, high), axis=0)) == 1

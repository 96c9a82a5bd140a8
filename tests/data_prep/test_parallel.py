"""Work over processes."""

import os

import pytest

from data_prep import parallel


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_pieces(workers):
    assert parallel.run(abs, [-3, 2, -1], workers, "counting") == [3, 2, 1]
    assert parallel.run(abs, [], workers, "counting") == []


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_of_a_piece_is_raised(workers):
    with pytest.raises(ValueError, match="invalid literal"):
        parallel.run(int, ["1", "one"], workers, "counting")


def test_a_killed_worker_is_an_error():
    with pytest.raises(parallel.WorkerError, match=r"counting: a worker was killed.*--workers"):
        parallel.run(os._exit, [1, 1], 2, "counting")

import numpy as np
import pytest

from pop3d_jax.baselines import shuffled_prompts_miou


def test_a_perfect_confusion_scores_nothing_where_words_are_swapped():
    confusion = np.zeros((18, 18), np.int64)
    confusion[4, 4], confusion[11, 11] = 50, 30
    # Two classes have one shuffle that is no identity: each word then names the other class.
    assert shuffled_prompts_miou(confusion, 3) == [0.0, 0.0, 0.0]


def test_absent_classes_take_no_part_in_the_shuffle():
    rng = np.random.default_rng(0)
    confusion = np.zeros((18, 18), np.int64)
    present = [1, 4, 7, 15]
    confusion[np.ix_(present, present)] = rng.integers(1, 50, (4, 4))
    scores = shuffled_prompts_miou(confusion, 5, seed=1)
    assert len(scores) == 5
    # Every present class keeps some predictions under any shuffle of the present ones.
    assert min(scores) > 0.0


def test_one_class_cannot_be_shuffled():
    confusion = np.zeros((18, 18), np.int64)
    confusion[4, 4] = 5
    with pytest.raises(ValueError, match="only 1 classes"):
        shuffled_prompts_miou(confusion, 5)

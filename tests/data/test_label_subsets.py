import numpy as np
import pytest

from pop3d_jax.data.label_subsets import label_subset, listed_records

_TOKENS = [f"token{number:04}" for number in np.random.default_rng(0).permutation(1000)]


def test_a_share_is_the_same_in_any_order_and_part_of_a_larger_one():
    one, ten = (label_subset(_TOKENS, fraction, seed=3) for fraction in (0.01, 0.1))
    assert (len(one), len(ten)) == (10, 100)
    assert set(one) < set(ten)
    assert np.all(np.diff(ten) > 0)
    shuffled = sorted(_TOKENS)
    again = label_subset(shuffled, 0.1, seed=3)
    assert {shuffled[index] for index in again} == {_TOKENS[index] for index in ten}
    assert set(label_subset(_TOKENS, 0.1, seed=4)) != set(ten)
    np.testing.assert_array_equal(label_subset(_TOKENS, 1.0), np.arange(1000))
    assert len(label_subset(_TOKENS[:3], 0.01)) == 1


def test_shares_are_spread_over_the_split():
    # Of tokens in order, ten shares of a tenth: every third of the split gets its part.
    ordered = sorted(_TOKENS)
    thirds = np.concatenate([label_subset(ordered, 0.1, seed=seed) // 334 for seed in range(10)])
    np.testing.assert_allclose(np.bincount(thirds) / len(thirds), 1 / 3, rtol=0.15)


def test_every_hundredth_of_the_sorted_sweeps():
    subset = label_subset(_TOKENS, 0.01, rule="every")
    assert sorted(_TOKENS[index] for index in subset) == [f"token{number:04}" for number in range(0, 1000, 100)]


def test_a_file_lists_records(tmp_path):
    file = tmp_path / "tokens.txt"
    file.write_text(f"{_TOKENS[7]}\n\n{_TOKENS[2]} \n")
    np.testing.assert_array_equal(listed_records(_TOKENS, file), [2, 7])
    file.write_text(f"{_TOKENS[7]}\nnobody\n")
    with pytest.raises(ValueError, match=r"tokens.txt lists 1 sample tokens that the records lack, such as nobody"):
        listed_records(_TOKENS, file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="lists no token"):
        listed_records(_TOKENS, file)
    with pytest.raises(FileNotFoundError, match="one sample token a line"):
        listed_records(_TOKENS, tmp_path / "missing.txt")


def test_shares_and_rules_out_of_range_are_refused():
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"label_fraction is {fraction}"):
            label_subset(_TOKENS, fraction)
    with pytest.raises(ValueError, match=r"label_rule is 'best'; known rules: hash, every"):
        label_subset(_TOKENS, 0.1, rule="best")

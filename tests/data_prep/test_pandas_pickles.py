"""Pickled tables: what pandas writes is read, what would run is not."""

import gzip
import os
import pickle

import numpy as np
import pandas
import pytest

from data_prep.pandas_pickles import PickleError, read_table


def _table():
    table = pandas.DataFrame({"x": np.arange(3.0), "y": np.arange(3.0) / 7, "d": np.array([0, 1, 1])})
    table.columns = pandas.Index(["x", "y", "d"], dtype=object)
    return table


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("index", [None, np.array([4, 7, 9])], ids=["range", "numbers"])
def test_tables_are_read(protocol, index):
    table = _table() if index is None else _table().set_index(index)
    read = read_table(gzip.compress(pickle.dumps(table, protocol=protocol)))
    pandas.testing.assert_frame_equal(read, table)


def test_tables_of_to_pickle_are_read(tmp_path):
    _table().to_pickle(tmp_path / "00.pkl.gz")
    pandas.testing.assert_frame_equal(read_table((tmp_path / "00.pkl.gz").read_bytes()), _table())


class _Runs:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class _Evaluates:
    def __reduce__(self):
        return pandas.eval, ("1 + 1",)


def test_nothing_runs(tmp_path):
    payload = gzip.compress(pickle.dumps(_Runs(tmp_path / "ran")))
    with pytest.raises(PickleError, match=rf"names {os.mkdir.__module__}\.mkdir, which no table of numbers needs"):
        read_table(payload)
    assert not (tmp_path / "ran").exists()
    # The same bytes do run elsewhere: the test can fail.
    pickle.loads(gzip.decompress(payload))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [_Evaluates(), {"table": [np.load]}, pandas.Timestamp("2020-01-01")], ids=["eval", "load", "time"]
)
def test_other_names_of_pandas_and_numpy_are_refused(content):
    with pytest.raises(PickleError, match="which no table of numbers needs"):
        read_table(gzip.compress(pickle.dumps(content)))


def test_a_table_of_objects_does_not_smuggle_names(tmp_path):
    table = pandas.DataFrame({"x": np.array([_Runs(tmp_path / "ran"), 1], object)})
    table.columns = pandas.Index(["x"], dtype=object)
    with pytest.raises(PickleError, match="which no table of numbers needs"):
        read_table(gzip.compress(pickle.dumps(table)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no whole gzip file"),
        (b"no gzip at all", "is no whole gzip file"),
        (gzip.compress(b"no pickle"), "is no pickled table"),
        (gzip.compress(pickle.dumps(_table())[:-20]), "is no"),
        (gzip.compress(pickle.dumps(_table()))[:-20], "is no whole gzip file"),
        (gzip.compress(pickle.dumps([1, 2])), "holds a list, not a table"),
    ],
    ids=["empty", "text", "gzipped text", "cut pickle", "cut gzip", "list"],
)
def test_what_is_no_table_is_named(data, message):
    with pytest.raises(PickleError, match=message):
        read_table(data)


def test_names_of_old_pandas_are_translated():
    """As pandas 1 wrote an index of whole numbers."""
    table = _table().set_index(np.array([4, 7, 9]))
    data = pickle.dumps(table, protocol=2)
    old = data.replace(b"cpandas\nIndex\n", b"cpandas.core.indexes.numeric\nInt64Index\n")
    assert old != data
    pandas.testing.assert_frame_equal(read_table(gzip.compress(old)), table)

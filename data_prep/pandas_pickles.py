"""Pickled pandas tables, read without running what a stranger put into them.

A pickle names functions that the reader then calls. Only the names that a table of numbers needs are let through, old
ones included, which the unpickler of pandas knows to translate.
"""

import gzip
import io
import pickle
import zlib
from typing import Any

_TABLE_NAMES = {
    ("pandas", "DataFrame"),
    ("pandas.core.frame", "DataFrame"),
    ("pandas.core.internals.managers", "BlockManager"),
    ("pandas.core.internals", "BlockManager"),
    ("pandas.core.internals.blocks", "new_block"),
    ("pandas._libs.internals", "_unpickle_block"),
    ("pandas.core.indexes.base", "_new_Index"),
    ("pandas.core.indexes.base", "Index"),
    ("pandas", "Index"),
    ("pandas.core.indexes.numeric", "Int64Index"),
    ("pandas.core.indexes.range", "RangeIndex"),
    ("pandas", "RangeIndex"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("builtins", "slice"),
    ("__builtin__", "slice"),  # so called up to protocol 2
    ("_codecs", "encode"),
}


class PickleError(ValueError):
    """A file that holds no pickled table, or something more than one."""


def read_table(data: bytes) -> Any:
    """The `pandas.DataFrame` of a gzipped pickle.

    Raises:
      PickleError: no gzipped pickle, damaged, or it names something that a table of numbers has no use for.
      ImportError: pandas is not installed; names the extra.
    """
    try:
        import pandas
        from pandas.compat import pickle_compat
    except ImportError as error:
        raise ImportError("PandaSet's files are pandas tables: pip install 'pop3d-jax[pandaset]'") from error

    class TableUnpickler(pickle_compat.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in _TABLE_NAMES:
                raise PickleError(f"names {module}.{name}, which no table of numbers needs, and is not read")
            return super().find_class(module, name)

    try:
        table = TableUnpickler(io.BytesIO(gzip.decompress(data))).load()
    except PickleError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise PickleError(f"is no whole gzip file ({error})") from error
    # Whatever bytes are no pickle can raise nearly anything.
    except (
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        AssertionError,
    ) as error:
        raise PickleError(f"is no pickled table ({error})") from error
    if not isinstance(table, pandas.DataFrame):
        raise PickleError(f"holds a {type(table).__name__}, not a table")
    return table

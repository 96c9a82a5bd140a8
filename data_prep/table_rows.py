"""Rows of nuScenes' JSON tables, one at a time: the two large tables do not fit into a gigabyte of memory."""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

_CHUNK_CHARACTERS = 1 << 20
# No row is nearly as long: past this, text that does not parse is damage and not the start of a row.
_MAX_ROW_CHARACTERS = 16 << 20
_HASHED_BYTES = 1 << 16
_BETWEEN_ROWS = re.compile(r"[\s,]*")


class SourceError(ValueError):
    """Something wrong in the folder of a data set; the message names table, token and file."""


@dataclasses.dataclass(frozen=True)
class TableFolder:
    """The tables of one version of a nuScenes data set.

    Attributes:
      source: root of the data set, local or gs://.
      version: the folder below it that holds the tables, such as "v1.0-mini".
    """

    source: epath.Path
    version: str

    def path(self, table: str) -> epath.Path:
        """Path of a table."""
        return self.source / self.version / f"{table}.json"

    def require(self, tables: tuple[str, ...]) -> None:
        """Checks that the folder and its tables are there.

        Raises:
          SourceError: no such folder, no such version in it, or missing tables, all of them named.
        """
        if not self.source.exists():
            raise SourceError(f"no folder {self.source} (see --source)")
        if not (self.source / self.version).exists():
            found = ", ".join(sorted(path.name for path in self.source.glob("v1.0-*"))) or "no version"
            raise SourceError(f"{self.source} holds no {self.version}; it has: {found} (see --version)")
        missing = [table for table in tables if not self.path(table).exists()]
        if missing:
            paths = ", ".join(str(self.path(table)) for table in missing)
            raise SourceError(f"missing table {', '.join(missing)}: no file {paths}")

    def rows(self, table: str) -> Iterator[dict[str, Any]]:
        """Reads a table row by row, holding about a megabyte of it at a time.

        Raises:
          SourceError: the file is no JSON list of objects, or ends early; names table and file.
        """
        path = self.path(table)
        decode = json.JSONDecoder().raw_decode
        with path.open("r") as file:
            text = file.read(_CHUNK_CHARACTERS)
            start = _BETWEEN_ROWS.match(text).end()
            if text[start : start + 1] != "[":
                raise SourceError(f"table {table}: {path} does not start with a list: copy it again")
            position = start + 1
            while True:
                position = _BETWEEN_ROWS.match(text, position).end()
                if text.startswith("]", position):
                    return
                try:
                    row, position = decode(text, position)
                except json.JSONDecodeError as error:
                    more = file.read(_CHUNK_CHARACTERS)
                    if not more or len(text) - position > _MAX_ROW_CHARACTERS:
                        raise SourceError(
                            f"table {table}: {path} ends early or is damaged ({error.msg}): copy it again"
                        ) from error
                    text, position = text[position:] + more, 0
                    continue
                if not isinstance(row, dict):
                    raise SourceError(f"table {table}: {path} holds something that is no row: {str(row)[:80]}")
                yield row

    @contextlib.contextmanager
    def fields(self, table: str, row: dict[str, Any]) -> Iterator[None]:
        """Turns a missing field of a row, or one that makes no sense, into an error that names table and row.

        Raises:
          SourceError: instead of the KeyError, TypeError or ValueError of the block.
        """
        try:
            yield
        except SourceError:
            raise
        except KeyError as error:
            raise SourceError(
                f"table {table}: row {row.get('token', '?')} has no field {error} ({self.path(table)})"
            ) from error
        except (TypeError, ValueError) as error:
            raise SourceError(f"table {table}: row {row.get('token', '?')}: {error} ({self.path(table)})") from error

    def dangling(self, table: str, token: str, field: str, value: str, target: str) -> SourceError:
        """The error of a row whose field names a row that another table does not have."""
        return SourceError(
            f"table {table}: row {token} has {field} {value}, which table {target} does not have ({self.path(target)})"
        )

    def fingerprint(self, tables: tuple[str, ...]) -> str:
        """Identity of the tables, cheap enough for every start: sizes, heads and tails, wherever they lie.

        Raises:
          SourceError: as `require`.
        """
        self.require(tables)
        digest = hashlib.sha256(self.version.encode())
        for table in tables:
            size = self.path(table).stat().length
            digest.update(f"\n{table} {size}\n".encode())
            with self.path(table).open("rb") as file:
                digest.update(file.read(_HASHED_BYTES))
                file.seek(max(0, size - _HASHED_BYTES))
                digest.update(file.read())
        return digest.hexdigest()

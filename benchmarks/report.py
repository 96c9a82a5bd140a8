"""What every benchmark leaves behind: a table on the terminal, the same as JSON, and so the performance page's."""

import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import jax

from pop3d_jax.workdir import git_revision


class Table:
    """Results of one benchmark, printed row by row."""

    def __init__(self, name: str, columns: list[str], **details: Any) -> None:
        """Starts a table.

        Args:
          name: of its file and of its place in docs/performance.md.
          columns: their headings.
          details: what else the JSON should keep.
        """
        self.name, self.columns, self.details = name, columns, details
        self.rows: list[list[Any]] = []

    def add(self, *cells: Any) -> None:
        """One row, printed at once: benchmarks are slow."""
        if not self.rows:
            print(" | ".join(self.columns), flush=True)
        self.rows.append(list(cells))
        print(" | ".join(str(cell) for cell in cells), flush=True)

    def write(self, folder: str | None) -> None:
        """Writes FOLDER/NAME.json, with what made it; nothing where there is no folder."""
        if not folder:
            return
        made_by = {
            # Without the places of one machine.
            "command": " ".join(
                [Path(sys.argv[0]).stem, *(re.sub(r"(^|=)/\S*", r"\1PATH", word) for word in sys.argv[1:])]
            ),
            "revision": git_revision(),
            "backend": jax.default_backend(),
            "cores": os.cpu_count(),
            "system": platform.machine(),
            "jax": jax.__version__,
        }
        content = {"columns": self.columns, "rows": self.rows, "made_by": made_by, "details": self.details}
        path = Path(folder) / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written: {path}", flush=True)


def markdown(table: dict[str, Any]) -> str:
    """A written table as Markdown."""
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)

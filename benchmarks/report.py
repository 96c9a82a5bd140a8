"""What every benchmark leaves behind: a table on the terminal, the same as JSON, and so the performance page's."""

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass
class Table:
    """Results of one benchmark.

    Attributes:
      name: of the file and of the place in docs/performance.md.
      columns: their headings.
      rows: cells, text or numbers as a person reads them.
      details: anything else worth keeping in the JSON.
    """

    name: str
    columns: list[str]
    rows: list[list[Any]] = dataclasses.field(default_factory=list)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, *cells: Any) -> None:
        """One row, printed at once: benchmarks are slow."""
        if not self.rows:
            print(" | ".join(self.columns), flush=True)
        self.rows.append(list(cells))
        print(" | ".join(str(cell) for cell in cells), flush=True)

    def write(self, folder: str | None) -> None:
        """Writes FOLDER/NAME.json with the machine it was made on; nothing where there is no folder."""
        if not folder:
            return
        machine = {"cores": os.cpu_count(), "system": platform.machine(), "jax": jax.__version__}
        path = Path(folder) / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self) | {"machine": machine}, indent=1) + "\n")
        print(f"written: {path}", flush=True)


def markdown(table: dict[str, Any]) -> str:
    """A written table as Markdown."""
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)

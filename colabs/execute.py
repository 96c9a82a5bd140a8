"""Executes the notebooks of this folder and writes them back with their outputs.

    python -m colabs.execute [--notebook demo --notebook reproduce]

Prints the seconds of every cell and of the whole notebook, the kernel's start left out.
Each runs in an empty temporary folder, from its first cell to its last, or to a cell that stops it in plain words
(`raise SystemExit("...")`). Cells tagged `not_kept` lose their outputs in the file: a 3D page takes megabytes.
"""

import datetime
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import nbformat
from absl import app, flags
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent
NAMES = ("demo", "export_and_search", "reproduce")


def execute(
    name: str,
    folder: Path,
    parameters: Mapping[str, object] = MappingProxyType({}),
    environment: Mapping[str, str] | None = None,
) -> nbformat.NotebookNode:
    """Executes a notebook.

    Args:
      name: one of NAMES.
      folder: where its kernel runs, and writes.
      parameters: take the place of those in the cell tagged `parameters`.
      environment: variables of the kernel; those of this process by default.

    Returns:
      The notebook with its outputs, and the times of its cells in their metadata (see `seconds_of_cells`).

    Raises:
      ValueError: the notebook has no such parameter.
      CellExecutionError: a cell raised something else than SystemExit.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if has_tag(cell, "parameters")]
    known = {line.split(" = ")[0] for line in cell.source.splitlines()}
    if unknown := sorted(parameters.keys() - known):
        raise ValueError(f"{name}.ipynb has no parameters {', '.join(unknown)}: it has {', '.join(sorted(known))}")
    cell.source = "\n".join([cell.source, *(f"{key} = {value!r}" for key, value in parameters.items())])
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
    )
    try:
        client.execute(**({} if environment is None else {"env": dict(environment)}))
    except CellExecutionError as error:
        if error.ename != "SystemExit":
            raise
    return notebook


def has_tag(cell: nbformat.NotebookNode, tag: str) -> bool:
    """Whether a cell has a tag."""
    return tag in cell.metadata.get("tags", ())


def seconds_of_cells(notebook: nbformat.NotebookNode) -> Iterator[tuple[int, str, float]]:
    """Number, last command (or first line), and seconds of every cell that `execute` executed."""
    for cell in notebook.cells:
        if times := cell.metadata.get("execution"):
            began, ended = (
                datetime.datetime.fromisoformat(times[moment]) for moment in ("iopub.status.busy", "iopub.status.idle")
            )
            lines = [line for line in cell.source.splitlines() if not line.startswith("%%time")]
            commands = [line.strip() for line in lines if line.lstrip().startswith("!")]
            yield cell.execution_count, [*lines[:1], *commands][-1], (ended - began).total_seconds()


def main(_: list[str]) -> None:
    for name in flags.FLAGS.notebook:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary).resolve()
            notebook = execute(name, folder)
        path = FOLDER / f"{name}.ipynb"
        seconds = 0.0
        for number, command, cell_seconds in seconds_of_cells(notebook):
            print(f"{path.name} [{number}] {cell_seconds:7.1f} s  {command[:80]}")
            seconds += cell_seconds
        print(f"{path.name} in all {seconds:.1f} s")
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if has_tag(cell, "not_kept"):
                cell.outputs = []
            if has_tag(cell, "stops"):  # IPython also warns there, of how to end a session
                cell.outputs = [output for output in cell.outputs if output.output_type != "stream"]
        # Some lines name the whole path of what was written or read.
        text = nbformat.writes(notebook).replace(f"{folder}/", "").replace(f"{FOLDER.parent}/", "")
        path.write_text(f"{text}\n")
        print(f"{path.relative_to(FOLDER.parent)}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    flags.DEFINE_multi_enum("notebook", list(NAMES), NAMES, "Which; all by default.")
    app.run(main)

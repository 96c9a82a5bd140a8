"""Drawing where a notebook's kernel has named a backend that is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROJECT = Path(__file__).resolve().parent.parent
# As in an environment without matplotlib-inline: no package offers a backend.
_NO_BACKENDS = """
import importlib.metadata as metadata
known, version = metadata.entry_points, metadata.version
def without(name):
    if name == "matplotlib_inline":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.entry_points = lambda **which: () if which.get("group") == "matplotlib.backend" else known(**which)
metadata.version = without
"""


def run(code):
    return subprocess.run(
        [sys.executable, "-c", _NO_BACKENDS + code],
        cwd=_PROJECT, env=os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_variable_alone_stops_matplotlib():
    """What the module keeps away. Should another version of matplotlib not mind, the module may go."""
    done = run("import matplotlib")
    assert done.returncode != 0
    assert "not a valid value for backend" in done.stderr


@pytest.mark.parametrize("module", ["pop3d_jax.query", "pop3d_jax.grids.answers", "pop3d_jax.lidar_pictures"])
def test_a_kernels_backend_is_not_looked_for(module):
    done = run(f"import {module}, matplotlib; print(matplotlib.get_backend())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Agg"]

"""What the benchmarks' figures go through on their way to the performance page."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from benchmarks.measure import outcome
from benchmarks.page import filled
from benchmarks.report import Table

_PROJECT = Path(__file__).resolve().parent.parent


def test_a_table_is_written_and_fills_its_place_on_the_page(tmp_path):
    table = Table("speed", ["what", "time"])
    table.add("walking", "5 min")
    table.add("running", "2 min")
    table.write(str(tmp_path))
    page = "before\n<!-- table speed -->\nold\n<!-- end -->\nafter\n"
    rows = "| what | time |\n| --- | --- |\n| walking | 5 min |\n| running | 2 min |\n"
    expected = f"before\n<!-- table speed -->\n{rows}<!-- end -->\nafter\n"
    assert filled(page, tmp_path) == expected
    assert filled(expected, tmp_path) == expected
    assert json.loads((tmp_path / "speed.json").read_text())["machine"]["cores"] >= 1


def test_a_table_that_was_never_measured_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"speed.json is missing: run `python -m benchmarks.speed"):
        filled("<!-- table speed -->\n<!-- end -->", tmp_path)


def test_the_page_shows_the_committed_results():
    page = (_PROJECT / "docs" / "performance.md").read_text()
    assert filled(page, _PROJECT / "docs" / "results") == page


def test_an_outcome_has_a_time_only_where_the_function_ran():
    row = outcome(lambda a: a @ a, (jnp.ones((4, 4)),), repeats=2)
    assert row["seconds"] > 0
    assert set(row) == {"compile_seconds", "temporary_bytes", "seconds"}


def test_a_missing_official_clone_is_named(tmp_path):
    script = _PROJECT / "benchmarks" / "official_pop3d.py"
    command = [sys.executable, str(script), "--official", str(tmp_path), "--rig", "rig.npy", "--json", "out.json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "pop3d_maskclip_12ep.py does not exist; give a clone of vobecant/POP3D" in finished.stderr

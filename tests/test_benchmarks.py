"""What the benchmarks' figures go through on their way to the performance page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from benchmarks.measure import COLUMNS, compare
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
    made_by = json.loads((tmp_path / "speed.json").read_text())["made_by"]
    assert made_by["cores"] >= 1
    assert made_by["revision"]


def test_a_table_that_was_never_measured_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"speed.json is missing: run `python -m benchmarks.speed --json"):
        filled("<!-- table speed -->\n<!-- end -->", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"run `python -m benchmarks.speed --topology v5e:2x2 --json"):
        filled("<!-- table speed_v5e_2x2 -->\n<!-- end -->", tmp_path)


def test_the_pages_show_the_committed_results_and_all_of_them():
    results = _PROJECT / "docs" / "results"
    shown = set()
    for name in ("performance.md", "scalr.md"):
        page = (_PROJECT / "docs" / name).read_text()
        assert filled(page, results) == page
        shown |= set(re.findall(r"<!-- table (\w+) -->", page))
    assert shown == {path.stem for path in results.glob("*.json")}


def test_implementations_are_compared_with_the_first():
    def functions(implementation):
        factor = {"one": 1.0, "other": 1.5}[implementation]
        return {"forward": lambda a: factor * a @ a, "forward and backward": lambda a: factor * a @ a @ a}

    table = Table("products", COLUMNS)
    times = compare(table, "4 x 4", functions, ("one", "other"), (jnp.ones((4, 4)),), repeats=2)
    assert set(times) == {"one", "other"}
    assert min(times.values()) > 0
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table.rows]
    assert [(row["implementation"], row["pass"]) for row in rows[1:3]] == [
        ("one", "forward and backward"),
        ("other", "forward"),
    ]
    assert [row["largest difference"] for row in rows] == ["0.0e+00", "", "2.0e+00", ""]


def test_a_missing_official_clone_is_named(tmp_path):
    script = _PROJECT / "benchmarks" / "official_pop3d.py"
    command = [sys.executable, str(script), "--official", str(tmp_path), "--rig", "rig.npy", "--json", "out.json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "pop3d_maskclip_12ep.py does not exist; give a clone of vobecant/POP3D" in finished.stderr

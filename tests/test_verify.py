"""The command that compares the package with a golden set: its lines, what it notices, its exit status."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pop3d_jax.verification import checks
from pop3d_jax.verification.families import FAMILIES
from pop3d_jax.verify import verify

_PROJECT = Path(__file__).resolve().parent.parent
_SHIPPED = _PROJECT / "tests" / "golden"


def _command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pop3d_jax.verify", *arguments],
        cwd=_PROJECT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def _failed(output):
    return [line for line in output.splitlines() if "  FAIL" in line]


def test_the_command_passes_on_the_shipped_set():
    # Without --golden: the shipped set.
    done = _command("--only=schedule")
    assert done.returncode == 0, done.stderr
    *lines, summary = done.stdout.splitlines()
    assert lines
    assert all(line.startswith("schedule") and "  ok" in line for line in lines)
    assert len({line.index("  ok") for line in lines}) == 1
    assert summary.startswith(f"{len(lines)} comparisons on cpu in ")
    assert summary.endswith("all within tolerance")


def test_families_of_the_shipped_set_pass(capsys):
    assert verify(_SHIPPED, only="metrics") == 0
    assert verify(_SHIPPED, only="retrieval") == 0
    output = capsys.readouterr().out
    rows = [line for line in output.splitlines() if line.startswith(("metrics ", "retrieval "))]
    assert len(rows) > 50
    assert all("  ok" in line for line in rows)
    assert output.count("all within tolerance") == 2


@pytest.fixture
def small_set(tmp_path):
    """A golden set of the two smallest families."""
    folder = tmp_path / "golden"
    for name in ("pop3d/lr_schedule.json", "pop3d/metrics.json", "pop3d/metrics.npz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_SHIPPED / name, folder / name)
        (folder / name).chmod(0o644)
    return folder


def test_one_changed_number_fails_exactly_its_line(small_set, tmp_path, capsys):
    path = small_set / "pop3d" / "lr_schedule.json"
    schedule = json.loads(path.read_text())
    base = schedule["base_lrs"][-1]
    schedule[f"base_lr_{base}"]["rows"][5][2] *= 1.001
    path.write_text(json.dumps(schedule))
    assert verify(small_set, only="schedule", json_file=tmp_path / "rows.json") == 1
    output = capsys.readouterr().out
    (line,) = _failed(output)
    assert line.startswith("schedule")
    assert f"base_lr_{base}: backbone" in line
    assert "1 FAILED" in output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 * len(schedule["base_lrs"])
    (failed,) = [row for row in rows if not row["passed"]]
    assert failed["name"] == f"base_lr_{base}: backbone"
    np.testing.assert_allclose(failed["difference"], 1e-3, rtol=0.1)


def test_one_changed_label_and_one_damaged_file(small_set, capsys):
    path = small_set / "pop3d" / "metrics.npz"
    arrays = dict(np.load(path))
    arrays["assign:nomapping:cosine1:labels"][0, 7] += 1
    np.savez(path, **arrays)
    assert verify(small_set, only="metrics") == 1
    (line,) = _failed(capsys.readouterr().out)
    assert "assign:nomapping:cosine1:labels" in line
    assert " 1.00e+00" in line

    path.write_bytes(path.read_bytes()[:1000])
    assert verify(small_set) == 1
    output = capsys.readouterr().out
    # The schedule is compared all the same, and everything that reads the damaged file fails.
    assert sum(line.startswith("schedule") for line in output.splitlines()) >= 2
    assert all("not finished" in line for line in _failed(output))
    assert len(_failed(output)) == 3
    assert f"operations    skipped: {small_set} has no pop3d/ops.npz" in output


def test_an_empty_folder_compares_nothing(tmp_path):
    done = _command(f"--golden={tmp_path}")
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith(f"nothing was compared: {tmp_path}")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--golden=nowhere"], "there is no such folder"),
        ([f"--golden={_SHIPPED}", "--only=zebra"], "operations, network"),
    ],
)
def test_wrong_arguments_are_one_clear_error(arguments, message):
    done = _command(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_differences():
    ones = np.ones((2, 3), np.float32)
    other = ones.copy()
    other[1, 2] = 1.5
    assert checks.absolute("a", other, ones, 0.5).passed
    assert not checks.absolute("a", other, ones, 0.4).passed
    assert checks.relative("a", 2 * other, 2 * ones, 0.5).difference == 0.5
    assert checks.relative("a", other, ones, 0.25, 1.0).difference == 0.25
    assert checks.relative("a", ones * 0, ones * 0, 0.0).difference == 0.0
    assert checks.relative("a", ones, ones * 0, 1.0).difference == np.inf
    assert np.isclose(checks.relative_norm("a", other, ones, 1.0).difference, 0.5 / np.sqrt(6))
    assert checks.exact("a", other, ones).difference == 1.0
    for compare in (checks.absolute, checks.relative, checks.relative_norm):
        assert not compare("a", ones * np.nan, ones, 1.0).passed
        assert "shape (3, 2), official (2, 3)" in compare("a", ones.T, ones, 1.0).note
    assert checks.exact("a", ones.T, ones).difference == np.inf


def test_unclear_choices_are_left_out_only_while_they_are_few():
    official = np.zeros(1000, int)
    ours, clear = official.copy(), np.ones(1000, bool)
    ours[3], clear[3] = 1, False
    assert checks.exact_where_clear("a", ours, official, clear).passed
    ours[4] = 1
    assert checks.exact_where_clear("a", ours, official, clear).difference == 1.0
    # All unclear, as in a network that says nothing.
    assert checks.exact_where_clear("a", ours, official, np.zeros(1000, bool)).difference == 2.0


def test_every_family_has_a_name_and_a_description():
    assert len({comparisons for _, comparisons in FAMILIES}) == len(FAMILIES)
    assert all(comparisons.__doc__ for _, comparisons in FAMILIES)

"""Reports as JSON, and expected errors as one line."""

import json
import math

import pytest

from pop3d_jax.commands import stop_with_message, write_report


def test_a_report_is_strict_json(tmp_path):
    path = tmp_path / "new" / "report.json"
    write_report({"mean": math.nan, "rows": ({"a": 1.5, "b": -math.inf}, None), "name": "val"}, str(path))

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"mean": None, "rows": [{"a": 1.5, "b": None}, None], "name": "val"}


def test_no_file_is_written_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_report({"a": 1}, None)
    assert not list(tmp_path.iterdir())


def test_an_expected_error_is_one_line_and_others_stay_errors(capsys):
    with pytest.raises(SystemExit) as stopped, stop_with_message(ValueError):
        raise ValueError("--flag=3 must be even")
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: --flag=3 must be even\n"
    with pytest.raises(KeyError), stop_with_message(ValueError):
        raise KeyError("a bug")

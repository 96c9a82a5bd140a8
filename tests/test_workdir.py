import json

import ml_collections
import pytest

from pop3d_jax import workdir as workdirs


def config(**changes):
    base = ml_collections.ConfigDict({"seed": 1, "log_every": 5, "model": {"grid": (4, 5, 6)}, "data": {"workers": 0}})
    base.update(changes)
    return base


def test_a_configuration_survives_the_folder(tmp_path):
    workdirs.prepare(tmp_path, config())
    again = workdirs.read_config(tmp_path)
    assert again.model.grid == (4, 5, 6)
    assert again.to_dict() == config().to_dict()


def test_a_run_with_other_settings_is_refused_field_by_field(tmp_path):
    workdirs.prepare(tmp_path, config())
    with pytest.raises(
        workdirs.WorkdirError, match=r"(?s)config\.model\.grid: was \[4, 5, 6\].*config\.seed: was 1, is 2"
    ):
        workdirs.prepare(tmp_path, config(seed=2, model={"grid": (9, 9, 9)}))


def test_fields_that_change_no_number_may_change(tmp_path):
    workdirs.prepare(tmp_path, config())
    workdirs.prepare(tmp_path, config(log_every=1, data={"workers": 4}, export={"top_k": 9}))
    assert workdirs.read_config(tmp_path).log_every == 1
    assert workdirs.read_config(tmp_path).export.top_k == 9


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(workdirs.WorkdirError, match=r"config\.json does not exist"):
        workdirs.read_config(tmp_path)


def test_the_manifest_keeps_every_start(tmp_path):
    for step in (0, 7):
        workdirs.write_manifest(tmp_path, seed=3, data={"train": "abc"}, step=step)
    starts = json.loads((tmp_path / "manifest.json").read_text())["starts"]
    assert [start["first_step"] for start in starts] == [0, 7]
    assert starts[0]["data_fingerprints"] == {"train": "abc"}
    assert starts[0]["packages"]["jax"]
    assert starts[0]["seed"] == 3


def test_a_resumed_run_takes_back_what_lies_behind_its_checkpoint(tmp_path):
    writer = workdirs.MetricWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0 / step})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')  # what a kill leaves behind
    writer = workdirs.MetricWriter(tmp_path, 2)
    writer.write(3, {"loss": 9.0})
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 9.0}]
    assert list((tmp_path / "tensorboard").glob("events*"))

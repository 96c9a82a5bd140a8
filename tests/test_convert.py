"""The conversion command: official weights into a run that other commands take, and back."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from configs import demo
from pop3d_jax.checkpoint import Checkpoints
from pop3d_jax.convert import weights_to_workdir, workdir_to_weights
from pop3d_jax.data.records import RecordSource
from pop3d_jax.experiment import make_student
from pop3d_jax.inference import Predictor
from pop3d_jax.lidar_experiment import build_lidar_student, make_lidar_student
from pop3d_jax.models.parameters import merge_model
from pop3d_jax.models.pop3d import Pop3D
from pop3d_jax.models.waffleiron_weights import waffleiron_to_state_dict
from pop3d_jax.official_weights import model_to_state_dict
from pop3d_jax.torch_files import write_state_dict
from pop3d_jax.train import train
from pop3d_jax.workdir import WorkdirError


@pytest.fixture
def official(small_config):
    """A whole network's weights under official names."""
    return model_to_state_dict(Pop3D(make_student(small_config).config, rngs=nnx.Rngs(7)))


@pytest.mark.slow
def test_official_weights_become_a_run_that_predicts_and_trains(official, small_config, small_records, tmp_path):
    workdir = tmp_path / "run"
    weights_to_workdir({f"module.{key}": value for key, value in official.items()}, small_config, workdir, "a.pth")
    for key, value in workdir_to_weights(workdir).items():
        np.testing.assert_array_equal(value, official[key], err_msg=key)
    assert json.loads((workdir / "manifest.json").read_text())["starts"][0]["data_fingerprints"] == {"weights": "a.pth"}
    prediction = Predictor(workdir)(RecordSource(small_records, "val")[0])
    assert prediction.occupancy.shape == small_config.model.grid_size
    assert np.isfinite(prediction.features).all()
    with jax.transfer_guard("allow"):
        train(small_config, workdir, stop_after=1)
    assert Checkpoints(workdir / "checkpoints", read_only=True).latest_step() == 1
    moved = workdir_to_weights(workdir)
    assert not np.array_equal(moved["tpv_head.level_embeds"], official["tpv_head.level_embeds"])


def test_nothing_is_overwritten_and_nothing_half_written(official, small_config, tmp_path):
    wrong = {key: value for key, value in official.items() if key != "tpv_head.level_embeds"}
    with pytest.raises(ValueError, match=r"missing: tpv_head\.level_embeds"):
        weights_to_workdir(wrong, small_config, tmp_path / "run", "")
    assert not (tmp_path / "run").exists()
    weights_to_workdir(official, small_config, tmp_path / "run", "")
    with pytest.raises(WorkdirError, match="give --out a new folder"):
        weights_to_workdir(official, small_config, tmp_path / "run", "")


@pytest.mark.slow
def test_a_lidar_run_goes_out_and_comes_back(small_lidar_run, small_lidar_config, tmp_path):
    state = workdir_to_weights(small_lidar_run)
    write_state_dict(tmp_path / "weights.safetensors", state)
    small_lidar_config.initial_weights = str(tmp_path / "weights.safetensors")
    parameters, statistics = build_lidar_student(small_lidar_config)
    student = make_lidar_student(small_lidar_config)
    again = waffleiron_to_state_dict(merge_model(student.graph, parameters, statistics))
    assert again.keys() == state.keys()
    # Training takes the backbone of a file and leaves the head as it draws it.
    backbone = [key for key in state if not key.startswith("classif")]
    assert len(backbone) > 0.9 * len(state)
    for key in backbone:
        np.testing.assert_array_equal(again[key], state[key], err_msg=key)


def test_official_lidar_weights_have_another_way_in(official, small_lidar_config, tmp_path):
    with pytest.raises(ValueError, match=r"task = 'distillation'.*--config\.initial_weights=FILE"):
        weights_to_workdir(official, small_lidar_config, tmp_path / "run", "")


def run_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pop3d_jax.convert", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_command_both_ways(official, small_config, small_run, tmp_path):
    file = tmp_path / "weights.safetensors"
    there = run_command("--to_torch", file, "--workdir", small_run)
    assert there.returncode == 0, there.stderr
    write_state_dict(tmp_path / "wrong.safetensors", {"a": np.ones(3, np.float32)})
    wrong = run_command("--from_torch", tmp_path / "wrong.safetensors", "--out", tmp_path / "new")
    assert wrong.returncode == 1
    assert "unknown: a" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    neither = run_command("--from_torch", file)
    assert neither.returncode == 1
    assert "give either --from_torch FILE --out FOLDER" in neither.stderr
    demo_sizes = demo.get_config().model
    sizes = [
        f"--config.model.{name}={value}" for name, value in small_config.model.items() if value != demo_sizes[name]
    ]
    back = run_command("--from_torch", file, "--out", tmp_path / "back", "--config=configs/demo.py", *sizes)
    assert back.returncode == 0, back.stderr
    expected, found = workdir_to_weights(small_run), workdir_to_weights(tmp_path / "back")
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)

"""Training as a user starts it: real processes, a real kill, real records of a small synthetic world."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import demo
from pop3d_jax.checkpoint import Checkpoints
from pop3d_jax.experiment import make_student, restored_parts
from pop3d_jax.sharding import make_mesh, replicated
from pop3d_jax.train import NonFiniteLossError, train
from pop3d_jax.workdir import WorkdirError

PROJECT = Path(__file__).resolve().parent.parent


def small_fields(records, teacher):
    """The demo made as small as it goes."""
    return {
        "data.records": str(records),
        "data.image_hw": (64, 96),
        "data.teacher_image_hw": (48, 80),
        "data.max_feature_points": 2_000,
        "data.sample_feature_points": 2_000,
        "model.backbone_blocks": (1, 1, 1, 1),
        "model.backbone_width": 8,
        "model.grid_size": (12, 10, 4),
        "model.embed_dims": 16,
        "model.num_heads": 2,
        "model.num_layers": 1,
        "model.feature_dim": 16,
        "model.dropout": 0.1,
        "model.grid_mask": True,
        "data.photometric": True,
        "teacher.path": str(teacher),
        "total_steps": 8,
        "log_every": 1,
        "checkpoint_every": 2,
        "eval_every": 100,
        "batch_size": 2,
    }


@pytest.fixture
def small_config(small_records, tiny_clip_folder):
    config = demo.get_config()
    config.update_from_flattened_dict(small_fields(small_records, tiny_clip_folder))
    return config


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compilation_cache")


def command(workdir, records, teacher, *more):
    fields = [f"--config.{name}={value}" for name, value in small_fields(records, teacher).items()]
    return [sys.executable, "-m", "pop3d_jax.train", "--config=configs/demo.py", f"--workdir={workdir}", *fields, *more]


def environment(cache):
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}


def run(arguments, cache):
    return subprocess.run(
        arguments, cwd=PROJECT, env=environment(cache), capture_output=True, text=True, check=False, timeout=300
    )


def final_state(workdir, config):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    restored = checkpoints.restore(restored_parts(make_student(config)), replicated(make_mesh()))
    return checkpoints.latest_step(), restored


def test_a_run_killed_in_the_middle_ends_where_an_unbroken_one_does(
    tmp_path, small_records, tiny_clip_folder, cache, small_config
):
    unbroken = run(command(tmp_path / "unbroken", small_records, tiny_clip_folder), cache)
    assert unbroken.returncode == 0, unbroken.stderr

    killed = subprocess.Popen(
        command(tmp_path / "killed", small_records, tiny_clip_folder),
        cwd=PROJECT,
        env=environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert killed.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    resumed = run(command(tmp_path / "killed", small_records, tiny_clip_folder), cache)
    assert resumed.returncode == 0, resumed.stderr

    expected_step, expected = final_state(tmp_path / "unbroken", small_config)
    step, restored = final_state(tmp_path / "killed", small_config)
    assert step == expected_step == 8
    jax.tree.map(np.testing.assert_array_equal, restored, expected)

    def losses(workdir):
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row["train/total"] for row in rows if "train/total" in row}

    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    assert sorted(losses(tmp_path / "killed")) == list(range(1, 9))
    starts = json.loads((tmp_path / "killed" / "manifest.json").read_text())["starts"]
    assert len(starts) == 2
    assert 0 <= starts[1]["first_step"] < 8

    # Starting a finished run again does nothing, and says so with success.
    again = run(command(tmp_path / "killed", small_records, tiny_clip_folder), cache)
    assert again.returncode == 0, again.stderr
    assert final_state(tmp_path / "killed", small_config)[0] == 8


def test_the_help_of_the_command_is_worth_reading():
    finished = run([sys.executable, "-m", "pop3d_jax.train", "--help"], "")
    assert "--config" in finished.stdout
    assert "resumes a run" in finished.stdout


def test_a_loss_that_is_not_finite_stops_with_step_and_tokens(tmp_path, small_config):
    small_config.loss.feature = float("inf")
    with pytest.raises(
        NonFiniteLossError, match=r"(?s)loss of step 0 .*sample tokens.*\['[0-9a-f]{32}'.*good checkpoint: none"
    ):
        train(small_config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_a_teacher_of_another_width_is_refused(tmp_path, small_config):
    small_config.model.feature_dim = 24
    with pytest.raises(ValueError, match=r"width 16.*--config\.model\.feature_dim=16"):
        train(small_config, tmp_path)


def test_a_workdir_of_another_experiment_is_refused(tmp_path, small_config):
    (tmp_path / "config.json").write_text(small_config.to_json())
    small_config.optim.learning_rate = 0.5
    with pytest.raises(WorkdirError, match=r"config\.optim\.learning_rate"):
        train(small_config, tmp_path)


def test_an_unknown_field_of_the_model_is_refused(tmp_path, small_config):
    with small_config.unlocked():
        small_config.model.depth = 3
    with pytest.raises(ValueError, match=r"unknown fields of config\.model: \['depth'\]"):
        train(small_config, tmp_path)

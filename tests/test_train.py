"""Training as a user starts it: real processes, a real kill, real records of a small synthetic world."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_teacher import save_network

from pop3d_jax.checkpoint import Checkpoints
from pop3d_jax.experiment import make_student, restored_parts
from pop3d_jax.sharding import make_mesh, replicated
from pop3d_jax.train import NonFiniteLossError, parse_profile_steps, train
from pop3d_jax.workdir import WorkdirError


def final_state(workdir, config):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    restored = checkpoints.restore(restored_parts(make_student(config)), replicated(make_mesh()))
    return checkpoints.latest_step(), restored


def finish(process):
    _, log = process.communicate(timeout=400)
    assert process.returncode == 0, log
    return log


@pytest.mark.slow
def test_a_run_told_to_stop_saves_the_step_under_way_and_goes_on(tmp_path, small_run, small_train, small_config):
    workdir = tmp_path / "preempted"
    # No checkpoint is due before the end: what there is was saved because of the signal.
    preempted = small_train(workdir, "--config.checkpoint_every=100")
    log = ""
    while "step 2:" not in log:
        line = preempted.stderr.readline()
        assert line, log
        log += line
    preempted.send_signal(signal.SIGTERM)
    rest = preempted.communicate(timeout=300)[1]
    assert preempted.returncode == 128 + signal.SIGTERM, rest
    stopped_at = Checkpoints(workdir / "checkpoints", read_only=True).latest_step()
    assert 2 <= stopped_at < 8
    assert f"checkpoints/{stopped_at} is saved, the same command goes on from there" in rest
    assert f"resuming from the checkpoint of step {stopped_at}" in finish(small_train(workdir))
    # The classes' text vectors, kept by the evaluation at the end: no other command was given this folder.
    assert len(list((workdir / "text_cache").glob("text_*.npy"))) == 1
    step, restored = final_state(workdir, small_config)
    expected_step, expected = final_state(small_run, small_config)
    assert step == expected_step
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


@pytest.mark.slow
def test_a_trace_of_the_steps_asked_for(tmp_path, small_config):
    small_config.eval_every = 0
    train(small_config, tmp_path, stop_after=3, profile_steps=range(1, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("values", [["3"], ["3", "3"], ["1", "x"], ["1", "2", "3"]])
def test_profile_steps_that_are_no_span_are_refused(values):
    with pytest.raises(ValueError, match=f"--profile_steps={','.join(values)} must be"):
        parse_profile_steps(values)
    assert parse_profile_steps(["10", "13"]) == range(10, 13)
    assert not parse_profile_steps(None)


def test_a_run_killed_in_the_middle_ends_where_an_unbroken_one_does(tmp_path, small_run, small_train, small_config):
    workdir = tmp_path / "killed"
    killed = small_train(workdir)
    deadline = time.monotonic() + 300
    # A whole checkpoint has the step's bare number as its name. The last one is written after the evaluation.
    while not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    # Its own evaluation changes nothing of what is compared.
    assert "resuming from the checkpoint" in finish(small_train(workdir, "--config.eval_every=0"))

    expected_step, expected = final_state(small_run, small_config)
    step, restored = final_state(workdir, small_config)
    assert step == expected_step == 8
    jax.tree.map(np.testing.assert_array_equal, restored, expected)

    def losses(folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row["train/total"] for row in rows if "train/total" in row}

    assert losses(workdir) == losses(small_run)
    assert sorted(losses(workdir)) == list(range(1, 9))
    starts = json.loads((workdir / "manifest.json").read_text())["starts"]
    assert len(starts) == 2
    assert 0 < starts[1]["first_step"] < 8

    # Starting a finished run again does nothing, with success.
    finish(small_train(workdir, "--config.eval_every=0"))
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir, small_config)[1], expected)


def test_a_run_leaves_what_a_reader_needs(small_run):
    assert {path.name for path in small_run.iterdir()} >= {
        "config.json",
        "manifest.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
    }
    rows = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/occupancy_iou" in row for row in rows)


def test_the_help_of_the_command_is_worth_reading():
    finished = subprocess.run(
        [sys.executable, "-m", "pop3d_jax.train", "--help"], capture_output=True, text=True, check=False
    )
    assert "--config" in finished.stdout
    assert "resumes a run" in finished.stdout


@pytest.mark.slow
def test_maskclip_plus_teaches_in_the_step(tmp_path, small_config):
    small_config.teacher.name = "maskclip_plus"
    weights = save_network(tmp_path / "maskclip_plus.safetensors", small_config.model.feature_dim)
    small_config.teacher.weights = str(weights)
    small_config.batch_size, small_config.eval_every = 1, 0
    logged = train(small_config, tmp_path / "run", stop_after=2)
    assert np.isfinite(list(logged.values())).all()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len({row["train/feature"] for row in rows}) == 2


@pytest.mark.slow
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


def test_evaluation_in_a_training_needs_a_teacher_with_texts(tmp_path, small_config, dinov2_folder):
    small_config.teacher.name, small_config.teacher.path = "dinov2", str(dinov2_folder)
    small_config.teacher.variant = "official"
    with pytest.raises(ValueError, match=r"tiny_dinov2\) has no text side.*--config\.eval_every=0"):
        train(small_config, tmp_path)
    small_config.eval_every = 0
    with pytest.raises(ValueError, match=r"tiny_dinov2\) .* width 48.*--config\.model\.feature_dim=48"):
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

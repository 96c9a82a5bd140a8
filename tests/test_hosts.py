"""Several processes as one program: what the environment must say, training together, one of them killed."""

import json
import os
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

from pop3d_jax import hosts
from pop3d_jax.checkpoint import Checkpoints
from pop3d_jax.experiment import make_student, restored_parts
from pop3d_jax.sharding import make_mesh, replicated

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.mark.parametrize(
    "values", [("localhost:1234", None, None), ("localhost:1234", "2", None), ("localhost:1234", "two", "0")]
)
def test_half_an_environment_is_refused(values):
    environment = {name: value for name, value in zip(VARIABLES, values, strict=True) if value}
    with pytest.raises(ValueError, match="several processes need all of"):
        hosts.join_hosts(environment)


def test_one_process_stays_alone():
    hosts.join_hosts({"SLURM_NTASKS": "1", "JAX_PLATFORMS": "cpu"})
    assert not jax.distributed.is_initialized()


def test_sigterm_is_noticed_inside_only():
    before = signal.getsignal(signal.SIGTERM)
    with hosts.StopRequest() as stop:
        assert not stop.at(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.at(1)
    assert signal.getsignal(signal.SIGTERM) == before


def start_pair(small_train, workdir, *flags):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        small_train(workdir, *flags, environment=dict(zip(VARIABLES, (address, "2", str(index)), strict=True)))
        for index in range(2)
    ]


def finish(pair):
    logs = [process.communicate(timeout=400)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], logs
    return logs


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([row["train/total"] for row in rows if "train/total" in row])


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_when_one_was_killed(tmp_path, small_run, small_train, small_config):
    workdir = tmp_path / "pair"
    pair = start_pair(small_train, workdir)
    deadline = time.monotonic() + 400
    while not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        assert [process.poll() for process in pair] == [None, None]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pair[1].send_signal(signal.SIGKILL)
    pair[1].communicate()
    # The other one cannot go on alone: it ends with an error, or is ended by whoever watches it.
    try:
        pair[0].communicate(timeout=60)
        assert pair[0].returncode != 0
    except subprocess.TimeoutExpired:
        pair[0].kill()
        pair[0].communicate()

    logs = finish(start_pair(small_train, workdir))
    assert all("resuming from the checkpoint of step" in log for log in logs)
    assert "process 1 of 2" in logs[1]
    # The same losses as one process alone, but for the order of a sum over the batch.
    np.testing.assert_allclose(losses(workdir), losses(small_run), rtol=1e-4)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    restored = checkpoints.restore(restored_parts(make_student(small_config)), replicated(make_mesh()))
    assert checkpoints.latest_step() == small_config.total_steps
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored))


@pytest.mark.slow
def test_one_of_two_told_to_stop_stops_both_at_the_same_step(tmp_path, small_train):
    workdir = tmp_path / "pair"
    pair = start_pair(small_train, workdir, "--config.checkpoint_every=100", "--config.total_steps=400")
    log = ""
    while "step 2:" not in log:
        line = pair[0].stderr.readline()
        assert line, log
        log += line
    pair[1].send_signal(signal.SIGTERM)
    rest = [process.communicate(timeout=300)[1] for process in pair]
    assert [process.returncode for process in pair] == [hosts.STOPPED_STATUS] * 2, rest
    stopped_at = Checkpoints(workdir / "checkpoints", read_only=True).latest_step()
    assert stopped_at < 400
    assert all(f"checkpoints/{stopped_at} is saved" in text for text in rest)

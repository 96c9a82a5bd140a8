"""ScaLR's two tasks as a user trains them: a distillation that is killed, a probe on top of it, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest

from configs import scalr_finetune, scalr_plus, scalr_probe
from pop3d_jax.checkpoint import Checkpoints
from pop3d_jax.data.records import RecordError
from pop3d_jax.lidar_experiment import build_lidar_student, make_lidar_student
from pop3d_jax.sharding import make_mesh, replicated
from pop3d_jax.tasks import abstract_training, load_task
from pop3d_jax.train import train

_PROJECT = Path(__file__).resolve().parents[2]


def final_state(workdir, config):
    """Step, parameters and statistics of the newest checkpoint."""
    student = make_lidar_student(config)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    abstract = {"parameters": student.abstract_parameters, "statistics": student.abstract_statistics}
    return checkpoints.latest_step(), checkpoints.restore(abstract, replicated(make_mesh()))


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return {row["step"]: row["train/total"] for row in rows(workdir) if "train/total" in row}


def with_labels(config, module, **fields):
    """The experiment of small distillations as one with labels."""
    published = module.get_config("nuscenes")
    small = {
        **{f"data.{name}": value for name, value in config.data.items()},
        **{f"points.{name}": value for name, value in config.points.items()},
        "model.channels": config.model.channels,
        "model.depth": config.model.depth,
        "model.grid_shapes": config.model.grid_shapes,
        "points.capacity": 16_384,  # of evaluation, which judges whole sweeps
        "points.raw_capacity": 40_960,
        "optim.warmup_epochs": 1.0,
        "batch_size": 2,
        "total_steps": 4,
        "log_every": 1,
        "checkpoint_every": 4,
        "eval_every": 4,
        "eval_batch_size": 2,
    }
    published.update_from_flattened_dict(small | fields)
    return published


@pytest.fixture
def probe_config(small_lidar_config):
    return with_labels(small_lidar_config, scalr_probe)


@pytest.mark.slow
def test_a_distillation_killed_in_the_middle_ends_where_an_unbroken_one_does(
    tmp_path, small_lidar_run, small_lidar_train, small_lidar_config
):
    workdir = tmp_path / "killed"
    killed = small_lidar_train(workdir)
    deadline = time.monotonic() + 300
    # A whole checkpoint has the step's bare number as its name.
    while not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    resumed = small_lidar_train(workdir)
    _, log = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, log
    assert "resuming from the checkpoint" in log
    starts = json.loads((workdir / "manifest.json").read_text())["starts"]
    assert 0 < starts[1]["first_step"] < small_lidar_config.total_steps

    expected_step, expected = final_state(small_lidar_run, small_lidar_config)
    step, restored = final_state(workdir, small_lidar_config)
    assert step == expected_step == small_lidar_config.total_steps
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert losses(workdir) == losses(small_lidar_run)
    assert sorted(losses(workdir)) == list(range(1, step + 1))


@pytest.mark.slow
def test_a_distillation_comes_closer_to_its_teacher(small_lidar_run):
    history = losses(small_lidar_run)
    assert max(history.values()) <= 2
    assert np.mean([history[step] for step in range(37, 41)]) < 0.8 * history[1]
    assert all(row["train/paired_points"] > 0 for row in rows(small_lidar_run) if "train/total" in row)


@pytest.mark.slow
def test_probing_leaves_the_distilled_backbone_as_it_is(tmp_path, small_lidar_run, small_lidar_config, probe_config):
    probe_config.initial_weights = str(small_lidar_run)
    train(probe_config, tmp_path)
    _, distilled = final_state(small_lidar_run, small_lidar_config)
    step, probed = final_state(tmp_path, probe_config)
    assert step == 4
    heads = {part: (distilled[part].pop("head", None), probed[part].pop("head")) for part in distilled}
    jax.tree.map(np.testing.assert_array_equal, probed, distilled)
    assert np.any(heads["parameters"][1]["output"]["kernel"])  # it starts from zero
    scores = {name: value for row in rows(tmp_path) for name, value in row.items() if name.startswith("eval/")}
    assert set(scores) == {"eval/nuscenes/miou", "eval/nuscenes/accuracy"}
    assert all(0 < value < 100 for value in scores.values())


@pytest.mark.slow
def test_fine_tuning_moves_the_backbone(tmp_path, small_lidar_run, small_lidar_config):
    config = with_labels(
        small_lidar_config,
        scalr_finetune,
        **{"initial_weights": str(small_lidar_run), "total_steps": 2, "eval_every": 0, "optim.warmup_epochs": 0.0},
    )
    config.optim.warmup_steps = 0
    train(config, tmp_path)
    _, distilled = final_state(small_lidar_run, small_lidar_config)
    _, tuned = final_state(tmp_path, config)
    distilled["parameters"].pop("head"), tuned["parameters"].pop("head")
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), tuned["parameters"], distilled["parameters"])
    assert all(jax.tree.leaves(moved))


def refused(config, message, error=ValueError):
    """The task is refused, before anything is compiled."""
    with pytest.raises(error, match=message):
        load_task(config, "unused", make_mesh()).make_state()


def test_a_teacher_of_another_width_is_refused(tmp_path, small_lidar_config):
    small_lidar_config.model.output_channels = 24
    with pytest.raises(ValueError, match=r"width 48.*--config\.model\.output_channels=48"):
        train(small_lidar_config, tmp_path)


def test_an_evaluation_that_a_distillation_has_not_is_refused(tmp_path, small_lidar_config):
    small_lidar_config.eval_every = 10
    with pytest.raises(ValueError, match=r"eval_every = 10: a distillation has nothing to judge; set it to 0"):
        train(small_lidar_config, tmp_path)


@pytest.mark.slow
def test_initial_weights_of_another_backbone_are_refused(small_lidar_run, probe_config):
    probe_config.initial_weights = str(small_lidar_run)
    probe_config.model.channels = 8
    refused(probe_config, r"config\.initial_weights=.* is of another backbone: model\.channels: 16, here 8")


@pytest.mark.slow
def test_initial_weights_go_into_grids_of_any_size(small_lidar_run, probe_config):
    probe_config.initial_weights = str(small_lidar_run)
    parameters, _ = build_lidar_student(probe_config)
    probe_config.model.grid_shapes = tuple((2 * rows, columns) for rows, columns in probe_config.model.grid_shapes)
    jax.tree.map(np.testing.assert_array_equal, build_lidar_student(probe_config)[0], parameters)


def test_data_sets_that_nobody_knows_are_refused(small_lidar_config):
    small_lidar_config.datasets = ml_collections.ConfigDict({"mars": 1.0})
    refused(small_lidar_config, r"config\.datasets has 'mars'; known data sets: .*nuscenes")
    small_lidar_config.datasets = ml_collections.ConfigDict()
    refused(small_lidar_config, r"config\.datasets is empty")


def test_data_sets_of_different_classes_are_refused(probe_config):
    probe_config.datasets = ml_collections.ConfigDict({"nuscenes": 1.0, "semantic_kitti": 1.0})
    with pytest.raises(ValueError, match=r"config\.datasets = \['nuscenes', 'semantic_kitti'\] have different classes"):
        abstract_training(probe_config, make_mesh(), 10)


def test_a_head_for_other_classes_is_refused(probe_config):
    probe_config.model.output_channels = 5
    refused(probe_config, r"16 classes, the head has 5 outputs: set --config\.model\.output_channels=16")


def test_records_that_are_missing_are_named(tmp_path, small_lidar_config):
    small_lidar_config.data.records = str(tmp_path)
    refused(small_lidar_config, rf"{tmp_path}/nuscenes", RecordError)


def test_records_of_another_data_set_are_refused(tmp_path, small_records, small_lidar_config):
    (tmp_path / "pandar64").symlink_to(small_records)
    small_lidar_config.data.records = str(tmp_path)
    small_lidar_config.datasets = ml_collections.ConfigDict({"pandar64": 1.0})
    refused(small_lidar_config, r"pandar64 holds records of nuscenes: .*--dataset pandar64", RecordError)


def test_what_evaluation_needs_is_told_before_the_first_step(probe_config):
    probe_config.data.eval_split = "test"
    refused(probe_config, "no finished split 'test'", RecordError)


def test_a_share_and_a_list_of_labels_are_refused(tmp_path, probe_config):
    probe_config.label_fraction, probe_config.label_tokens = 0.5, str(tmp_path / "tokens.txt")
    refused(probe_config, r"config\.label_fraction or config\.label_tokens, not both")


def test_a_share_of_the_labels_is_what_is_trained_on(probe_config):
    probe_config.label_fraction = 0.5
    assert load_task(probe_config, "unused", make_mesh()).key_frames == 2  # of four


@pytest.mark.parametrize("part", ["points", "model"])
def test_unknown_fields_are_refused(part, small_lidar_config):
    with small_lidar_config.unlocked():
        small_lidar_config[part].colour = "red"
    task = rf"unknown fields of config\.{part}: \['colour'\]; known are"
    with pytest.raises(ValueError, match=task):
        next(load_task(small_lidar_config, "unused", make_mesh()).batches(0))


def test_unknown_tasks_are_refused(small_lidar_config):
    small_lidar_config.task = "colouring"
    refused(small_lidar_config, r"config\.task is 'colouring': choose one of .*'distillation'")


_ON_MESHES = """
import json, sys
import jax, numpy as np
from pathlib import Path
from pop3d_jax.hlo_text import collectives
from pop3d_jax.sharding import make_mesh, shard_batch
from pop3d_jax.tasks import load_task
from pop3d_jax.workdir import config_from_json

config = config_from_json(Path(sys.argv[1]).read_text())
runs = []
for devices in (1, 2, 4):
    mesh = make_mesh(devices, 1, jax.devices()[:devices])
    task = load_task(config, "unused", mesh)
    state, batches, losses, program = task.make_state(), task.batches(0), [], None
    for _ in range(3):
        batch = next(batches)
        arrays = {k: v for k, v in batch.items() if k not in (*task.host_arrays, *task.capacities)}
        arrays = shard_batch(arrays, mesh)
        with jax.set_mesh(mesh):
            program = program or task.step.lower(state, arrays, task.constants).compile()
            state, metrics = program(state, arrays, task.constants)
        losses.append(float(metrics["total"]))
    if devices > 1:
        # Every device keeps its clouds and pictures: only sums travel.
        kinds = set(collectives(program.as_text()))
        assert kinds == {"all-reduce"}, kinds
    runs.append((losses, jax.device_get((state["parameters"], state["statistics"]))))
assert len(set(runs[0][0])) == 3
for losses, arrays in runs[1:]:
    np.testing.assert_allclose(losses, runs[0][0], rtol=1e-6)
    def same(found, expected):
        assert np.linalg.norm(found - expected) <= 2e-5 * max(np.linalg.norm(expected), 1e-3)
    jax.tree.map(same, arrays, runs[0][1])
"""


@pytest.mark.slow
def test_two_and_four_devices_distil_as_one_does(tmp_path, small_lidar_config):
    small_lidar_config.batch_size = 4
    small_lidar_config.optim.warmup_steps = 0  # parameters move at once
    # Adam with a tiny epsilon would turn the rounding of tiny gradients into whole steps.
    small_lidar_config.optim.learning_rate, small_lidar_config.optim.epsilon = 3e-4, 1e-4
    (tmp_path / "config.json").write_text(small_lidar_config.to_json())
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    finished = subprocess.run(
        [sys.executable, "-c", _ON_MESHES, str(tmp_path / "config.json")],
        env=os.environ | {"XLA_FLAGS": flags},
        cwd=_PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]


@pytest.mark.slow
def test_the_newer_recipe_trains(tmp_path, small_lidar_config):
    recipe = scalr_plus.get_config("nuscenes")
    with small_lidar_config.unlocked():
        for name in ("head", "head_hidden", "activation", "drop_path"):
            small_lidar_config.model[name] = recipe.model[name]
        small_lidar_config.optim.update(recipe.optim)
        small_lidar_config.optim.update({"warmup_epochs": 0.0, "warmup_steps": 2, "cooldown_epochs": 0.0})
        small_lidar_config.optim.update({"cooldown_steps": 2, "timescale_epochs": 0.0, "timescale_steps": 4.0})
    small_lidar_config.total_steps = 8
    train(small_lidar_config, tmp_path)
    history = losses(tmp_path)
    assert sorted(history) == list(range(1, 9))
    assert history[8] < history[1]


def test_a_length_in_epochs_and_in_steps_is_refused(small_lidar_config):
    with small_lidar_config.unlocked():
        small_lidar_config.optim.warmup_epochs = 1.0
    with pytest.raises(ValueError, match=r"warmup_epochs = 1\.0 and warmup_steps = 2: set one of them to 0"):
        load_task(small_lidar_config, "unused", make_mesh())

"""Programs for machines that are not there: shapes, what is said of them, and, where libtpu is, a real compilation."""

import importlib.util

import jax
import numpy as np
import pytest

from configs import scalr_plus, scalr_probe
from pop3d_jax import compile_report
from pop3d_jax.abstract_programs import AbstractProgram
from pop3d_jax.compile_report import Compiled
from pop3d_jax.data.pipeline import training_batches
from pop3d_jax.data.records import RecordSource
from pop3d_jax.experiment import example_settings
from pop3d_jax.hlo_text import LargeArray
from pop3d_jax.sharding import make_mesh, replicated
from pop3d_jax.tasks import abstract_inference, abstract_training, load_task
from pop3d_jax.teacher import abstract_teacher, load_teacher


def test_shapes_are_those_of_a_real_batch(small_config):
    settings = example_settings(small_config, training=True)
    source = RecordSource(small_config.data.records, "train")
    real = next(training_batches(source, settings, batch_size=2, seed=0))
    _, told, _ = abstract_training(small_config, make_mesh(), 10).arguments
    assert set(told) <= set(real)
    assert {"images", "teacher_images", "points", "feature_points", "lidar_to_image"} <= set(told)
    for name, shape in told.items():
        assert (shape.shape, shape.dtype) == (real[name].shape, real[name].dtype), name


def test_shapes_of_lidar_batches_are_those_of_real_ones(small_lidar_config):
    task = load_task(small_lidar_config, "unused", make_mesh())
    real = next(task.batches(0))
    state, told, constants = abstract_training(small_lidar_config, make_mesh(), 10).arguments
    assert set(told) == set(real) - {*task.host_arrays, *task.capacities}
    for name, shape in told.items():
        assert (shape.shape, shape.dtype) == (real[name].shape, real[name].dtype), name
    assert jax.tree.map(np.shape, constants) == jax.tree.map(np.shape, task.constants)
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, task.make_state())


def test_every_task_has_its_programs(small_lidar_config):
    probe = scalr_probe.get_config("nuscenes")
    probe.update_from_flattened_dict(
        {"model.channels": 8, "model.depth": 1, "batch_size": 2, "points.capacity": 512, "points.max_points": 256}
    )
    mesh = make_mesh(1, 1, jax.devices()[:1])
    for config, term, points, outputs in (
        (small_lidar_config, "paired_points", small_lidar_config.points.capacity, 48),
        (probe, "lovasz", 512, 16),
    ):
        with jax.set_mesh(mesh):
            training, inference = abstract_training(config, mesh, 10_000), abstract_inference(config, mesh)
            _, metrics = jax.eval_shape(training.function, *training.arguments)
            found = jax.eval_shape(inference.function, *inference.arguments)
        assert term in metrics
        assert found.shape == (2, points, outputs)
    assert "256 points, 1 blocks of 8 channels" in compile_report.format_report([], "v5e:2x2", probe)


def test_phases_in_epochs_need_no_records():
    config = scalr_plus.get_config()
    config.update_from_flattened_dict({"model.channels": 8, "model.depth": 1, "points.capacity": 512})
    mesh = make_mesh(1, 1, jax.devices()[:1])
    assert abstract_training(config, mesh, 10_000).name == "training step"


def test_an_abstract_teacher_has_the_shapes_of_the_loaded_one(small_config):
    told, real = abstract_teacher(small_config.teacher), load_teacher(small_config.teacher)
    assert told.feature_dim == real.feature_dim
    shapes = [jax.tree.map(np.shape, teacher.parameters) for teacher in (told, real)]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_the_published_teachers_need_no_files(small_config):
    small_config.teacher.path = "openai/clip-vit-base-patch16"
    assert abstract_teacher(small_config.teacher).feature_dim == 512
    small_config.teacher.name = "maskclip_plus"
    assert abstract_teacher(small_config.teacher).feature_dim == 512
    small_config.teacher.name, small_config.teacher.path = "maskclip", "somebody/clip"
    with pytest.raises(FileNotFoundError, match="somebody/clip are not known here"):
        abstract_teacher(small_config.teacher)


def test_the_report_says_what_does_not_fit(small_config):
    large = LargeArray(3 * 10**9, "f32[3,5]", "jit(step)/dot", "pop3d_jax/models/fpn.py:70")
    fine = Compiled(
        name="training step",
        seconds=12.0,
        arguments=10**9,
        temporaries=14 * 10**9,
        outputs=9 * 10**8,
        aliased=8 * 10**8,
        peak=12 * 10**9,  # alive at a time: the gaps between are not in it
        flops=2e12,
        collectives={"all-reduce": (3, 10**8)},
        largest=(large,),
    )
    refused = Compiled("inference step", 1.0, refused="Used 40.00G of 15.75G hbm.")
    text = compile_report.format_report([fine, refused], "v5e:2x2", small_config)
    assert "69.8 %" in text
    assert "87.9 %" in text
    assert "leave it some room" not in text
    assert "does not fit" in text
    assert "Used 40.00G" in text
    assert "3.00 GB  f32[3,5]" in text
    assert compile_report.fits([fine], "v5e:2x2")
    assert not compile_report.fits([fine, refused], "v5e:2x2")
    assert not compile_report.fits([Compiled("x", 1.0, peak=18 * 10**9)], "v5e:2x2")
    tight = Compiled("inference step", 1.0, temporaries=17 * 10**9, peak=10**10)
    assert "inference step: the compiler accepts it" in compile_report.format_report([tight], "v5e:2x2", small_config)


def test_unknown_topologies_are_refused(small_config):
    with pytest.raises(ValueError, match=r"--topology=v3:2x2: known are v5e, v5p, v6e"):
        compile_report.topology_mesh("v3:2x2", small_config)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_extra_is_named(small_config):
    with pytest.raises(ValueError, match=r"pip install 'pop3d-jax\[tpu\]'"):
        compile_report.topology_mesh("v5e:2x2", small_config)


@pytest.mark.slow
def test_small_programs_compile_for_a_tpu_and_large_ones_are_refused(small_config):
    pytest.importorskip("libtpu", reason="needs the extra: pip install 'pop3d-jax[tpu]'")
    small_config.batch_size = 4
    small_config.model.attention_implementation = "pallas"
    training, inference = programs = compile_report.compile_programs(small_config, "v5e:2x2")
    assert compile_report.fits(programs, "v5e:2x2")
    assert training.collectives["all-reduce"][0] >= 1
    assert not inference.collectives
    assert training.matrix_flops > inference.matrix_flops > 0
    assert training.peak > training.arguments > 0
    assert any(array.source.startswith("pop3d_jax/") for array in training.largest)
    mesh = compile_report.topology_mesh("v5e:2x2", small_config)
    with jax.set_mesh(mesh):
        large = jax.ShapeDtypeStruct((10**10,), np.float32, sharding=replicated(mesh))
        refused = compile_report._compiled(AbstractProgram("large", jax.jit(lambda x: x + 1), (large,)))
    assert refused.refused
    assert not compile_report.fits([refused], "v5e:2x2")


@pytest.mark.slow
def test_lidar_clouds_stay_on_their_chips(small_lidar_config):
    pytest.importorskip("libtpu", reason="needs the extra: pip install 'pop3d-jax[tpu]'")
    small_lidar_config.batch_size = 4
    small_lidar_config.points.capacity = small_lidar_config.points.max_points  # as many points in both programs
    training, inference = programs = compile_report.compile_programs(small_lidar_config, "v5e:2x2")
    assert compile_report.fits(programs, "v5e:2x2")
    assert set(training.collectives) == {"all-reduce"}
    assert not inference.collectives
    assert training.matrix_flops > inference.matrix_flops > 0


def test_student_and_teacher_may_share_their_images(small_config):
    small_config.data.teacher_image_hw = small_config.data.image_hw
    mesh = make_mesh(1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = abstract_training(small_config, mesh, 10)
        _, batch, _ = program.arguments
        assert "teacher_images" not in batch
        _, metrics = jax.eval_shape(program.function, *program.arguments)
    assert "feature" in metrics

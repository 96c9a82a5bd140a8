"""ScaLR as two tasks: distillation of an image teacher into a lidar backbone, and segmentation with labels."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding

from pop3d_jax.abstract_programs import (
    AbstractProgram,
    abstract_batch,
    abstract_state,
    blank_key_frame,
    on_every_device,
)
from pop3d_jax.data.lidar_examples import make_distillation_example, make_segmentation_example
from pop3d_jax.data.lidar_pipeline import LidarSource, MakeExample, mixture_shares, training_batches
from pop3d_jax.lidar_experiment import (
    build_lidar_student,
    dataset_named,
    lidar_settings,
    lidar_sources,
    make_lidar_student,
)
from pop3d_jax.lidar_program import distillation_program, segmentation_program
from pop3d_jax.lidar_step import network_input
from pop3d_jax.models.parameters import merge_model
from pop3d_jax.program import TrainingProgram, number_of_steps
from pop3d_jax.schedules import make_schedule
from pop3d_jax.segmentation_evaluator import SegmentationEvaluator
from pop3d_jax.sharding import partition_spec, replicated
from pop3d_jax.step import State, initial_state
from pop3d_jax.tasks.task import Task
from pop3d_jax.teacher import abstract_teacher, load_teacher


def distillation_task(config: ml_collections.ConfigDict, workdir: epath.Path, mesh: Mesh) -> Task:
    """The backbone learns what a frozen image model says of the pixels that its points fall on.

    Raises:
      RecordError, WeightFileError, FileNotFoundError, ValueError: see the messages.
    """
    del workdir
    if config.eval_every:
        raise ValueError(
            f"config.eval_every = {config.eval_every}: a distillation has nothing to judge; set it to 0, and probe the "
            "run with configs/scalr_probe.py"
        )
    sources = _sources(config)
    config = _with_lengths_in_steps(config, sum(map(len, sources)) // config.batch_size)
    total_steps = number_of_steps(config, sum(map(len, sources)))
    teacher = load_teacher(config.teacher)
    program = distillation_program(config, teacher, total_steps, mesh)
    constants = jax.device_put(teacher.parameters, replicated(mesh))
    return _task(config, sources, total_steps, program, constants, make_distillation_example, terms=("paired_points",))


def segmentation_task(config: ml_collections.ConfigDict, workdir: epath.Path, mesh: Mesh) -> Task:
    """A head, or the whole network, learns the labels of points.

    Raises:
      RecordError, CheckpointError, WorkdirError, WeightFileError, ValueError: see the messages.
    """
    del workdir
    sources = _sources(config)
    config = _with_lengths_in_steps(config, sum(map(len, sources)) // config.batch_size)
    total_steps = number_of_steps(config, sum(map(len, sources)))
    program = segmentation_program(config, total_steps, mesh)
    if not config.train_backbone and not config.initial_weights:
        logging.warning("a random backbone is probed: name a distilled one with --config.initial_weights")
    # Missing records and batches that do not divide are told now, not at the first evaluation.
    names = config.datasets if config.eval_every else ()
    evaluators = [SegmentationEvaluator(program.student, config, mesh, name) for name in names]

    def evaluate(state: State) -> dict[str, float]:
        scores = {}
        for evaluator in evaluators:
            result = evaluator.run(state["parameters"], state["statistics"]).scores
            scores[f"{evaluator.name}/miou"] = 100.0 * result.mean_iou
            scores[f"{evaluator.name}/accuracy"] = 100.0 * result.accuracy
        return scores

    return _task(
        config,
        sources,
        total_steps,
        program,
        {},
        make_segmentation_example,
        terms=("cross_entropy", "lovasz"),
        evaluate=evaluate,
    )


def abstract_distillation(config: ml_collections.ConfigDict, mesh: Mesh, steps: int) -> AbstractProgram:
    """The distillation step with the teacher in it.

    Raises:
      FileNotFoundError, ValueError: see `abstract_teacher` and `distillation_program`.
    """
    config = _with_lengths_in_steps(config, round(steps / config.epochs))
    teacher = abstract_teacher(config.teacher)
    program = distillation_program(config, teacher, steps, mesh)
    batch = _abstract_batch(config, mesh, make_distillation_example, training=True)
    constants = on_every_device(teacher.parameters, mesh)
    return AbstractProgram("training step", program.step, (abstract_state(program), batch, constants))


def abstract_segmentation(config: ml_collections.ConfigDict, mesh: Mesh, steps: int) -> AbstractProgram:
    """The step of probing, fine-tuning or training with labels.

    Raises:
      ValueError: see `segmentation_program`.
    """
    config = _with_lengths_in_steps(config, round(steps / config.epochs))
    program = segmentation_program(config, steps, mesh)
    batch = _abstract_batch(config, mesh, make_segmentation_example, training=True)
    return AbstractProgram("training step", program.step, (abstract_state(program), batch, {}))


def abstract_inference(config: ml_collections.ConfigDict, mesh: Mesh) -> AbstractProgram:
    """Features or logits of every point of whole sweeps."""
    student = make_lidar_student(config)

    def predict(parameters: Any, statistics: Any, batch: dict[str, jax.Array]) -> jax.Array:
        model = merge_model(student.graph, parameters, statistics)
        return model(*network_input(batch, config.points.neighbors))

    batch = _abstract_batch(config, mesh, make_segmentation_example, training=False)
    del batch["point_labels"]
    arguments = *on_every_device((student.abstract_parameters, student.abstract_statistics), mesh), batch
    function = jax.jit(predict, out_shardings=NamedSharding(mesh, partition_spec("batch")))
    return AbstractProgram("inference step", function, arguments)


def describe_sizes(config: ml_collections.ConfigDict) -> str:
    """Points, channels and blocks."""
    points = lidar_settings(config, training=True).capacity
    return f"{points} points, {config.model.depth} blocks of {config.model.channels} channels"


def _abstract_batch(
    config: ml_collections.ConfigDict, mesh: Mesh, make_example: MakeExample, *, training: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a training batch, with room for what is trained on or for whole sweeps."""
    dataset = dataset_named(next(iter(config.datasets)))
    settings = dataclasses.replace(lidar_settings(config, training=training), labelled=False)
    # With a generator: without one the examples are those of evaluation, which keeps the whole sweep beside.
    example = make_example(blank_key_frame(len(dataset.cameras)), dataset, settings, np.random.default_rng(0))
    return abstract_batch(example, config.batch_size, mesh)


def _sources(config: ml_collections.ConfigDict) -> list[LidarSource]:
    sources = lidar_sources(config)
    for source, share in zip(sources, mixture_shares(sources), strict=True):
        logging.info("%s: %d key frames, %.1f %% of the examples", source.dataset.name, len(source), 100 * share)
    return sources


def _with_lengths_in_steps(config: ml_collections.ConfigDict, steps_per_epoch: int) -> ml_collections.ConfigDict:
    """The configuration with lengths of the schedule that it has in epochs as steps.

    Raises:
      ValueError: a length is given in epochs and in steps.
    """
    config = config.copy_and_resolve_references()
    steps_per_epoch = max(steps_per_epoch, 1)
    with config.optim.unlocked():
        for phase in ("warmup", "cooldown"):
            if config.optim.get(f"{phase}_epochs", 0.0):
                if config.optim.get(f"{phase}_steps", 0):
                    raise ValueError(
                        f"config.optim.{phase}_epochs = {config.optim[f'{phase}_epochs']} and {phase}_steps = "
                        f"{config.optim[f'{phase}_steps']}: set one of them to 0"
                    )
                config.optim[f"{phase}_steps"] = round(config.optim[f"{phase}_epochs"] * steps_per_epoch)
        if config.optim.get("timescale_epochs", 0.0):
            config.optim.timescale_steps = config.optim.timescale_epochs * steps_per_epoch
    return config


def _task(
    config: ml_collections.ConfigDict,
    sources: list[LidarSource],
    total_steps: int,
    program: TrainingProgram,
    constants: Any,
    make_example: MakeExample,
    *,
    terms: tuple[str, ...],
    evaluate: Callable[[State], dict[str, float]] | None = None,
) -> Task:
    def make_state() -> State:
        parameters, statistics = jax.device_get(build_lidar_student(config))
        return jax.device_put(initial_state(parameters, statistics, program.optimizer), program.shardings)

    def batches(first_step: int) -> Iterator[dict[str, np.ndarray]]:
        return training_batches(
            sources,
            make_example,
            lidar_settings(config, training=True),
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=first_step,
            host=jax.process_index(),
            hosts=jax.process_count(),
            workers=config.data.workers,
        )

    def sample_tokens(arrays: Mapping[str, np.ndarray]) -> list[str]:
        return [
            f"{sources[number].dataset.name}:{sources[number].key_frames.sample_tokens[index]}"
            for number, index in zip(arrays["dataset_index"], arrays["record_index"], strict=True)
        ]

    return Task(
        key_frames=sum(map(len, sources)),
        total_steps=total_steps,
        fingerprints={source.dataset.name: source.key_frames.fingerprint for source in sources},
        step=program.step,
        constants=constants,
        abstract_state=program.abstract_state,
        shardings=program.shardings,
        make_state=make_state,
        batches=batches,
        host_arrays=("record_index", "dataset_index"),
        sample_tokens=sample_tokens,
        capacities={"points_left_out": "config.points.capacity"},
        learning_rate=make_schedule(config.optim, config.optim.learning_rate, total_steps),
        terms=terms,
        evaluate=evaluate,
    )

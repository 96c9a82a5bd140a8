"""Trains POP-3D: python -m pop3d_jax.train --config configs/demo.py --workdir WORKDIR

Any field of the configuration can be given on the command line: --config.optim.learning_rate=1e-4
The same command resumes a run that was stopped: it goes on from the newest checkpoint with the numbers that an
unbroken run would have had. WORKDIR holds config.json, manifest.json, metrics.jsonl, tensorboard/, checkpoints/.
"""

import collections
import json
import math
import time

import jax
import ml_collections
from absl import flags, logging
from etils import epath
from flax import nnx
from ml_collections import config_flags

from pop3d_jax import workdir as workdirs
from pop3d_jax.checkpoint import CheckpointError, Checkpoints
from pop3d_jax.commands import run, stop_with_message
from pop3d_jax.data.pipeline import ExampleSettings, evaluation_batches, training_batches
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.data.teacher_cache import TeacherCache
from pop3d_jax.evaluator import Evaluator, headline
from pop3d_jax.experiment import build_student, example_settings, make_student
from pop3d_jax.optim import cosine_with_warmup, make_optimizer, parameter_groups
from pop3d_jax.progress import progress
from pop3d_jax.sharding import make_mesh, replicated, shard_batch
from pop3d_jax.step import initial_state, make_train_step
from pop3d_jax.teacher import load_teacher, teacher_fingerprint
from pop3d_jax.torch_files import WeightFileError


class NonFiniteLossError(Exception):
    """The loss is NaN or infinite; the message names the step, its sample tokens and the last good checkpoint."""


def train(
    config: ml_collections.ConfigDict, workdir: epath.PathLike, stop_after: int | None = None
) -> dict[str, float]:
    """Trains, or goes on training, until the configured number of steps.

    Args:
      config: the experiment.
      workdir: folder of the run.
      stop_after: stop early, when this many steps are done.

    Returns:
      The metrics of the last step logged.

    Raises:
      NonFiniteLossError: the loss is no longer finite.
      WorkdirError, CheckpointError, RecordError, ValueError: see the messages.
    """
    workdir = epath.Path(workdir)

    # ------------------------------------------------------------------------------------------ data
    mesh = make_mesh(config.mesh.data, config.mesh.camera)
    source = RecordSource(config.data.records, config.data.train_split)
    steps_per_epoch = max(len(source) // config.batch_size, 1)
    total_steps = config.total_steps or math.ceil(config.epochs * steps_per_epoch)
    last_step = min(total_steps, stop_after or total_steps)
    settings: ExampleSettings = example_settings(config, training=True)
    logging.info(
        "%d key frames, batch %d, %d steps (%.1f epochs), mesh %s",
        len(source),
        config.batch_size,
        total_steps,
        total_steps / steps_per_epoch,
        dict(mesh.shape),
    )

    # --------------------------------------------------------------------------------------- teacher
    teacher = load_teacher(config.teacher)
    if teacher.feature_dim != config.model.feature_dim:
        raise ValueError(
            f"teacher {config.teacher.path} has features of width {teacher.feature_dim}, the student's head has "
            f"{config.model.feature_dim}: set --config.model.feature_dim={teacher.feature_dim}"
        )
    cache = None
    if config.teacher.cache:
        cache = TeacherCache(config.teacher.cache, config.data.train_split, source.fingerprint)
        same_settings = all(
            cache.index.teacher[name] == value
            for name, value in (
                ("name", config.teacher.name),
                ("variant", config.teacher.variant),
                ("image_hw", list(config.data.teacher_image_hw)),
            )
        )
        if not same_settings or cache.index.teacher_fingerprint != teacher_fingerprint(teacher):
            raise ValueError(
                f"the features in {config.teacher.cache} are of another teacher ({cache.index.teacher}) than "
                f"{config.teacher.path}, variant {config.teacher.variant}, at {config.data.teacher_image_hw}: make "
                "them again with data_prep.teacher_features, into another folder"
            )
    # With a cache the teacher only names the text space; its arrays stay off the devices.
    teacher_parameters = {} if cache else jax.device_put(teacher.parameters, replicated(mesh))

    # ------------------------------------------------------------------------------ model, optimiser
    student = make_student(config)
    groups = parameter_groups(student.abstract_parameters, student.is_frozen)
    optimizer = make_optimizer(config.optim, total_steps, groups)
    abstract_state = jax.eval_shape(
        lambda: initial_state(student.abstract_parameters, student.abstract_statistics, optimizer)
    )
    workdirs.prepare(workdir, config)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
    first_step = checkpoints.latest_step()
    if first_step is not None:
        logging.info("resuming from the checkpoint of step %d", first_step)
        state = checkpoints.restore(abstract_state, replicated(mesh))
    else:
        first_step = 0
        parameters, statistics = build_student(config, source, settings)
        state = jax.device_put(initial_state(parameters, statistics, optimizer), replicated(mesh))
    count = sum(leaf.size for leaf in jax.tree.leaves(state["parameters"]))
    logging.info("%.2f million parameters", count / 1e6)
    workdirs.write_manifest(
        workdir,
        seed=config.seed,
        data={config.data.train_split: source.fingerprint},
        step=first_step,
    )

    # ------------------------------------------------------------------------------------------ step
    train_step = jax.jit(
        make_train_step(
            student.graph,
            student.volume,
            teacher,
            optimizer,
            groups,
            loss_weights=config.loss.to_dict(),
            use_grid_mask=config.model.grid_mask,
            use_dropout=config.model.dropout > 0,
            seed=config.seed,
        ),
        donate_argnums=0,
        out_shardings=(replicated(mesh), replicated(mesh)),
    )
    schedule = cosine_with_warmup(
        config.optim.learning_rate,
        total_steps=total_steps,
        warmup_steps=config.optim.warmup_steps,
        warmup_start=config.optim.warmup_start,
        final=config.optim.final_learning_rate,
    )
    evaluator = None
    batches = training_batches(
        source,
        settings,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=first_step,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=config.data.workers,
        cache=cache,
    )
    writer = workdirs.MetricWriter(workdir, first_step)
    # Metrics are read one step late, so that the device never waits for the host.
    pending: collections.deque = collections.deque()
    logged: dict[str, float] = {}
    left_out = 0

    def check_finite() -> dict[str, float]:
        step, metrics, indices = pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not math.isfinite(values["total"]) or not math.isfinite(values["gradient_norm"]):
            tokens = [source.sample_tokens[index] for index in indices]
            checkpoints.wait()
            good = checkpoints.latest_step()
            raise NonFiniteLossError(
                f"the loss of step {step} is not finite: {values}\n  sample tokens of the batch: {tokens}\n"
                f"  last good checkpoint: {'none' if good is None else f'{checkpoints.directory}/{good}'}\n"
                "Lower --config.optim.learning_rate or look at these samples, then start the command again."
            )
        return values

    # ------------------------------------------------------------------------------------------ loop
    clock, clock_step = time.monotonic(), first_step
    for step in progress(range(first_step, last_step), last_step - first_step, "training"):
        batch = next(batches)
        indices = batch.pop("record_index")
        left_out += int(batch.pop("points_left_out").sum() + batch.pop("feature_points_left_out").sum())
        device_batch = shard_batch(batch, mesh)
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, device_batch, teacher_parameters)
        pending.append((step, metrics, indices))
        if len(pending) > 1:
            check_finite()
        done = step + 1

        if done % config.log_every == 0 or done == last_step:
            logged = check_finite()
            seconds = (time.monotonic() - clock) / (done - clock_step)
            clock, clock_step = time.monotonic(), done
            values = {f"train/{name}": value for name, value in logged.items()} | {
                "train/learning_rate": float(schedule(step)),
                "train/seconds_per_step": seconds,
                "train/points_left_out": left_out,
            }
            writer.write(done, values)
            logging.info(
                "step %d: loss %.4f (cross entropy %.4f, lovasz %.4f, feature %.5f), %.2f s a step",
                done,
                *(logged[name] for name in ("total", "cross_entropy", "lovasz", "feature")),
                seconds,
            )
        if done % config.eval_every == 0 or done == last_step:
            evaluator = evaluator or Evaluator(student, teacher.clip, mesh)
            eval_source = RecordSource(config.data.records, config.data.eval_split)
            results = evaluator.run(
                state["parameters"],
                state["statistics"],
                evaluation_batches(
                    eval_source,
                    example_settings(config, training=False),
                    batch_size=config.eval_batch_size,
                    host=jax.process_index(),
                    hosts=jax.process_count(),
                    workers=config.data.workers,
                ),
                -(-len(eval_source) // config.eval_batch_size),
            )
            scores = headline(results)
            writer.write(done, {f"eval/{name}": value for name, value in scores.items()})
            logging.info("step %d: %s", done, ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            clock, clock_step = time.monotonic(), done
        if done % config.checkpoint_every == 0 or done == last_step:
            if pending:
                check_finite()  # what is not finite is not saved
            checkpoints.save(done, state, json.loads(config.to_json()))

    # ------------------------------------------------------------------------------------------- end
    checkpoints.close()
    writer.close()
    if left_out:
        logging.warning(
            "%d points did not fit into the capacities and were left out: raise config.data.max_points or "
            "config.data.max_feature_points",
            left_out,
        )
    logging.info("checkpoint: %s/%d", checkpoints.directory, last_step)
    return logged


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    config_flags.DEFINE_config_file("config", None, "Experiment file, e.g. configs/demo.py.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://.")
    flags.DEFINE_integer(
        "stop_after",
        None,
        "Stop (with a checkpoint) when this many steps are done; the schedule stays that of the config.",
    )


def main(_: list[str]) -> None:
    if jax.process_count() > 1:
        logging.info("process %d of %d", jax.process_index(), jax.process_count())
    nnx.use_eager_sharding(False)
    with stop_with_message(
        NonFiniteLossError,
        workdirs.WorkdirError,
        CheckpointError,
        RecordError,
        WeightFileError,
        ValueError,
        FileNotFoundError,
    ):
        train(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.stop_after)


if __name__ == "__main__":
    _define_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    run(main)

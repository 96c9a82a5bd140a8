"""What labels, the Lovász loss and the metrics take of a training step.

    python -m benchmarks.step_shares [--config configs/demo.py] [--config.data.records=RECORDS]

The step is the experiment's own, on its first batch; the parts are jitted functions of the same arrays: the training
target; cross entropy with Lovász and its gradient (and cross entropy alone, the difference being Lovász); and the
evaluation's occupancy score with the labels it needs, which a training step does not even have. The teacher runs in the
step. All run in turns, in one process; medians of --repeats rounds. By default the demo's step, the hardest case: a
small network in front of a grid of 20,000 voxels.
"""

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from benchmarks.measure import medians_in_turns
from benchmarks.report import Table
from pop3d_jax.data.pipeline import training_batches
from pop3d_jax.data.records import RecordSource
from pop3d_jax.experiment import build_student, example_settings
from pop3d_jax.labels import evaluation_labels, occupancy_tpvformer
from pop3d_jax.losses import cross_entropy, lovasz_softmax
from pop3d_jax.metrics import confusion_matrix
from pop3d_jax.program import training_program
from pop3d_jax.sharding import make_mesh, shard_batch
from pop3d_jax.step import initial_state
from pop3d_jax.teacher import load_teacher

_CONFIG = config_flags.DEFINE_config_file("config", "configs/demo.py", "experiment")
_SPLIT = flags.DEFINE_string("split", "train", "of the records")
_REPEATS = flags.DEFINE_integer("repeats", 7, "timed rounds", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "folder of step_shares.json")


def main(_: list[str]) -> None:
    config = _CONFIG.value
    mesh = make_mesh(1, 1, jax.devices()[:1])
    settings = example_settings(config, training=True)
    source = RecordSource(config.data.records, _SPLIT.value)
    teacher = load_teacher(config.teacher)
    program = training_program(config, teacher, 100, mesh)
    state = initial_state(*build_student(config, source, settings), program.optimizer)
    batch = shard_batch(next(training_batches(source, settings, batch_size=config.batch_size, seed=0)), mesh)
    volume = program.student.volume
    with jax.set_mesh(mesh):
        step = jax.jit(lambda *arguments: program.step(*arguments))
        labels = jax.jit(jax.vmap(lambda points, mask: occupancy_tpvformer(points, mask, volume)))
        target = labels(batch["points"], batch["point_mask"])
        logits = jax.random.normal(jax.random.key(0), (*target.shape, 2))

        def entropy(logits: jax.Array) -> jax.Array:
            return sum(cross_entropy(one, goal) for one, goal in zip(logits, target, strict=True))

        def both(logits: jax.Array) -> jax.Array:
            softmax = jax.nn.softmax(logits)
            return entropy(logits) + sum(lovasz_softmax(one, goal) for one, goal in zip(softmax, target, strict=True))

        judged = jax.jit(
            jax.vmap(lambda *example: evaluation_labels(*example, volume)["occupancy_eval"].astype(jnp.int32))
        )

        def count(logits: jax.Array, *example: jax.Array) -> jax.Array:
            return confusion_matrix(judged(*example), jnp.argmax(logits, -1).astype(jnp.int32), 2)

        example = (batch["points"], batch["point_labels"], batch["point_mask"])
        calls = (
            (step, (state, batch, teacher.parameters)),
            (labels, (batch["points"], batch["point_mask"])),
            (jax.jit(jax.grad(entropy)), (logits,)),
            (jax.jit(jax.grad(both)), (logits,)),
            (jax.jit(count), (logits, *example)),
        )
        whole, for_labels, for_entropy, for_both, for_metrics = medians_in_turns(calls, _REPEATS.value)
    table = Table("step_shares", ["part", "median", "share of the step"])
    for name, seconds in (
        ("whole training step", whole),
        ("labels", for_labels),
        ("Lovász, forward and backward", for_both - for_entropy),
        ("occupancy metric with its labels (evaluation only)", for_metrics),
    ):
        table.add(name, f"{seconds * 1e3:.2f} ms", f"{100 * seconds / whole:.1f} %")
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)

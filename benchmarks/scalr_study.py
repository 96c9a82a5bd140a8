"""ScaLR on a small world: what distillation is worth, on every data set alone and in a mixture.

    python -m benchmarks.scalr_study --records demo_scalr/records --teacher demo_scalr/tiny_clip --out demo_scalr/study

For each of --seeds seeds: the backbone of configs/demo_scalr.py is distilled from nuScenes' layout alone and from all
data sets, for the same number of steps. Then, on --probe_on, the same number of steps of linear probing each, on the
features of both and on those of a random backbone; and, beside it, the whole network is trained with the same labels.
mIoU over all points of the held-out sweeps; mean, and standard deviation over the seeds.

A run that is finished is not repeated: the command goes on where it was stopped.
"""

import json
import time
from pathlib import Path

import ml_collections
import numpy as np
from absl import flags, logging

from benchmarks.report import Table
from configs import demo_scalr, scalr_probe
from pop3d_jax.commands import run, stop_with_message
from pop3d_jax.data.records import RecordError
from pop3d_jax.train import train

# Name of a row: what its backbone is distilled from (None: nothing), and whether the backbone trains with the labels.
_ROWS = {
    "probe, random backbone": (None, False),
    "probe, distilled from one data set": ("one", False),
    "probe, distilled from the mixture": ("mixture", False),
    "all trained with labels": (None, True),
}


def distillation(seed: int, mixture: bool, steps: int) -> ml_collections.ConfigDict:
    """The experiment that makes a backbone."""
    config = demo_scalr.get_config("768" if mixture else flags.FLAGS.probe_on)
    config.seed = seed
    config.total_steps = config.checkpoint_every = steps
    config.data.records, config.teacher.path = flags.FLAGS.records, flags.FLAGS.teacher
    return config


def segmentation(seed: int, backbone: Path | None, steps: int, *, train_backbone: bool) -> ml_collections.ConfigDict:
    """The experiment that judges a backbone, or trains one with labels."""
    name = flags.FLAGS.probe_on
    small, config = demo_scalr.get_config(name), scalr_probe.get_config(name)
    classes = config.model.output_channels
    config.points, config.model, config.data = small.points, small.model, small.data
    config.points.capacity, config.points.raw_capacity = 24_576, 65_536  # evaluation sees whole sweeps
    config.model.head, config.model.output_channels = "probe", classes
    config.data.records = flags.FLAGS.records
    config.seed, config.batch_size = seed, small.batch_size
    config.total_steps = config.checkpoint_every = config.eval_every = steps
    config.train_backbone = train_backbone
    config.initial_weights = str(backbone or "")
    config.optim.learning_rate = 2e-3 if train_backbone else 1e-2  # few steps: probing's published rate is too slow
    config.optim.warmup_epochs, config.optim.warmup_steps = 0.0, steps // 10
    config.log_every, config.eval_batch_size = small.log_every, small.eval_batch_size
    return config


def score(workdir: Path, config: ml_collections.ConfigDict) -> float:
    """Trains, unless it is done, and reads the mIoU on the held-out sweeps in percent."""
    train(config, workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return next(row[key] for row in reversed(rows) for key in row if key.endswith("/miou"))


def _define_flags() -> None:
    flags.DEFINE_string("records", "demo_scalr/records", "Folder with the records of each data set.")
    flags.DEFINE_string("teacher", "demo_scalr/tiny_clip", "CLIP folder.")
    flags.DEFINE_string("out", "demo_scalr/study", "Folder of the runs.")
    flags.DEFINE_string("probe_on", "nuscenes", "Data set of the labels, and of the distillation from one.")
    flags.DEFINE_integer("seeds", 3, "How many.", lower_bound=1)
    flags.DEFINE_integer("steps", 500, "Of each distillation.", lower_bound=1)
    flags.DEFINE_integer("probe_steps", 250, "Of each training with labels.", lower_bound=1)
    flags.DEFINE_string("json", None, "Folder of scalr_study.json.")


def main(_: list[str]) -> None:
    values, start = flags.FLAGS, time.monotonic()
    out = Path(values.out)
    scores: dict[str, list[float]] = {name: [] for name in _ROWS}
    with stop_with_message(RecordError, ValueError, FileNotFoundError):
        for seed in range(values.seeds):
            backbones: dict[str | None, Path | None] = {None: None}
            for source in ("one", "mixture"):
                backbones[source] = out / f"{source}-{seed}"
                train(distillation(seed, source == "mixture", values.steps), backbones[source])
            for number, (name, (source, train_backbone)) in enumerate(_ROWS.items()):
                config = segmentation(seed, backbones[source], values.probe_steps, train_backbone=train_backbone)
                scores[name].append(score(out / f"labels-{number}-{seed}", config))
                logging.info("seed %d, %s: mIoU %.2f", seed, name, scores[name][-1])
    random = float(np.mean(scores["probe, random backbone"]))
    table = Table("scalr_study", ["backbone", "mIoU", "spread", "times random", "of each seed"])
    for name, of_seeds in scores.items():
        mean, spread = float(np.mean(of_seeds)), float(np.std(of_seeds))
        each = ", ".join(f"{value:.1f}" for value in of_seeds)
        table.add(name, f"{mean:.2f}", f"{spread:.2f}", f"{mean / random:.2f}", each)
    results = {"miou": scores, "steps": values.steps, "probe_steps": values.probe_steps, "probe_on": values.probe_on}
    results["minutes"] = (time.monotonic() - start) / 60
    (out / "results.json").write_text(json.dumps(results, indent=2))
    table.write(values.json)


if __name__ == "__main__":
    _define_flags()
    run(main)

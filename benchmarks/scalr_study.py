"""ScaLR on a small world: what distillation is worth, from one data set and from a mixture.

    python -m benchmarks.scalr_study --records demo_scalr/records --teacher demo_scalr/tiny_clip --out demo_scalr/study

For each of --seeds seeds the backbone of configs/demo_scalr.py is distilled from nuScenes' sensors alone and from those
of all data sets, for the same number of steps. Then labels come in, for the same number of steps each: linear probing
on the features of both and on those of a random backbone, with the labels of nuScenes' layout and with those of
SemanticKITTI's, whose sensor one of the two backbones has never seen; and a training of the whole network. The score is
mIoU over all points of the held-out sweeps; its mean and standard deviation over the seeds.

A run that is finished is not repeated: the command goes on where it was stopped.
"""

import dataclasses
import json
import os
import time
from pathlib import Path

import jax
import ml_collections
import numpy as np
from absl import flags, logging

from benchmarks.report import Table
from configs import demo_scalr, scalr_probe
from data_prep import parallel
from pop3d_jax.commands import run, stop_with_message
from pop3d_jax.data.records import RecordError
from pop3d_jax.train import train

_DISTILLED_ON = "nuscenes"
# Row of the table: whose labels, what the backbone is distilled from ("": nothing), and what trains with the labels.
_ROWS = {
    "nuScenes: probe on a random backbone": ("nuscenes", "", "head"),
    "nuScenes: probe on nuScenes' backbone": ("nuscenes", "one", "head"),
    "nuScenes: probe on the mixture's": ("nuscenes", "mixture", "head"),
    "nuScenes: all trained with labels": ("nuscenes", "", "all"),
    "SemanticKITTI: probe on a random backbone": ("semantic_kitti", "", "head"),
    "SemanticKITTI: probe on nuScenes' backbone": ("semantic_kitti", "one", "head"),
    "SemanticKITTI: probe on the mixture's": ("semantic_kitti", "mixture", "head"),
}
# Evaluation sees whole sweeps: rows of the arrays of thinned points and of all points.
_CAPACITIES = {"nuscenes": (16_384, 65_536), "semantic_kitti": (32_768, 163_840)}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One run of the study.

    Attributes:
      records, teacher: folders.
      out: of all runs.
      seed: of the run.
      steps: of its training.
      source: what its backbone is distilled from: "", "one" or "mixture".
      labels: data set whose labels are used; "" for the distillation itself.
      trains: what trains with labels, "head" or "all".
      cached_programs: folder of compiled programs, shared by the processes.
    """

    records: str
    teacher: str
    out: str
    seed: int
    steps: int
    source: str
    labels: str = ""
    trains: str = ""
    cached_programs: str = ""

    @property
    def workdir(self) -> Path:
        """Folder of this run."""
        names = (self.labels, self.trains, self.source or "random", str(self.seed))
        return Path(self.out) / "-".join(filter(None, names))

    def config(self) -> ml_collections.ConfigDict:
        """The experiment of this run."""
        if self.labels:
            config = self._with_labels()
        else:
            config = demo_scalr.get_config("768" if self.source == "mixture" else _DISTILLED_ON)
            config.teacher.path = self.teacher
        config.seed = self.seed
        config.data.records = self.records
        config.total_steps = config.checkpoint_every = self.steps
        return config

    def _with_labels(self) -> ml_collections.ConfigDict:
        small, config = demo_scalr.get_config(self.labels), scalr_probe.get_config(self.labels)
        classes = config.model.output_channels
        config.points, config.model, config.data = small.points, small.model, small.data
        config.points.capacity, config.points.raw_capacity = _CAPACITIES[self.labels]
        config.model.head, config.model.output_channels = "probe", classes
        config.batch_size, config.eval_every = small.batch_size, self.steps
        config.train_backbone = self.trains == "all"
        if self.source:
            config.initial_weights = str(dataclasses.replace(self, labels="", trains="").workdir)
        # In so few steps the published rate of probing would move the head too little.
        config.optim.learning_rate = 2e-3 if config.train_backbone else 1e-2
        config.optim.warmup_epochs, config.optim.warmup_steps = 0.0, self.steps // 10
        config.log_every, config.eval_batch_size = small.log_every, small.eval_batch_size
        return config


def finish(piece: Piece) -> float:
    """Trains, unless it is done; returns the mIoU on the held-out sweeps in percent, NaN for a distillation."""
    logging.set_verbosity(logging.ERROR)  # several runs at a time: their lines would mix
    if piece.cached_programs:
        jax.config.update("jax_compilation_cache_dir", piece.cached_programs)
    train(piece.config(), piece.workdir)
    rows = [json.loads(line) for line in (piece.workdir / "metrics.jsonl").read_text().splitlines()]
    return next((row[key] for row in reversed(rows) for key in row if key.endswith("/miou")), float("nan"))


def _define_flags() -> None:
    flags.DEFINE_string("records", "demo_scalr/records", "Folder with the records of each data set.")
    flags.DEFINE_string("teacher", "demo_scalr/tiny_clip", "CLIP folder.")
    flags.DEFINE_string("out", "demo_scalr/study", "Folder of the runs.")
    flags.DEFINE_integer("seeds", 3, "How many.", lower_bound=1)
    flags.DEFINE_integer("steps", 300, "Of each distillation.", lower_bound=1)
    flags.DEFINE_integer("label_steps", 200, "Of each training with labels.", lower_bound=10)
    flags.DEFINE_integer("workers", os.cpu_count(), "Runs at a time, a process each.", lower_bound=1)
    flags.DEFINE_string("json", None, "Folder of scalr_study.json.")


def main(_: list[str]) -> None:
    values, start = flags.FLAGS, time.monotonic()
    cache = jax.config.jax_compilation_cache_dir or ""
    common = (values.records, values.teacher, values.out)
    with stop_with_message(RecordError, ValueError, FileNotFoundError, parallel.WorkerError):
        distillations = [
            Piece(*common, seed, values.steps, source, cached_programs=cache)
            for seed in range(values.seeds)
            for source in ("one", "mixture")
        ]
        parallel.run(finish, distillations, values.workers, "distilling")
        judged = [
            Piece(*common, seed, values.label_steps, source, labels, trains, cache)
            for labels, source, trains in _ROWS.values()
            for seed in range(values.seeds)
        ]
        found = parallel.run(finish, judged, values.workers, "training with labels")
    scores = dict(zip(_ROWS, np.reshape(found, (len(_ROWS), values.seeds)), strict=True))
    minutes = (time.monotonic() - start) / 60
    table = Table(
        "scalr_study", ["labels: what is trained", "mIoU", "spread", "times random", "each seed"], minutes=minutes
    )
    for name, row in scores.items():
        random = scores[f"{name.partition(':')[0]}: probe on a random backbone"].mean()
        each = ", ".join(f"{value:.2f}" for value in row)
        table.add(name, f"{row.mean():.2f}", f"{row.std():.2f}", f"{row.mean() / random:.2f}", each)
    table.write(values.json or values.out)


if __name__ == "__main__":
    _define_flags()
    run(main)

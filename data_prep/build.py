"""Builds records from a data set in its official layout, and verifies them.

    python -m data_prep.build --source DIR --version v1.0-mini --split mini_train --out RECORDS
    python -m data_prep.build --dataset semantic_kitti --source DIR --split train --out RECORDS
    python -m data_prep.build --check --out RECORDS

Data sets: nuscenes, semantic_kitti, and pandar64 and pandar_gt, which both are read from PandaSet's folder.

Builds run in parallel over scenes. One that was interrupted goes on where it stopped when the same command is given
again, and does nothing where all is done. Several splits of one version of one data set share a
records folder.

Exit status: 0 done, 1 stopped by an error (or --check found problems), 3 done but key frames were skipped.
"""

import os

from absl import app, flags, logging
from etils import epath

from data_prep import check_records, parallel, splits
from data_prep.layouts import DATASETS
from data_prep.split_build import BuildError, build_split
from data_prep.table_rows import SourceError
from pop3d_jax.commands import run
from pop3d_jax.data.shards import RecordError

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_SKIPPED = 3


def _check() -> int:
    checks = check_records.check_records(flags.FLAGS.out, flags.FLAGS.split, flags.FLAGS.workers)
    print(check_records.check_table(checks))
    problems = [problem for check in checks for problem in check.problems]
    for problem in problems:
        logging.error("%s", problem)
    return EXIT_ERROR if problems else EXIT_DONE


def _build() -> int:
    needed = ("source", "version", "split") if flags.FLAGS.dataset == "nuscenes" else ("source", "split")
    missing = [name for name in needed if flags.FLAGS[name].value is None]
    if missing:
        raise app.UsageError(f"building needs {', '.join('--' + name for name in missing)}")
    index = build_split(
        flags.FLAGS.source,
        flags.FLAGS.version,
        flags.FLAGS.split,
        flags.FLAGS.out,
        dataset=flags.FLAGS.dataset,
        skip_errors=flags.FLAGS.on_error == "skip",
        workers=flags.FLAGS.workers,
        beam_options=flags.FLAGS.beam_option if flags.FLAGS.runner == "beam" else None,
    )
    size = sum(shard.bytes for shard in index.shards)
    count = sum(len(shard.offsets) for shard in index.shards)
    logging.info("%s: %d key frames in %d shards, %.1f MiB.", index.split, count, len(index.shards), size / 2**20)
    skipped = [entry for shard in index.shards for entry in shard.skipped]
    for entry in skipped:
        logging.warning("Skipped sample %s: %s", entry["sample_token"], entry["error"])
    if skipped:
        report = epath.Path(flags.FLAGS.out) / "build_report.json"
        logging.warning("%d key frames were skipped; they are listed in %s.", len(skipped), report)
        return EXIT_SKIPPED
    return EXIT_DONE


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    flags.DEFINE_enum("dataset", "nuscenes", DATASETS, "Data set, by the layout of its folder.")
    flags.DEFINE_string(
        "source",
        None,
        "Root of the data set, local or gs://: holds --version and samples/ (nuscenes), dataset/sequences/ "
        "(semantic_kitti), or the scenes 001, 002, ... (pandar64, pandar_gt).",
    )
    flags.DEFINE_enum("version", None, list(splits.SPLITS_OF_VERSION), "Folder of the tables; of nuscenes only.")
    flags.DEFINE_string(
        "split",
        None,
        "mini_train, mini_val (v1.0-mini); train, val (v1.0-trainval); test (v1.0-test). "
        "semantic_kitti: train, val, test. pandar64, pandar_gt: train, val.",
    )
    flags.DEFINE_string("out", None, "Records folder, local or gs://; made if it does not exist.", required=True)
    flags.DEFINE_enum(
        "on_error", "stop", ["stop", "skip"], "A key frame that cannot be read: stop, or leave it out and report it."
    )
    flags.DEFINE_integer("workers", os.cpu_count(), "Processes; each works on one scene.", lower_bound=1)
    flags.DEFINE_enum("runner", "local", ["local", "beam"], "Processes of this machine, or an Apache Beam pipeline.")
    flags.DEFINE_multi_string(
        "beam_option",
        [],
        "With --runner=beam, an option of Beam, for example --beam_option=--runner=DataflowRunner; may be repeated. "
        "None: the pipeline runs in this process.",
    )
    flags.DEFINE_bool("check", False, "Verify the records in --out (of --split, or all) instead of building.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"not a flag: {' '.join(argv[1:])}")
    try:
        return _check() if flags.FLAGS.check else _build()
    except (SourceError, BuildError, RecordError, splits.SplitError, parallel.WorkerError, OSError) as error:
        # Errors of the data set and of the folder say what to do; a traceback would only hide that.
        logging.error("%s", error)
        return EXIT_ERROR


if __name__ == "__main__":
    _define_flags()
    run(main)

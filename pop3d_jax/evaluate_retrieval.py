"""Scores a trained run on the retrieval benchmark: python -m pop3d_jax.evaluate_retrieval --workdir W --benchmark DIR

DIR is the unpacked archive that the authors publish (retrieval_anns_{train,val,test}.csv, annotations/*.npy). Its key
frames are looked up in the records by sample token; the benchmark's test split lies in nuScenes' test set, which is
another records folder: --records TRAINVAL_RECORDS,TEST_RECORDS. Prints the official table with 95 % intervals, the
teacher beside the student, and every query.
"""

import collections
import dataclasses
import io
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float, Int
from PIL import Image

from pop3d_jax.checkpoint import CheckpointError
from pop3d_jax.commands import run, stop_with_message, write_report
from pop3d_jax.data.pipeline import ExampleSettings, make_example
from pop3d_jax.data.records import KeyFrame, RecordError, RecordSource
from pop3d_jax.data.visibility import visible_pairs
from pop3d_jax.evaluator import TrainedRun, load_run
from pop3d_jax.experiment import example_settings
from pop3d_jax.images import network_images
from pop3d_jax.models.parameters import merge_model
from pop3d_jax.progress import progress
from pop3d_jax.protocol import retrieval_benchmark
from pop3d_jax.retrieval import Query, RetrievalError, embed_queries
from pop3d_jax.retrieval_benchmark import (
    Interval,
    QueryScore,
    available_splits,
    check_length,
    differing_entries,
    member_splits,
    read_benchmark,
    score_query,
    summarise,
)
from pop3d_jax.shared_flags import define_report_flags, define_run_flags
from pop3d_jax.teacher import Teacher, check_text_side, load_teacher, load_text_side
from pop3d_jax.torch_files import WeightFileError
from pop3d_jax.voxels import grid_coordinates
from pop3d_jax.workdir import WorkdirError

# Arrays grow in these steps, so that key frames share a compilation and nothing is ever left out.
_CAPACITY_STEP = 4096
_SHOWN_TOKENS = 3
# Exit status where key frames were skipped: the numbers are not those of the whole benchmark.
_SKIPPED_STATUS = 3


def find_key_frames(
    queries: Sequence[Query], records: Sequence[epath.PathLike], on_missing: str
) -> tuple[dict[str, tuple[RecordSource, int]], list[str]]:
    """Where the key frames of the queries lie.

    Args:
      queries: whose tokens are looked up.
      records: folders, all of whose finished splits are searched.
      on_missing: "fail" or "skip".

    Returns:
      Source and index of each token that was found; the tokens that were not.

    Raises:
      RetrievalError: tokens are missing and `on_missing` is not "skip".
      RecordError: a folder has no finished split.
    """
    sources = []
    for folder in map(epath.Path, records):
        names = sorted(path.name for path in folder.glob("index_*.json"))
        splits = [name.removeprefix("index_").removesuffix(".json") for name in names]
        if not splits:
            raise RecordError(
                f"{folder} has no finished split: build one with python -m data_prep.build --out {folder}"
            )
        sources += [RecordSource(folder, split) for split in splits]
    places = {token: (source, index) for source in sources for index, token in enumerate(source.sample_tokens)}
    wanted = list(dict.fromkeys(query.sample_token for query in queries))
    missing = [token for token in wanted if token not in places]
    if missing and on_missing != "skip":
        of_splits = sorted({query.split for query in queries if query.sample_token in set(missing)})
        raise RetrievalError(
            f"{len(missing)} of {len(wanted)} key frames of the benchmark are not in the records "
            f"{', '.join(map(str, records))} ({_some(missing)}; benchmark splits {', '.join(of_splits)}): build these "
            "splits with python -m data_prep.build (test is of v1.0-test: a folder of its own, --records A,B), choose "
            "other --splits, or pass --on_missing skip"
        )
    return {token: places[token] for token in wanted if token in places}, missing


def _some(tokens: Sequence[str]) -> str:
    """The first few of them."""
    return ", ".join([*tokens[:_SHOWN_TOKENS], *(["..."] if len(tokens) > _SHOWN_TOKENS else [])])


class PointFeatures:
    """Features of the student at all points of a sweep, and of its teacher at the visible ones."""

    def __init__(self, trained: TrainedRun, teacher: Teacher | None):
        """Prepares the jitted predictions.

        Args:
          trained: the student.
          teacher: None leaves it out.
        """
        self._trained = trained
        self._teacher = teacher
        config, student = trained.config, trained.student
        self._settings: ExampleSettings = dataclasses.replace(
            example_settings(config, training=False),
            teacher_image_hw=tuple(config.data.teacher_image_hw) if teacher else None,
        )

        def student_features(parameters: Any, statistics: Any, example: dict[str, jax.Array]) -> jax.Array:
            model = merge_model(student.graph, parameters, statistics)
            coordinates = grid_coordinates(example["points"], student.volume)
            output = model(
                network_images(example["images"]),
                example["lidar_to_image"],
                feature_points=coordinates,
                voxel_features=False,
            )
            return output.point_features[0]

        self._student_features = jax.jit(student_features)
        if teacher:
            self._teacher_features = jax.jit(teacher.point_features)

    def __call__(
        self, key_frame: KeyFrame
    ) -> tuple[Float[np.ndarray, "points dim"], Int[np.ndarray, " visible"], Float[np.ndarray, "visible dim"] | None]:
        """Looks at one key frame.

        Returns:
          The student's features in the order of the sweep; the index of each visible entry's point, cameras one
          after the other; the teacher's features at these entries, or None.
        """
        with Image.open(io.BytesIO(key_frame.images[0])) as image:  # reads the header only
            image_hw = (image.height, image.width)
        points = key_frame.points[:, :3]
        index, _, _ = visible_pairs(points, key_frame.intrinsics, key_frame.lidar_to_camera, image_hw)
        settings = dataclasses.replace(
            self._settings, max_points=_capacity(len(points)), max_feature_points=_capacity(len(index))
        )
        # With room for all, the entries of the example are those of `index`, in its order.
        example = {name: array[None] for name, array in make_example(key_frame, settings, None).items()}
        inputs = {name: example[name] for name in ("images", "lidar_to_image", "points")}
        features = self._student_features(self._trained.parameters, self._trained.statistics, inputs)
        if self._teacher is None:
            return np.asarray(features)[: len(points)], index, None
        targets = self._teacher_features(
            self._teacher.parameters,
            example.get("teacher_images", example["images"]),
            example["feature_cameras"],
            example["feature_pixels"],
        )
        return np.asarray(features)[: len(points)], index, np.asarray(targets[0])[: len(index)]


def _capacity(count: int) -> int:
    return max(1, -(-count // _CAPACITY_STEP)) * _CAPACITY_STEP


def evaluate_retrieval(
    workdir: epath.PathLike,
    benchmark: epath.PathLike,
    *,
    splits: Sequence[str] | None = None,
    records: Sequence[epath.PathLike] | None = None,
    step: int | None = None,
    on_missing: str = "fail",
    teacher: bool = True,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores a checkpoint on the benchmark.

    Args:
      workdir: folder of the run.
      benchmark: folder of the archive.
      splits: "train", "val", "test" or several in a row ("valtest"); by default all that the archive has.
      records: folders that hold the key frames, in any of their splits; the run's own by default.
      step: of the checkpoint; the newest by default.
      on_missing: "fail", or "skip" to leave out key frames that the records lack.
      teacher: whether the run's teacher is scored too.
      bootstrap_samples, seed: of the intervals.

    Returns:
      Everything the tables show, ready for JSON, values in percent; see `summarise` for the names.

    Raises:
      RetrievalError: files of the benchmark are missing or damaged, do not fit the sweeps, or name key frames that
        the records lack.
    """
    if on_missing not in ("fail", "skip"):
        raise ValueError(f"--on_missing={on_missing} must be fail or skip")
    splits = tuple(splits or available_splits(benchmark))
    queries = read_benchmark(benchmark, splits)
    trained = load_run(workdir, step)
    places, missing = find_key_frames(queries, records or [trained.config.data.records], on_missing)
    by_token = collections.defaultdict(list)
    for query in queries:
        if query.sample_token in places:
            by_token[query.sample_token].append(query)
    if not by_token:
        raise RetrievalError(f"no key frame of the splits {', '.join(splits)} of {benchmark} is in the records")

    named = trained.config.teacher
    check_text_side(named)
    loaded = load_teacher(named) if teacher else None
    clip = loaded.clip if loaded else load_text_side(named)
    text = embed_queries(queries, clip, epath.Path(workdir) / "text_cache")
    look = PointFeatures(trained, loaded)
    scores: list[QueryScore] = []
    differing, compared = [], 0
    for token, asked in progress(by_token.items(), len(by_token), "key frames"):
        source, index = places[token]
        key_frame = source[index]
        for query in asked:
            check_length(query, len(key_frame.points))
        features, visible, targets = look(key_frame)
        scores += [score_query(query, text[query.phrase], features, visible, targets) for query in asked]
        archive = asked[0].visible
        if archive is not None:
            compared += 1
            if differing_entries(visible, archive):
                differing.append(token)
    return {
        "workdir": str(workdir),
        "benchmark": str(benchmark),
        "step": trained.step,
        "teacher": f"{named.name} {named.get('weights') or named.path}" if teacher else None,
        "bootstrap_samples": bootstrap_samples,
        "seed": seed,
        "splits": {split: _percent(summarise(scores, split, bootstrap_samples, seed)) for split in splits},
        "queries": [_row(score) for score in scores],
        "missing_key_frames": missing,
        "visible_compared": compared,
        "visible_differing": differing,
    }


def _percent(summary: dict[str, Interval | int]) -> dict[str, Any]:
    def scaled(value: float | None) -> float | None:
        return None if value is None else 100.0 * value

    return {
        name: {
            "mean": scaled(value.mean),
            "low": scaled(value.low),
            "high": scaled(value.high),
            "queries": value.queries,
        }
        if isinstance(value, Interval)
        else value
        for name, value in summary.items()
    }


def _row(score: QueryScore) -> dict[str, Any]:
    row = dataclasses.asdict(score)
    for name in ("student", "student_visible", "teacher_visible"):
        row[name] = None if row[name] is None else 100.0 * row[name]
    return row


def format_tables(report: dict[str, Any], per_query: bool = True) -> str:
    """The report as a person reads it.

    Args:
      report: from `evaluate_retrieval`.
      per_query: whether every query gets a line.
    """
    published = retrieval_benchmark()
    lines = [f"{report['workdir']}, step {report['step']}, benchmark {report['benchmark']}"]
    if report["teacher"]:
        lines.append(f"teacher: {report['teacher']}")
    for split, table in report["splits"].items():
        lines += ["", f"{split}: {table['queries']} queries in {table['key_frames']} key frames"]
        lines.append(f"{'percent, [95 % interval]':<32}{'mAP':>22}{'mAP visible':>24}")
        lines.append(f"{'POP-3D':<32}{_cell(table['student']):>22}{_cell(table['student_visible']):>24}")
        if report["teacher"]:
            lines.append(f"{'teacher':<32}{'-':>22}{_cell(table['teacher_visible']):>24}")
            lines.append(f"{'POP-3D - teacher, paired':<32}{'-':>22}{_cell(table['difference_visible']):>24}")
        lines.append(
            f"{'chance (share that answers)':<32}{_cell(table['chance']):>22}{_cell(table['chance_visible']):>24}"
        )
        if table["queries"] == _published_queries(published, split):
            numbers = published["expected_map"][split]
            lines.append(f"{'published: POP-3D':<32}{numbers['pop3d']:>22.1f}{numbers['pop3d_visible']:>24.1f}")
            lines.append(f"{'published: MaskCLIP+':<32}{'-':>22}{numbers['maskclip_visible']:>24.1f}")
        if table["undefined"] or table["undefined_visible"]:
            lines.append(
                f"left out of the means: {table['undefined']} queries that no point answers, "
                f"{table['undefined_visible']} that no visible one does"
            )
    lines += [
        "",
        f"Intervals: {report['bootstrap_samples']} bootstrap samples of the queries, seed {report['seed']}.",
        "A difference whose interval holds 0 may be noise.",
        "Visible points that two cameras see count twice, as official.",
    ]
    if report["visible_compared"]:
        same = report["visible_compared"] - len(report["visible_differing"])
        lines.append(
            f"The archive's own visible points: the same in {same} of {report['visible_compared']} key frames."
        )
    if report["missing_key_frames"]:
        missing = report["missing_key_frames"]
        lines.append(f"SKIPPED: {len(missing)} key frames that the records lack ({_some(missing)})")
    if per_query:
        header = (
            f"{'phrase':<36}{'split':<7}{'sample':<10}{'answer':>8}{'chance':>8}{'AP':>8}{'visible':>9}{'teacher':>9}"
        )
        lines += ["", header]
        for row in report["queries"]:
            lines.append(
                f"{row['phrase'][:35]:<36}{row['split']:<7}{row['sample_token'][:8]:<10}{row['matching']:>8}"
                f"{100.0 * row['matching'] / row['points']:>8.2f}"
                f"{_number(row['student']):>8}{_number(row['student_visible']):>9}{_number(row['teacher_visible']):>9}"
            )
    return "\n".join(lines)


def _published_queries(published: dict[str, Any], split: str) -> int | None:
    """How many queries the published table of a split has; None where there is no such table."""
    if split not in published["expected_map"]:
        return None
    return sum(published["expected_counts"][member] for member in member_splits(split))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cell(interval: dict[str, Any]) -> str:
    if interval["mean"] is None:
        return "-"
    return f"{interval['mean']:.1f} [{interval['low']:.1f}, {interval['high']:.1f}]"


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    define_run_flags()
    define_report_flags()
    flags.DEFINE_string("benchmark", None, "Unpacked folder of the retrieval benchmark (retrieval_anns_*.csv).")
    flags.DEFINE_list("splits", None, "train, val, test, or several in a row (valtest); all there are by default.")
    flags.DEFINE_list(
        "records", None, "Folders of the records, all splits of which are searched; the run's by default."
    )
    flags.DEFINE_enum(
        "on_missing", "fail", ["fail", "skip"], "Key frames that the records lack: stop, or leave out and exit with 3."
    )
    flags.DEFINE_bool("teacher", True, "Also score the run's teacher at the visible points.")
    flags.DEFINE_bool("per_query", True, "Print a line for every query.")
    flags.DEFINE_integer("bootstrap_samples", 10_000, "Redrawn sets of queries for the intervals.", lower_bound=100)
    flags.DEFINE_integer("seed", 0, "Of the bootstrap.")


def main(_: list[str]) -> None:
    with stop_with_message(
        WorkdirError, CheckpointError, RecordError, RetrievalError, WeightFileError, ValueError, FileNotFoundError
    ):
        report = evaluate_retrieval(
            flags.FLAGS.workdir,
            flags.FLAGS.benchmark,
            splits=flags.FLAGS.splits,
            records=flags.FLAGS.records,
            step=flags.FLAGS.step,
            on_missing=flags.FLAGS.on_missing,
            teacher=flags.FLAGS.teacher,
            bootstrap_samples=flags.FLAGS.bootstrap_samples,
            seed=flags.FLAGS.seed,
        )
        print(format_tables(report, flags.FLAGS.per_query))
        write_report(report, flags.FLAGS.out)
    if report["missing_key_frames"]:
        sys.exit(_SKIPPED_STATUS)


if __name__ == "__main__":
    _define_flags()
    flags.mark_flags_as_required(["workdir", "benchmark"])
    run(main)

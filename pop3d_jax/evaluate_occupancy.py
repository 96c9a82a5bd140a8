r"""Scores semantic occupancy on Occ3D-nuScenes' grid by any rule that is in use, ours and anybody's:

    python -m pop3d_jax.evaluate_occupancy --ground_truth OCC3D/gts --predictions RUN --all
    python -m pop3d_jax.evaluate_occupancy --ground_truth OCC3D/gts --split val --predictions DUMPS --mask camera \
        --rule challenge

Predictions are a workdir of pop3d_jax.train (the TPV planes are read at Occ3D's voxel centres), a store of
pop3d_jax.export, or a folder of .npz files in a layout that other methods write (pop3d_jax/occ3d/predictions.py).
RayIoU needs the lidar's poses, which --records give (a run's own by default). --ground_truth=accumulated builds labels
from the records' own sweeps where there is no Occ3D at hand: such scores are not to be set beside Occ3D's.
docs/occupancy.md explains rules, masks and prompts.
"""

import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float64

from data_prep.splits import SplitError
from pop3d_jax.checkpoint import CheckpointError
from pop3d_jax.commands import run, stop_with_message, write_report
from pop3d_jax.data.boxes import read_boxes
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.data.shards import skipped_tokens
from pop3d_jax.grids.store import GridStoreError
from pop3d_jax.occ3d.accumulated import AccumulatedGroundTruth
from pop3d_jax.occ3d.frames import GroundTruth, choose_frames
from pop3d_jax.occ3d.grid import MASKS, OCC3D_VOLUME
from pop3d_jax.occ3d.ground_truth import Occ3DGroundTruth
from pop3d_jax.occ3d.label_files import OccupancyFileError
from pop3d_jax.occ3d.poses import check_poses, origins_by_token, poses_of_records
from pop3d_jax.occ3d.predictions import PredictionFiles
from pop3d_jax.occ3d.prompts import PROMPT_SETS, PromptSet, prompt_set, read_prompt_file
from pop3d_jax.occ3d.rays import cast_rays, ray_directions
from pop3d_jax.occ3d.report import RAYIOU, RULE_NAMES, format_report, rows_of
from pop3d_jax.occ3d.sources import LABEL_SETS, Scored, ScoredFiles, ScoredRun, ScoredStore, is_run, is_store
from pop3d_jax.occ3d.store_labels import StoreLabels
from pop3d_jax.occ3d.student_labels import StudentLabels
from pop3d_jax.occ3d.tally import Tally
from pop3d_jax.progress import progress
from pop3d_jax.shared_flags import define_records_flags, define_report_flags
from pop3d_jax.workdir import WorkdirError, read_config

ACCUMULATED = "accumulated"


def evaluate_occupancy(
    ground_truth: str,
    predictions: str,
    *,
    rules: Sequence[str],
    masks: Sequence[str],
    records: str | None = None,
    split: str | None = None,
    prompts: str = PROMPT_SETS[0],
    absent_threshold: float | None = None,
    step: int | None = None,
    text_tower: str | None = None,
    vocabulary: int | None = None,
    free_space: int | None = None,
    partial: bool = False,
    method: str | None = None,
) -> dict[str, Any]:
    """Scores a prediction.

    Args:
      ground_truth: Occ3D's folder `gts`, or "accumulated".
      predictions: workdir, store, or folder of files.
      rules, masks: of `report.RULE_NAMES` and `grid.MASKS`.
      records, split: key frames that are scored, and whose poses RayIoU takes; a workdir's own by default. A split
        without records is one of nuScenes' official ones.
      prompts: name of a list (`PROMPT_SETS`), or a JSON file; for workdirs and stores.
      absent_threshold: see `StudentLabels`.
      step: checkpoint of a workdir; the newest by default.
      text_tower: for a store's phrases, if not the one it was exported with.
      vocabulary, free_space: see `PredictionFiles`.
      partial: score what there is where something is missing.
      method: how the report calls the prediction; the name of its folder by default.

    Returns:
      The report, ready for JSON; docs/occupancy.md has its fields.

    Raises:
      OccupancyFileError: files that cannot be scored, or not as a whole.
      RecordError, WorkdirError, CheckpointError, GridStoreError, SplitError, ValueError: of what they are named after.
    """
    if is_run(predictions):
        config = read_config(predictions)
        records, split = records or config.data.records, split or config.data.eval_split
    if records and not split:
        raise OccupancyFileError(f"--records={records} needs --split, such as --split=val")
    source = RecordSource(records, split) if records else None
    truth = _ground_truth(ground_truth, records, split, source)
    if is_run(predictions) or is_store(predictions):
        prompt_list = prompt_set(prompts) if prompts in PROMPT_SETS else read_prompt_file(prompts)
        scored = _own(predictions, source, prompt_list, absent_threshold, step, text_tower)
    else:
        scored = ScoredFiles(PredictionFiles(predictions, vocabulary=vocabulary, free_space=free_space))
    choice = choose_frames(
        truth,
        scored.sample_tokens,
        split=split,
        record_tokens=None if source is None else [*source.sample_tokens, *skipped_tokens(records, split)],
        partial=partial,
    )
    origins = _ray_origins(source, truth, choice.scored) if RAYIOU in rules else {}
    tallies = {name: Tally() for name in scored.label_sets}
    pairs = zip(choice.scored, scored.grids(choice.scored), strict=True)
    for token, (labels, unseen) in progress(pairs, len(choice.scored), "scoring key frames"):
        frame = truth[token]
        starts = origins.get(token)
        true_rays = None if starts is None else cast_rays(frame.semantics, starts, ray_directions(), OCC3D_VOLUME)
        for name, tally in tallies.items():
            tally.add(frame, labels[name], unseen=unseen, origins=starts, true_rays=true_rays)
    return {
        "method": method or epath.Path(predictions).name,
        "predictions": predictions,
        **scored.details,
        "ground_truth": truth.description,
        "ground_truth_folder": None if ground_truth == ACCUMULATED else ground_truth,
        "split": split,
        "frames": len(choice.scored),
        "scenes": choice.scenes,
        "partial": choice.is_partial,
        "missing": choice.missing,
        "predictions_left_out": choice.left_out,
        "labels": {name: LABEL_SETS[name] for name in tallies},
        "prompts": _described(scored.prompts),
        "absent_threshold": absent_threshold if scored.prompts else None,
        "scores": {name: rows_of(tally, rules, masks) for name, tally in tallies.items()},
        "command": shlex.join(["python", "-m", "pop3d_jax.evaluate_occupancy", *sys.argv[1:]]),
    }


def _ground_truth(name: str, records: str | None, split: str | None, source: RecordSource | None) -> GroundTruth:
    if name != ACCUMULATED:
        return Occ3DGroundTruth(name)
    if source is None:
        raise OccupancyFileError(f"--ground_truth={ACCUMULATED} is made from records: name them, --records and --split")
    return AccumulatedGroundTruth(source, read_boxes(records, split))


def _ray_origins(
    source: RecordSource | None, truth: GroundTruth, tokens: Sequence[str]
) -> dict[str, Float64[np.ndarray, "origins 3"]]:
    """Where the rays of each key frame start."""
    if source is None:
        raise OccupancyFileError(
            "RayIoU starts from the lidar's places, which only records tell: name those of these key frames with "
            "--records and --split, or leave RayIoU out"
        )
    origins = origins_by_token(poses_of_records(source))
    check_poses(truth, tokens, origins)
    return origins


def _own(
    predictions: str,
    source: RecordSource | None,
    prompts: PromptSet,
    absent_threshold: float | None,
    step: int | None,
    text_tower: str | None,
) -> Scored:
    """A run or a store."""
    if is_run(predictions):
        return ScoredRun(StudentLabels(predictions, step, prompts, absent_threshold), source)
    return ScoredStore(StoreLabels(predictions, prompts, text_tower, absent_threshold))


def _described(prompts: PromptSet | None) -> dict[str, Any] | None:
    if prompts is None:
        return None
    return {
        "name": prompts.name,
        "source": prompts.source,
        "licence": prompts.licence,
        "templates": prompts.templates,
        "phrases": [[phrase, int(label)] for phrase, label in zip(prompts.phrases, prompts.labels, strict=True)],
    }


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    define_records_flags()
    define_report_flags()
    flags.DEFINE_string("ground_truth", None, f"Occ3D's folder gts, or {ACCUMULATED!r}: labels made from the records.")
    flags.DEFINE_string("predictions", None, "Workdir of a run, store of grids, or folder of .npz files.")
    flags.DEFINE_multi_enum("mask", None, MASKS, "Voxels that count; camera by default, with --all all three.")
    flags.DEFINE_enum("rule", "challenge", RULE_NAMES, "How the means are taken.")
    flags.DEFINE_bool("all", False, "Every rule, side by side.")
    flags.DEFINE_string(
        "prompts", PROMPT_SETS[0], f"What classes are asked with: {', '.join(PROMPT_SETS)}, or a JSON file."
    )
    flags.DEFINE_float(
        "absent_threshold", None, "Leave a class out of a key frame where no voxel leads the background by so much."
    )
    flags.DEFINE_integer("step", None, "Checkpoint of a run; the newest by default.")
    flags.DEFINE_string("text_tower", None, "CLIP folder or hub name for a store's phrases; the run's by default.")
    flags.DEFINE_integer("vocabulary", None, "Which of the vocabularies in LangOcc's files.", lower_bound=0)
    flags.DEFINE_integer("free_space", None, "Which of the density thresholds in LangOcc's files.", lower_bound=0)
    flags.DEFINE_bool("partial", False, "Score the key frames there are, where some are missing, and say so.")
    flags.DEFINE_string("method", None, "How the report calls the prediction; the name of its folder by default.")


# Flags that say something of one kind of prediction only.
_OF_RUNS = ("step",)
_OF_OURS = ("prompts", "absent_threshold")
_OF_STORES = ("text_tower",)
_OF_FILES = ("vocabulary", "free_space")


def _check(values: flags.FlagValues) -> None:
    """Raises ValueError where flags do not go together."""
    if is_run(values.predictions):
        kind, foreign = "a run", _OF_STORES + _OF_FILES
    elif is_store(values.predictions):
        kind, foreign = "a store", _OF_RUNS + _OF_FILES
    else:
        kind, foreign = "a folder of files", _OF_RUNS + _OF_OURS + _OF_STORES
    for name in foreign:
        if values[name].present:
            raise ValueError(f"--{name} says nothing of {kind} ({values.predictions}): leave it out")
    if values.all and values["rule"].present:
        raise ValueError("--all is every rule: leave --rule out")
    if values.rule == RAYIOU and values.mask and not values.all:
        raise ValueError(f"--rule={RAYIOU} knows no mask: leave --mask out")


def main(_: list[str]) -> None:
    with stop_with_message(
        OccupancyFileError, RecordError, WorkdirError, CheckpointError, GridStoreError, SplitError, ValueError
    ):
        values = flags.FLAGS
        _check(values)
        same = ("records", "split", "prompts", "absent_threshold", "step", "text_tower", "vocabulary", "free_space")
        rules = RULE_NAMES if values.all else (values.rule,)
        masks = tuple(dict.fromkeys(values.mask or (MASKS if values.all else MASKS[:1])))
        report = evaluate_occupancy(
            values.ground_truth,
            values.predictions,
            rules=rules,
            masks=masks,
            partial=values.partial,
            method=values.method,
            **{name: values[name].value for name in same},
        )
        print(format_report(report))
        write_report(report, values.out)


if __name__ == "__main__":
    _define_flags()
    flags.mark_flags_as_required(["ground_truth", "predictions"])
    run(main)

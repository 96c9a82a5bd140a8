"""How much a network suffers from corrupted sweeps: mCE and mRR of Robo3D (Kong et al., ICCV 2023)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath


@dataclasses.dataclass(frozen=True)
class RobustnessScores:
    """Scores over several corruptions.

    Attributes:
      baseline: name of the network that errors are relative to, or None.
      corruption_error: of each corruption; 1 as the baseline, less is better. Empty without a baseline.
      resilience_rate: of each corruption; 1 where it costs nothing.
      mean_corruption_error: mCE; NaN without a baseline.
      mean_resilience_rate: mRR.
    """

    baseline: str | None
    corruption_error: dict[str, float]
    resilience_rate: dict[str, float]
    mean_corruption_error: float
    mean_resilience_rate: float


def robustness_scores(
    corrupted: Mapping[str, Sequence[float]],
    clean: float,
    baseline_corrupted: Mapping[str, Sequence[float]] | None = None,
    baseline: str | None = None,
) -> RobustnessScores:
    """mCE and mRR from mIoUs.

    For each corruption CE = sum of (1 - mIoU) over its severities, over the same sum of the baseline; RR = mean mIoU of
    its severities over the mIoU of clean sweeps.

    Args:
      corrupted: mIoU, in 0..1, of each corruption and severity.
      clean: mIoU of the same network without corruption.
      baseline_corrupted: like `corrupted`, of the baseline; None leaves the errors out.
      baseline: its name, for reports.

    Raises:
      ValueError: the two networks were not measured on the same corruptions and severities, a score lies outside 0..1,
        or a score to divide by is perfect or zero.
    """
    compared = corrupted if baseline_corrupted is None else baseline_corrupted
    for name in corrupted.keys() | compared.keys():
        ours, theirs = corrupted.get(name, ()), compared.get(name, ())
        if not ours or len(ours) != len(theirs):
            raise ValueError(
                f"corruption {name}: {len(ours)} severities of the network, {len(theirs)} of baseline {baseline}; "
                "evaluate both on the same"
            )
        for score in (*ours, *theirs):
            if not 0 <= score <= 1:
                raise ValueError(f"corruption {name}: mIoU {score} is not in 0..1; give shares, not percent")
    if not corrupted:
        raise ValueError("no corruption was evaluated")
    if not 0 < clean <= 1:
        raise ValueError(f"clean mIoU {clean}: the resilience rate needs one in 0..1 and above 0")
    errors = {}
    for name, scores in corrupted.items() if baseline_corrupted is not None else ():
        theirs = float(np.sum(1 - np.asarray(baseline_corrupted[name])))
        if theirs == 0:
            raise ValueError(f"corruption {name}: baseline {baseline} is perfect, no error is relative to that")
        errors[name] = float(np.sum(1 - np.asarray(scores))) / theirs
    rates = {name: float(np.mean(scores)) / clean for name, scores in corrupted.items()}
    return RobustnessScores(
        baseline=baseline,
        corruption_error=errors,
        resilience_rate=rates,
        mean_corruption_error=float(np.mean(list(errors.values()))) if errors else float("nan"),
        mean_resilience_rate=float(np.mean(list(rates.values()))),
    )


def read_baseline(
    path: epath.PathLike, same: Mapping[str, Any], corruptions: Sequence[str], severities: Sequence[int]
) -> dict[str, list[float]]:
    """mIoUs of another run for `robustness_scores`.

    Args:
      path: JSON file that `pop3d_jax.evaluate_segmentation` wrote; named as its flag --baseline in errors.
      same: what the file must say of its measurement, such as data set and split.
      corruptions, severities: those wanted; the file may hold more.

    Returns:
      In 0..1, of each corruption, in the order of the severities.

    Raises:
      ValueError: no such file, no results, results of another measurement or without a corruption or severity, or
        perfect ones.
    """
    try:
        results = json.loads(epath.Path(path).read_text())
        differing = [f"{name} {results[name]}, here {value}" for name, value in same.items() if results[name] != value]
        found = {
            (corruption, int(severity)): float(scores["mean_iou"]) / 100
            for corruption, of_severities in results.get("corruptions", {}).items()
            for severity, scores in of_severities.items()
        }
    except FileNotFoundError:
        raise ValueError(f"--baseline={path} does not exist: name a file that this command wrote with --out") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--baseline={path} holds no results of this command ({type(error).__name__}: {error}): name a file that "
            "it wrote with --out"
        ) from error
    if differing:
        raise ValueError(
            f"--baseline={path} was measured on something else ({'; '.join(differing)}): give both the same --dataset, "
            "--split, --records and --seed"
        )
    wanted = [(corruption, severity) for corruption in corruptions for severity in severities]
    missing = [f"{corruption} {severity}" for corruption, severity in wanted if (corruption, severity) not in found]
    if missing:
        raise ValueError(
            f"--baseline={path} has no {', '.join(missing)}: evaluate it with --corruptions={','.join(corruptions)} "
            f"--severities={','.join(map(str, severities))} too, or leave them out here"
        )
    scores = {corruption: [found[corruption, severity] for severity in severities] for corruption in corruptions}
    robustness_scores(scores, 1.0, scores, str(path))  # refuses a baseline that nothing is relative to
    return scores

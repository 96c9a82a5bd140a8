"""The language-driven retrieval benchmark of POP-3D (section 4.3 of the paper, official `retrieval.py`): scoring.

One average precision per query, over all points of its sweep and over the visible ones, where a point seen by two
cameras counts twice, as official. Scores are raw dot products of unnormalised features with the phrase. Means are
over queries; their uncertainty comes from a bootstrap over queries. Pure NumPy; `pop3d_jax.evaluate_retrieval` is the
command.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from pop3d_jax.metrics import average_precision
from pop3d_jax.retrieval import Query, RetrievalError, read_queries

# The tables of the archive; "eval" and "all" repeat their lines.
BENCHMARK_SPLITS = ("train", "val", "test")
_INTERVAL = (2.5, 97.5)


@dataclasses.dataclass(frozen=True)
class QueryScore:
    """One query, scored; values in 0..1.

    Attributes:
      sample_token, phrase, split: which query.
      points, matching: points of the sweep, and how many answer the phrase.
      visible, visible_matching: the same for visible entries, duplicates counted.
      student, student_visible: average precision of the student over all points and over visible entries; None
        where no point answers.
      teacher_visible: of the teacher's features, which exist at visible entries only; None also where no teacher was
        asked.
    """

    sample_token: str
    phrase: str
    split: str
    points: int
    matching: int
    visible: int
    visible_matching: int
    student: float | None
    student_visible: float | None
    teacher_visible: float | None


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over queries with its 95 % bootstrap interval; `queries` is how many there were.

    `mean`, `low` and `high` are None where there were none.
    """

    mean: float | None
    low: float | None
    high: float | None
    queries: int


def member_splits(split: str) -> tuple[str, ...]:
    """The benchmark's splits that a name stands for: "valtest" is val and test, as official (by substring).

    Raises:
      RetrievalError: the name is not made of them, in this order.
    """
    members = tuple(name for name in BENCHMARK_SPLITS if name in split)
    if not members or "".join(members) != split:
        raise RetrievalError(
            f"unknown split {split!r} of the benchmark: take {', '.join(BENCHMARK_SPLITS)}, or several in a row, such "
            "as valtest"
        )
    return members


def available_splits(directory: epath.PathLike) -> tuple[str, ...]:
    """Splits whose tables a benchmark folder has, and "valtest" where it has both.

    Raises:
      RetrievalError: it has none.
    """
    directory = epath.Path(directory)
    found = tuple(name for name in BENCHMARK_SPLITS if (directory / f"retrieval_anns_{name}.csv").exists())
    if not found:
        raise RetrievalError(
            f"{directory} has no retrieval_anns_train.csv, _val.csv or _test.csv: --benchmark must name the unpacked "
            "folder of the retrieval benchmark"
        )
    return (*found, "valtest") if {"val", "test"} <= set(found) else found


def read_benchmark(directory: epath.PathLike, splits: Sequence[str]) -> list[Query]:
    """The queries of all splits that the names stand for, each once.

    Raises:
      RetrievalError: as `read_queries` and `member_splits`.
    """
    wanted = {member for split in splits for member in member_splits(split)}
    return [
        dataclasses.replace(query, split=name)
        for name in BENCHMARK_SPLITS
        if name in wanted
        for query in read_queries(directory, name)
    ]


def check_length(query: Query, points: int) -> None:
    """Checks that an annotation has one entry for each point of the sweep.

    Raises:
      RetrievalError: it has not. (The official script leaves such a key frame out without a word.)
    """
    if len(query.matches) != points:
        raise RetrievalError(
            f"sample {query.sample_token}, {query.phrase!r}: {len(query.matches)} annotated points, {points} in the "
            "sweep of the records: take the annotations that belong to this data set, or build the records again"
        )


def score_query(
    query: Query,
    text: Float[np.ndarray, " dim"],
    features: Float[np.ndarray, "points dim"],
    visible: Int[np.ndarray, " visible"],
    teacher: Float[np.ndarray, "visible dim"] | None = None,
) -> QueryScore:
    """Scores one query.

    Args:
      query: which points answer.
      text: the phrase's vector.
      features: of the student at all points of the sweep, not normalised.
      visible: index of each visible entry's point; a point that two cameras see comes twice.
      teacher: its features at the visible entries.

    Raises:
      RetrievalError: as `check_length`.
    """
    check_length(query, len(features))
    matches, seen = query.matches, query.matches[visible]
    return QueryScore(
        sample_token=query.sample_token,
        phrase=query.phrase,
        split=query.split,
        points=len(matches),
        matching=int(matches.sum()),
        visible=len(seen),
        visible_matching=int(seen.sum()),
        student=average_precision(features @ text, matches) if matches.any() else None,
        student_visible=average_precision(features[visible] @ text, seen) if seen.any() else None,
        teacher_visible=average_precision(teacher @ text, seen) if teacher is not None and seen.any() else None,
    )


def bootstrap(values: Sequence[float], samples: int, seed: int) -> Interval:
    """Mean and percentile interval: the middle 95 % of the means of `samples` redrawn sets of as many values.

    Args:
      values: one number a query.
      samples: how many sets are redrawn.
      seed: of the draws.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        return Interval(None, None, None, 0)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(samples)]
    low, high = np.percentile(means, _INTERVAL)
    return Interval(float(values.mean()), float(low), float(high), len(values))


def summarise(scores: Sequence[QueryScore], split: str, samples: int, seed: int) -> dict[str, Interval | int]:
    """The rows of one split's table.

    Args:
      scores: of all queries.
      split: a name as for `member_splits`.
      samples, seed: of the bootstrap.

    Returns:
      `student`, `student_visible`, `teacher_visible`: mean average precision. `difference_visible`: student minus
      teacher, query by query. `chance`, `chance_visible`: share of points that answer, what a random order scores.
      `queries`, `key_frames`, `undefined` and `undefined_visible`: how many there are, and how many have no
      answering point (among the visible ones) and are left out of the means.
    """
    chosen = [score for score in scores if score.split in member_splits(split)]

    def interval(values: list[float]) -> Interval:
        return bootstrap(values, samples, seed)

    return {
        "student": interval([score.student for score in chosen if score.student is not None]),
        "student_visible": interval([score.student_visible for score in chosen if score.student_visible is not None]),
        "teacher_visible": interval([score.teacher_visible for score in chosen if score.teacher_visible is not None]),
        "difference_visible": interval(
            [
                score.student_visible - score.teacher_visible
                for score in chosen
                if score.student_visible is not None and score.teacher_visible is not None
            ]
        ),
        "chance": interval([score.matching / score.points for score in chosen if score.matching]),
        "chance_visible": interval(
            [score.visible_matching / score.visible for score in chosen if score.visible_matching]
        ),
        "queries": len(chosen),
        "key_frames": len({score.sample_token for score in chosen}),
        "undefined": sum(score.student is None for score in chosen),
        "undefined_visible": sum(score.student_visible is None for score in chosen),
    }


def differing_entries(ours: Int[np.ndarray, " ours"], archive: Int[np.ndarray, " archive"]) -> int:
    """How many visible entries one list has and the other has not, duplicates counted, in any order."""
    length = 1 + max(ours.max(initial=-1), archive.max(initial=-1))
    return int(np.abs(np.bincount(ours, minlength=length) - np.bincount(archive, minlength=length)).sum())

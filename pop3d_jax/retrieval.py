"""Language-driven retrieval: average precision of phrases over the points of a sweep (official `retrieval.py`).

Reads the published archive's layout: `retrieval_anns_{split}.csv` with lines `token;split;annotation;points;query`,
and one boolean array a query, in the order of the sweep's points.
"""

import collections
import dataclasses
from collections.abc import Mapping

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from pop3d_jax.metrics import average_precision
from pop3d_jax.models.clip import LoadedCLIP
from pop3d_jax.text import embed_phrases


class RetrievalError(ValueError):
    """The benchmark's files are missing or do not fit the records; the message names file and sample."""


@dataclasses.dataclass(frozen=True)
class Query:
    """One phrase in one key frame, and which points of its sweep answer it."""

    sample_token: str
    phrase: str
    matches: Bool[np.ndarray, " points"]


@dataclasses.dataclass(frozen=True)
class PhraseScore:
    """A phrase over all its key frames: means in 0..1 of average precision and of the share of matching points."""

    phrase: str
    average_precision: float
    matching_share: float
    frames: int


def read_queries(directory: epath.PathLike, split: str) -> list[Query]:
    """The queries of one split.

    Raises:
      RetrievalError: a file is missing, a line is malformed, or an annotation matches no point.
    """
    directory = epath.Path(directory)
    table = directory / f"retrieval_anns_{split}.csv"
    if not table.exists():
        raise RetrievalError(f"{table} does not exist: --retrieval must name the folder with retrieval_anns_*.csv")
    queries = []
    for number, line in enumerate(table.read_text().splitlines(), 1):
        if not line.strip():
            continue
        fields = line.split(";")
        if len(fields) != 5:
            raise RetrievalError(
                f"{table}, line {number}: {len(fields)} fields, expected token;split;annotation;points;query"
            )
        token, _, annotation, _, phrase = fields
        path = directory / annotation
        if not path.exists():
            raise RetrievalError(f"{table}, line {number}: annotation {path} does not exist")
        with path.open("rb") as file:
            matches = np.load(file).astype(bool)
        if not matches.any():
            raise RetrievalError(f"{path}: no point matches {phrase!r}; remove the line from {table}")
        queries.append(Query(token, phrase, matches))
    return queries


def embed_queries(
    queries: list[Query], clip: LoadedCLIP, text_cache: epath.PathLike | None = None
) -> dict[str, Float[np.ndarray, " dim"]]:
    """Text vector of every phrase, averaged over the official templates."""
    phrases = sorted({query.phrase for query in queries})
    return dict(zip(phrases, embed_phrases(clip, phrases, cache_dir=text_cache), strict=True))


class Retrieval:
    """Gathers one average precision per (key frame, query), over all points, by the raw dot product as official."""

    def __init__(
        self, queries: list[Query], sample_tokens: list[str], embeddings: Mapping[str, Float[np.ndarray, " dim"]]
    ):
        """Prepares the queries.

        Args:
          queries: from `read_queries`.
          sample_tokens: of the records that will be evaluated, in their order.
          embeddings: text vector of every phrase, from `embed_queries`.

        Raises:
          RetrievalError: a query's sample is not among the records.
        """
        missing = sorted({query.sample_token for query in queries} - set(sample_tokens))
        if missing:
            raise RetrievalError(
                f"{len(missing)} samples of the retrieval queries are not in the records ({missing[0]}, ...): "
                "evaluate the split that the queries were made for"
            )
        self._tokens = sample_tokens
        self._queries = collections.defaultdict(list)
        for query in queries:
            self._queries[query.sample_token].append(query)
        self._text = embeddings
        self._scores: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)

    def add(
        self,
        features: Float[np.ndarray, "batch points dim"],
        mask: Bool[np.ndarray, "batch points"],
        valid: Bool[np.ndarray, " batch"],
        record_index: Int[np.ndarray, " batch"],
        left_out: Int[np.ndarray, " batch"],
    ) -> None:
        """Scores the queries of a batch of key frames.

        Raises:
          RetrievalError: points were left out, or an annotation has another length than the sweep.
        """
        for row in np.flatnonzero(valid):
            token = self._tokens[record_index[row]]
            for query in self._queries.get(token, ()):
                count = int(mask[row].sum())
                if left_out[row] or len(query.matches) != count:
                    raise RetrievalError(
                        f"sample {token}: {len(query.matches)} annotated points for {query.phrase!r}, {count} in the "
                        f"batch ({left_out[row]} left out): raise config.data.max_points, or take the annotations "
                        "that belong to these records"
                    )
                scores = features[row, :count] @ self._text[query.phrase]
                self._scores[query.phrase].append(
                    (average_precision(scores, query.matches), float(query.matches.mean()))
                )

    def table(self) -> list[PhraseScore]:
        """One row a phrase, in alphabetical order."""
        return [
            PhraseScore(phrase, *np.mean(scores, axis=0).tolist(), len(scores))
            for phrase, scores in sorted(self._scores.items())
        ]

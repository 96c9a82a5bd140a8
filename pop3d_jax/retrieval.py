"""Language-driven retrieval: average precision of phrases over the points of a sweep (official `retrieval.py`).

Reads the published archive's layout: `retrieval_anns_{split}.csv` with lines `token;split;annotation;points;query`,
where `annotation` is a boolean array with one entry for each of the sweep's points, in their order, and `points` the
indices of the visible ones, camera after camera. `pop3d_jax.retrieval_benchmark` scores the benchmark as published.
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
    """One phrase in one key frame.

    Attributes:
      sample_token: of the key frame.
      phrase: the words.
      matches: which points of its sweep answer it.
      split: of the benchmark.
      visible: the archive's own indices of the points that a camera sees; None where it has none.
    """

    sample_token: str
    phrase: str
    matches: Bool[np.ndarray, " points"]
    split: str = ""
    visible: Int[np.ndarray, " visible"] | None = None


@dataclasses.dataclass(frozen=True)
class PhraseScore:
    """A phrase over all its key frames: means in 0..1 of average precision and of the share of matching points."""

    phrase: str
    average_precision: float
    matching_share: float
    frames: int


def read_queries(directory: epath.PathLike, split: str) -> list[Query]:
    """The queries of one split, in the order of its table.

    Raises:
      RetrievalError: a file is missing, damaged or of the wrong shape, or a line is malformed.
    """
    directory = epath.Path(directory)
    table = directory / f"retrieval_anns_{split}.csv"
    if not table.exists():
        raise RetrievalError(f"{table} does not exist: name the folder of the benchmark with retrieval_anns_*.csv")
    queries = []
    for number, line in enumerate(table.read_text().splitlines(), 1):
        if not line.strip():
            continue
        fields = line.strip().split(";")
        if len(fields) != 5:
            raise RetrievalError(
                f"{table}, line {number}: {len(fields)} fields, expected token;split;annotation;points;query"
            )
        token, of_split, annotation, points, phrase = fields
        matches = _read_array(directory / annotation, f"{table}, line {number}: annotation").astype(bool)
        # Other writers of this layout put the sweep's own file here.
        named = directory / points
        visible = None
        if named.suffix == ".npy" and named.exists():
            visible = _read_array(named, f"{table}, line {number}: points").astype(np.int64)
        queries.append(Query(token, phrase, matches, of_split, visible))
    return queries


def _read_array(path: epath.Path, where: str) -> np.ndarray:
    """A flat .npy array of integers or booleans; `where` begins the error's message."""
    if not path.exists():
        raise RetrievalError(f"{where} {path} does not exist: unpack the whole archive of the benchmark")
    try:
        with path.open("rb") as file:
            array = np.load(file)
    except (ValueError, EOFError, OSError) as error:
        raise RetrievalError(f"{where} {path} cannot be read ({error}): unpack the archive again") from error
    if array.ndim != 1 or array.dtype.kind not in "biu":
        raise RetrievalError(f"{where} {path} has shape {array.shape} of {array.dtype}, expected one number a point")
    return array


def embed_queries(
    queries: list[Query], clip: LoadedCLIP, text_cache: epath.PathLike | None = None
) -> dict[str, Float[np.ndarray, " dim"]]:
    """Text vector of every phrase, averaged over the official templates."""
    phrases = sorted({query.phrase for query in queries})
    return dict(zip(phrases, embed_phrases(clip, phrases, cache_dir=text_cache), strict=True))


class Retrieval:
    """Gathers one average precision per (key frame, query), over all points, by the raw dot product as official.

    Attributes:
      undefined: queries met so far that no point of the sweep answers. They have no average precision and are left
        out of the means; the official script stops at them.
    """

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
        self.undefined = 0
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
                if not query.matches.any():
                    self.undefined += 1
                    continue
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

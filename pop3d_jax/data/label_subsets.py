"""Which records are trained on with few labels: a share of a split, chosen by a rule, or a list from a file.

The official 1 % and 10 % of nuScenes are lists of files that ScaLR publishes: name them in a file of sample tokens. Its
1 % of SemanticKITTI is every hundredth sweep of the sorted ones: rule "every".
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Int64

RULES = ("hash", "every")


def label_subset(
    sample_tokens: Sequence[str], fraction: float, *, rule: str = "hash", seed: int = 0
) -> Int64[np.ndarray, " kept"]:
    """Indices, ascending, of a share of the records; the same whatever the order or number of the shards.

    Args:
      sample_tokens: of all records, in their order.
      fraction: of the records that are kept, in (0, 1]; at least one is.
      rule: "hash" orders the records by the SHA-256 of "SEED:TOKEN" and takes the first, so a smaller share of a
        seed is part of a larger one. "every" takes every n-th of the sorted tokens from the first, n = round(1 /
        fraction).
      seed: of "hash".

    Raises:
      ValueError: a fraction out of range, or an unknown rule.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"label_fraction is {fraction}: it is a share of the records, above 0 and at most 1")
    if rule not in RULES:
        raise ValueError(f"label_rule is {rule!r}; known rules: {', '.join(RULES)}")
    if rule == "every":
        order = sorted(range(len(sample_tokens)), key=sample_tokens.__getitem__)
        return np.sort(np.array(order[:: round(1 / fraction)], np.int64))
    digests = [hashlib.sha256(f"{seed}:{token}".encode()).digest() for token in sample_tokens]
    order = sorted(range(len(digests)), key=digests.__getitem__)
    return np.sort(np.array(order[: max(1, round(fraction * len(order)))], np.int64))


def listed_records(sample_tokens: Sequence[str], file: epath.PathLike) -> Int64[np.ndarray, " kept"]:
    """Indices, ascending, of the records that a file lists: one sample token a line; empty lines do not count.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file lists none, or one that is not among the records.
    """
    path = epath.Path(file)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}: give one sample token a line, or a fraction instead")
    listed = {line.strip() for line in path.read_text().splitlines()} - {""}
    unknown = sorted(listed.difference(sample_tokens))
    if unknown or not listed:
        what = f"{len(unknown)} sample tokens that the records lack, such as {unknown[0]}" if unknown else "no token"
        raise ValueError(f"{path} lists {what}: is it of another data set or split?")
    return np.array([index for index, token in enumerate(sample_tokens) if token in listed], np.int64)

"""Writes the annotated boxes of a split beside its records: `boxes-SPLIT.npz`, read by `pop3d_jax.data.boxes`.

    python -m data_prep.boxes --source NUSCENES --version v1.0-mini --split mini_train --out RECORDS

The tables must be those that the records were built from.
"""

import itertools

import numpy as np
from absl import app, flags, logging
from etils import epath

from data_prep import splits
from data_prep.nuscenes_tables import tables_fingerprint
from data_prep.table_rows import SourceError, TableFolder
from pop3d_jax.commands import run
from pop3d_jax.data.boxes import Boxes, boxes_path, write_boxes
from pop3d_jax.data.shards import RecordError, read_index
from pop3d_jax.geometry import rigid_transform
from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES

_TABLES = ("category", "instance", "sample_annotation")


def read_annotations(source: epath.PathLike, version: str, sample_tokens: list[str], fingerprint: str) -> Boxes:
    """The boxes of some samples, in their order.

    Args:
      source: root of the data set.
      version: folder of its tables.
      sample_tokens: of the samples.
      fingerprint: of the records that hold them.

    Raises:
      SourceError: a missing or damaged table, rows that contradict each other; names table and row.
    """
    folder = TableFolder(epath.Path(source), version)
    folder.require(_TABLES)
    categories = _read_categories(folder)
    instances = {}
    for row in folder.rows("instance"):
        with folder.fields("instance", row):
            if row["category_token"] not in categories:
                raise folder.dangling("instance", row["token"], "category_token", row["category_token"], "category")
            instances[row["token"]] = (len(instances), categories[row["category_token"]])
    numbers = {token: number for number, token in enumerate(sample_tokens)}
    found = []
    for row in folder.rows("sample_annotation"):
        with folder.fields("sample_annotation", row):
            if row["sample_token"] not in numbers:
                continue
            if row["instance_token"] not in instances:
                raise folder.dangling(
                    "sample_annotation", row["token"], "instance_token", row["instance_token"], "instance"
                )
            found.append((numbers[row["sample_token"]], *instances[row["instance_token"]], *_place(row)))
    found.sort(key=lambda box: box[:2])
    for earlier, later in itertools.pairwise(found):
        if earlier[:2] == later[:2]:
            raise SourceError(
                f"table sample_annotation: sample {sample_tokens[later[0]]} has two boxes of one instance "
                f"({folder.path('sample_annotation')})"
            )
    columns = list(zip(*found, strict=True)) or [[]] * 6
    whole = (np.array(column, np.int32) for column in columns[:3])
    real = (
        np.array(column, np.float64).reshape(-1, width) for column, width in zip(columns[3:], (3, 3, 4), strict=True)
    )
    return Boxes(sample_tokens, fingerprint, *whole, *real)


def _read_categories(folder: TableFolder) -> dict[str, int]:
    """Index in LIDARSEG_CATEGORIES by token; by name, as the table has no indices where there are no point labels."""
    categories = {}
    for row in folder.rows("category"):
        with folder.fields("category", row):
            if row["name"] not in LIDARSEG_CATEGORIES:
                raise ValueError(f"{row['name']!r} is no category of nuScenes")
            categories[row["token"]] = LIDARSEG_CATEGORIES.index(row["name"])
    return categories


def _place(row: dict) -> tuple[list[float], list[float], list[float]]:
    """Centre, size and rotation of a row; raises ValueError where they are no box."""
    centre, size, rotation = row["translation"], row["size"], row["rotation"]
    transform = rigid_transform(np.array(rotation, np.float64), np.array(centre, np.float64))
    if len(rotation) != 4 or not np.isfinite(transform).all():
        raise ValueError(f"not a pose: translation {centre}, rotation {rotation}")
    if np.shape(size) != (3,) or not np.isfinite(size).all() or min(size) <= 0:
        raise ValueError(f"not a size: {size}")
    return centre, size, rotation


def write_split_boxes(source: epath.PathLike, version: str, split: str, out: epath.PathLike) -> Boxes:
    """Writes the boxes of a split beside its records, and returns them.

    Raises:
      SourceError: as `read_annotations`, or the records were built from other tables.
      RecordError: no finished records.
      SplitError: a split that the version does not have.
    """
    splits.check_split(version, split)
    index = read_index(out, split)
    if index.source_fingerprint != tables_fingerprint(source, version):
        raise SourceError(
            f"{out} was built from other tables than those of {epath.Path(source) / version}: give the --source and "
            "--version of its build"
        )
    tokens = [token for shard in index.shards for token in shard.sample_tokens]
    boxes = read_annotations(source, version, tokens, index.fingerprint)
    write_boxes(boxes_path(out, split), boxes)
    return boxes


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    flags.DEFINE_string("source", None, "Root of nuScenes, local or gs://.", required=True)
    flags.DEFINE_enum("version", None, list(splits.SPLITS_OF_VERSION), "Folder of its tables.", required=True)
    flags.DEFINE_string("split", None, "Split of the records.", required=True)
    flags.DEFINE_string("out", None, "Folder of the records, built from the same tables.", required=True)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    values = flags.FLAGS
    try:
        boxes = write_split_boxes(values.source, values.version, values.split, values.out)
    except (SourceError, RecordError, splits.SplitError, OSError) as error:
        logging.error("%s", error)
        return 1
    logging.info("%d boxes of %d things in %s", len(boxes.sample), len(np.unique(boxes.instance)),
                 boxes_path(values.out, values.split))  # fmt: skip
    return 0


if __name__ == "__main__":
    _define_flags()
    run(main)

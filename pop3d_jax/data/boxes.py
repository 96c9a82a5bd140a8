"""Annotated boxes of the key frames of a split: `boxes-SPLIT.npz` beside the records, by `data_prep.boxes`.

Records hold no boxes, because nothing learns from them; ground truth that follows what moves needs them.
"""

import dataclasses
import zipfile

import numpy as np
from etils import epath
from jaxtyping import Float64, Int32

from pop3d_jax.data.shards import RecordError, read_index


@dataclasses.dataclass(frozen=True)
class Boxes:
    """The boxes of a split, as nuScenes' table sample_annotation has them.

    Attributes:
      sample_tokens: of the split's records, in their order.
      fingerprint: of those records; see `SplitIndex.fingerprint`.
      sample: index into `sample_tokens`, ascending.
      instance: number of the thing, the same at all key frames.
      category: index into `pop3d_jax.nuscenes.LIDARSEG_CATEGORIES`.
      centre: metres, global frame.
      size: width, length, height in metres; the length lies along the box's x axis.
      rotation: quaternion (w, x, y, z) from the box's axes (x forward, y left, z up) to the global frame.
    """

    sample_tokens: list[str]
    fingerprint: str
    sample: Int32[np.ndarray, " boxes"]
    instance: Int32[np.ndarray, " boxes"]
    category: Int32[np.ndarray, " boxes"]
    centre: Float64[np.ndarray, "boxes 3"]
    size: Float64[np.ndarray, "boxes 3"]
    rotation: Float64[np.ndarray, "boxes 4"]


_ARRAYS = ("sample", "instance", "category", "centre", "size", "rotation")


def boxes_path(records_dir: epath.PathLike, split: str) -> epath.Path:
    """Path of a split's boxes."""
    return epath.Path(records_dir) / f"boxes-{split}.npz"


def write_boxes(path: epath.PathLike, boxes: Boxes) -> None:
    """Writes the file, which appears whole or not at all."""
    path = epath.Path(path)
    unfinished = path.parent / f"{path.name}.incomplete"
    arrays = {name: getattr(boxes, name) for name in _ARRAYS}
    with unfinished.open("wb") as file:
        np.savez_compressed(
            file, sample_tokens=np.array(boxes.sample_tokens), fingerprint=np.array(boxes.fingerprint), **arrays
        )
    unfinished.replace(path)


def read_boxes(records_dir: epath.PathLike, split: str) -> Boxes:
    """Reads the boxes of a split.

    Raises:
      RecordError: no finished split, no such file, a damaged one, or one of other records.
    """
    path = boxes_path(records_dir, split)
    index = read_index(records_dir, split)
    way_out = (
        f"python -m data_prep.boxes --source NUSCENES --version {index.version} --split {split} --out {records_dir}"
    )
    if not path.exists():
        raise RecordError(f"no boxes {path}: write them with {way_out}")
    try:
        with path.open("rb") as file, np.load(file) as content:
            arrays = {name: content[name] for name in _ARRAYS}
            boxes = Boxes(content["sample_tokens"].tolist(), str(content["fingerprint"]), **arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RecordError(f"{path} is damaged ({error}): write it again with {way_out}") from error
    if boxes.fingerprint != index.fingerprint:
        raise RecordError(f"{path} belongs to other records than those beside it: write it again with {way_out}")
    return boxes

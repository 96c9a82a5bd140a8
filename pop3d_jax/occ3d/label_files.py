"""One grid of labels in one .npz file: read whole and checked, or refused by name."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, UInt8

from pop3d_jax.occ3d.grid import FREE, OCC3D_VOLUME

# What stands in a ground truth for "no label".
UNLABELLED = 255


class OccupancyFileError(Exception):
    """Ground truth or a prediction cannot be scored as it is; names the file and what to do."""


def read_arrays(path: epath.PathLike, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Arrays of a .npz file: all, or those of the names that it has.

    Raises:
      OccupancyFileError: the file is missing, cut off or damaged, or needs unpickling.
    """
    return _read(path, lambda arrays: {name: arrays[name] for name in arrays if names is None or name in names})


def _read(path: epath.PathLike, take: Callable[[np.lib.npyio.NpzFile], Any]) -> Any:
    path = epath.Path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return take(arrays)
    except FileNotFoundError as error:
        raise OccupancyFileError(f"{path} does not exist") from error
    except Exception as error:  # zipfile, zlib, tokenize and NumPy each raise their own
        raise OccupancyFileError(
            f"{path} cannot be read as a .npz file of plain arrays ({error}): half-written or damaged; write it again"
        ) from error


def checked_labels(
    array: np.ndarray, where: str, *, allowed_beyond: tuple[int, ...] = ()
) -> UInt8[np.ndarray, "x y z"]:
    """Labels on Occ3D's grid.

    Args:
      array: as read; axes of length 1 before the three are left out.
      where: the file and array, for errors.
      allowed_beyond: labels other than 0 to 17 that may occur.

    Raises:
      OccupancyFileError: another shape, no integers, labels outside the list.
    """
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.shape != OCC3D_VOLUME.grid_size:
        raise OccupancyFileError(
            f"{where} has the shape {array.shape}, not {OCC3D_VOLUME.grid_size}: bring it to Occ3D's grid, "
            "indexed x, y, z in the ego frame, before scoring"
        )
    if array.dtype.kind not in "iu":
        raise OccupancyFileError(f"{where} holds {array.dtype}, not integer labels")
    foreign = array[(array < 0) | (array > FREE)]
    strange = sorted(set(np.unique(foreign).tolist()) - set(allowed_beyond))
    if strange:
        raise OccupancyFileError(
            f"{where} holds labels that Occ3D does not have: {', '.join(map(str, strange[:8]))}"
            f"{', ...' if len(strange) > 8 else ''}; 0 to 16 are classes, {FREE} is free"
        )
    return array.astype(np.uint8)


def checked_mask(array: np.ndarray, where: str) -> Bool[np.ndarray, "x y z"]:
    """A mask of Occ3D, which is stored as 0 and 1.

    Raises:
      OccupancyFileError: another shape, or other values.
    """
    if array.shape != OCC3D_VOLUME.grid_size:
        raise OccupancyFileError(f"{where} has the shape {array.shape}, not {OCC3D_VOLUME.grid_size}")
    if not np.isin(array, (0, 1)).all():
        raise OccupancyFileError(f"{where} holds values other than 0 and 1")
    return array.astype(bool)


def array_names(path: epath.PathLike) -> list[str]:
    """Names of the arrays of a .npz file, none of which is read.

    Raises:
      OccupancyFileError: the file is missing or damaged.
    """
    return _read(path, lambda arrays: list(arrays.files))

"""Predictions that any method wrote into files: the layouts that are in use, found by looking at the folder.

`TOKEN.npz`                     one array without a name: the challenge, SparseOcc, FlashOCC (`format_results`)
`SCENE/TOKEN/*.npz`             the array `pred` (FlashOCC's `show_dir`), `occ_pred`, or `semantics` (Occ3D's own)
`occupancy/SCENE.npz`           LangOcc's `save_dir`: an array for each token, one grid for each of its vocabularies;
                                `free_space/SCENE.npz` beside it: which voxels are free at each density threshold
sparse, in any of the first     `occ_loc` (voxel indices) and `sem_pred` (their labels), everything else free: SparseOcc

The names of the arrays are enough; a file that holds two candidates, or none, is refused. Pickles (GaussTR's `.pkl`
files) are not read, because reading them runs whatever they contain.
"""

import numpy as np
from etils import epath
from jaxtyping import UInt8

from pop3d_jax.occ3d.grid import FREE, OCC3D_VOLUME
from pop3d_jax.occ3d.label_files import OccupancyFileError, array_names, checked_labels, read_arrays

_DENSE = ("arr_0", "pred", "occ_pred", "semantics")
_SPARSE = ("occ_loc", "sem_pred")


class PredictionFiles:
    """A folder of predictions; `predictions[token]` reads one key frame.

    Attributes:
      sample_tokens: of the key frames that there are predictions for.
    """

    def __init__(self, folder: epath.PathLike, *, vocabulary: int | None = None, free_space: int | None = None):
        """Looks for the files; none is read yet.

        Args:
          folder: local or gs://.
          vocabulary, free_space: which of LangOcc's vocabularies and density thresholds; needed where it wrote several.

        Raises:
          OccupancyFileError: no such folder, no predictions in it, or two for one key frame.
        """
        self.folder = epath.Path(folder)
        self._vocabulary, self._free_space = vocabulary, free_space
        self._of_scenes = (self.folder / "occupancy").is_dir()
        if not self.folder.is_dir():
            raise OccupancyFileError(f"--predictions: there is no folder {self.folder}")
        found = self._in_scene_files() if self._of_scenes else self._in_own_files()
        self._files: dict[str, epath.Path] = {}
        for token, path in found:
            if token in self._files:
                raise OccupancyFileError(
                    f"key frame {token} is doubled: {self._files[token]} and {path}; leave one of them out"
                )
            self._files[token] = path
        if not self._files:
            pickles = next(iter(self.folder.glob("*.pkl")), None)
            advice = (
                f"; pickles such as {pickles.name} are not read, since that would run what they contain: write their "
                "occ_pred with numpy.savez_compressed as TOKEN.npz"
                if pickles
                else ": it takes a workdir, a store, or a folder of TOKEN.npz files"
            )
            raise OccupancyFileError(f"--predictions: {self.folder} holds no predictions{advice}")
        # LangOcc's files hold a scene: the last one is kept.
        self._open_scene: tuple[str, dict[str, np.ndarray], dict[str, np.ndarray] | None] = ("", {}, None)
        self.sample_tokens = list(self._files)

    def _in_own_files(self) -> list[tuple[str, epath.Path]]:
        flat, by_scene = self._flat_files(), list(self.folder.glob("*/*/*.npz"))
        if flat and by_scene:
            raise OccupancyFileError(
                f"{self.folder} holds files of two layouts, {flat[0]} and {by_scene[0]}: keep one method's files"
            )
        found = [(path.stem, path) for path in flat] + [(path.parent.name, path) for path in by_scene]
        return sorted(found, key=lambda item: str(item[1]))

    def _flat_files(self) -> list[epath.Path]:
        return list(self.folder.glob("*.npz"))

    def _in_scene_files(self) -> list[tuple[str, epath.Path]]:
        if beside := self._flat_files():
            raise OccupancyFileError(
                f"{self.folder} holds files of two layouts, occupancy/ and {beside[0]}: keep one method's files"
            )
        paths = sorted((self.folder / "occupancy").glob("*.npz"), key=str)
        return [(token, path) for path in paths for token in array_names(path)]

    def __getitem__(self, token: str) -> UInt8[np.ndarray, "x y z"]:
        """Reads a key frame's labels.

        Raises:
          OccupancyFileError: the file is damaged, in no known layout, on another grid, or holds foreign labels.
        """
        path = self._files[token]
        if self._of_scenes:
            return self._of_langocc(token, path)
        # Nothing else is read: FlashOCC's files hold a pickle beside.
        arrays = read_arrays(path, (*_DENSE, *_SPARSE, "sample_token"))
        told = arrays.get("sample_token", token)
        if str(told) != token:
            raise OccupancyFileError(f"{path} says that it is of key frame {told}, its place says {token}")
        names = [name for name in _DENSE if name in arrays]
        if all(name in arrays for name in _SPARSE) and not names:
            return _dense(arrays["occ_loc"], arrays["sem_pred"], str(path))
        if len(names) != 1 or any(name in arrays for name in _SPARSE):
            raise OccupancyFileError(
                f"{path} holds the arrays {', '.join(array_names(path)) or 'none'}; exactly one of {', '.join(_DENSE)} "
                f"must be among them, or both of {' and '.join(_SPARSE)}"
            )
        return checked_labels(arrays[names[0]], f"{path}, {names[0]},")

    def _of_langocc(self, token: str, path: epath.Path) -> UInt8[np.ndarray, "x y z"]:
        if self._open_scene[0] != path.stem:
            free = self.folder / "free_space" / path.name
            has_free = free.parent.is_dir()
            self._open_scene = (path.stem, read_arrays(path), read_arrays(free) if has_free else None)
        _, occupancy, free_space = self._open_scene
        where = f"{path}, {token},"
        labels = _one_of(occupancy[token], self._vocabulary, where, "--vocabulary").copy()
        if free_space is None:
            if not (labels == FREE).any():
                raise OccupancyFileError(f"{where} has no free voxel, and there is no free_space/{path.name} beside it")
            return checked_labels(labels, where)
        if token not in free_space:
            raise OccupancyFileError(f"free_space/{path.name} beside {where} lacks the key frame")
        free = _one_of(free_space[token], self._free_space, f"{where} free_space", "--free_space")
        if free.shape != labels.shape or not np.isin(free, (0, 1)).all():
            raise OccupancyFileError(
                f"{where} has {labels.shape} labels; its free_space {free.shape} must be as large, and of 0 and 1 only"
            )
        labels[free.astype(bool)] = FREE
        return checked_labels(labels, where)


def _one_of(array: np.ndarray, choice: int | None, where: str, flag: str) -> np.ndarray:
    """One grid of several along the first axis."""
    if array.ndim == 3:
        return array
    if array.ndim != 4 or not len(array):
        raise OccupancyFileError(f"{where} has the shape {array.shape}: one grid or several are expected")
    if choice is None and len(array) > 1:
        raise OccupancyFileError(f"{where} holds {len(array)} grids: say which with {flag}, 0 to {len(array) - 1}")
    if not 0 <= (choice or 0) < len(array):
        raise OccupancyFileError(f"{where} holds {len(array)} grids, {flag}={choice} is none of them")
    return array[choice or 0]


def _dense(places: np.ndarray, labels: np.ndarray, where: str) -> UInt8[np.ndarray, "x y z"]:
    """A grid of the voxels that a sparse prediction names; the others are free."""
    size = OCC3D_VOLUME.grid_size
    if not all(array.ndim and array.dtype.kind in "iu" for array in (places, labels)) or places.shape[-1] != 3:
        raise OccupancyFileError(
            f"{where}: occ_loc, {places.dtype} {places.shape}, must hold rows of three indices, and sem_pred, "
            f"{labels.dtype} {labels.shape}, a label for each"
        )
    places, labels = places.reshape(-1, 3), labels.reshape(-1)
    if len(places) != len(labels) or not ((places >= 0) & (places < size)).all():
        raise OccupancyFileError(
            f"{where}: occ_loc, {len(places)} voxels, must hold indices below {size}, one for each of sem_pred"
        )
    if (labels < 0).any() or (labels > FREE).any():
        raise OccupancyFileError(
            f"{where}: sem_pred holds labels that Occ3D does not have: 0 to 16, or {FREE} for free"
        )
    different, counts = np.unique(places, axis=0, return_counts=True)
    if len(different) < len(places):
        raise OccupancyFileError(f"{where}: occ_loc names voxel {different[counts > 1][0].tolist()} twice")
    grid = np.full(size, FREE, np.uint8)
    grid[tuple(places.T)] = labels
    return grid

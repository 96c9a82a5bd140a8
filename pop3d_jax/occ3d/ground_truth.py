"""Ground truth in Occ3D-nuScenes' layout: a folder `gts/SCENE/TOKEN/labels.npz`.

Where the labels are not Occ3D's own, `gts/ground_truth.json` says what they are, so that no report calls them Occ3D's:
`{"description": "true labels of a synthetic world"}`.
"""

import json
import os

import numpy as np
from etils import epath

from pop3d_jax.occ3d.grid import Occ3DFrame
from pop3d_jax.occ3d.label_files import UNLABELLED, OccupancyFileError, checked_labels, checked_mask, read_arrays

_DESCRIPTION = "ground_truth.json"


class Occ3DGroundTruth:
    """The key frames of a ground truth folder; `truth[token]` reads one.

    Attributes:
      description: where the labels come from.
      sample_tokens: of all its key frames, scene by scene.
    """

    def __init__(self, folder: epath.PathLike):
        """Looks for the files; none is read yet.

        Args:
          folder: `gts`, or the folder that holds it, local or gs://.

        Raises:
          OccupancyFileError: no such folder, no ground truth in it, two files for one key frame, or a damaged
            description.
        """
        self.folder = epath.Path(folder)
        if (self.folder / "gts").is_dir():
            self.folder = self.folder / "gts"
        if not self.folder.is_dir():
            raise OccupancyFileError(f"--ground_truth: there is no folder {self.folder}")
        self._files: dict[str, epath.Path] = {}
        for scene in sorted((entry for entry in self.folder.iterdir() if entry.is_dir()), key=os.fspath):
            for key_frame in sorted((entry for entry in scene.iterdir() if entry.is_dir()), key=os.fspath):
                path = key_frame / "labels.npz"
                if key_frame.name in self._files:
                    if not path.exists():  # some other folder of folders
                        raise self._nothing_here()
                    raise OccupancyFileError(
                        f"key frame {key_frame.name} is doubled: {self._files[key_frame.name]} and {path}; leave one "
                        "of them out"
                    )
                self._files[key_frame.name] = path
        if not self._files:
            raise self._nothing_here()
        self.sample_tokens = list(self._files)
        self.description = _description(self.folder)

    def _nothing_here(self) -> OccupancyFileError:
        return OccupancyFileError(
            f"{self.folder} holds no SCENE/TOKEN/labels.npz: --ground_truth takes Occ3D's folder gts"
        )

    def scene_of(self, token: str) -> str:
        """Name of the scene of a key frame."""
        return self._files[token].parent.parent.name

    def __getitem__(self, token: str) -> Occ3DFrame:
        """Reads a key frame.

        Raises:
          OccupancyFileError: the file is missing, damaged or not of Occ3D's layout.
        """
        path = self._files[token]
        arrays = read_arrays(path)
        for name in ("semantics", "mask_lidar", "mask_camera"):
            if name not in arrays:
                raise OccupancyFileError(f"{os.fspath(path)} has no array {name}: it is no ground truth of Occ3D")
        return Occ3DFrame(
            checked_labels(arrays["semantics"], f"{path}, semantics,", allowed_beyond=(UNLABELLED,)),
            *(np.asarray(checked_mask(arrays[name], f"{path}, {name},")) for name in ("mask_lidar", "mask_camera")),
        )


def describe_labels(folder: epath.PathLike, description: str) -> None:
    """Says what the labels of a folder are, where they are not Occ3D's own."""
    (epath.Path(folder) / _DESCRIPTION).write_text(json.dumps({"description": description}) + "\n")


def _description(folder: epath.Path) -> str:
    path = folder / _DESCRIPTION
    if not path.exists():
        return "Occ3D's labels.npz files"
    try:
        return str(json.loads(path.read_text())["description"])
    except (ValueError, KeyError, TypeError) as error:
        raise OccupancyFileError(f"{path} is damaged ({error!r}): write the labels again") from error

"""The published network on this CPU, forward and in training, beside the official one where its code is at hand.

    python -m benchmarks.whole_system [--gradient]
    python -m benchmarks.whole_system --official POP3D_CLONE --official_python PYTHON_WITH_ITS_DEPENDENCIES

Six images of 928 x 1600, 34,688 points, voxel features on, float32, each network in a process of its own, one after the
other; medians of --repeats runs, compilation apart. --gradient adds the training step's forward and backward pass: a
mean of squares instead of the losses, whose share benchmarks/step_shares.py tells, everything rematerialised in ours.
Without --official there is no ratio: seconds of different machines do not compare.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.report import Table
from benchmarks.rig import camera_rig

_OFFICIAL = flags.DEFINE_string("official", None, "clone of the official repository vobecant/POP3D")
_PYTHON = flags.DEFINE_string("official_python", sys.executable, "interpreter that has torch, mmcv, mmseg and mmdet")
_HEIGHT = flags.DEFINE_integer("height", 928, "height of the padded images")
_WIDTH = flags.DEFINE_integer("width", 1600, "width of the padded images")
_GRADIENT = flags.DEFINE_bool("gradient", False, "also forward and backward")
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs of each")
_JSON = flags.DEFINE_string("json", None, "folder of whole_system.json")


def measured(command: list[str], folder: str) -> dict[str, Any] | str:
    """Runs a measuring process and reads what it wrote; a word where this machine has too little memory for it."""
    path = Path(folder) / "measured.json"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, env=environment)
    if result.returncode:
        asked = re.search(r"Out of memory allocating (\d+) bytes", result.stderr)
        if asked:
            return f"asks for {int(asked[1]) / 2**30:.1f} GiB"
        words = (result.stderr or result.stdout).strip().splitlines()[-8:]
        raise SystemExit(f"{' '.join(command[:4])} ... failed:\n" + "\n".join(words))
    return json.loads(path.read_text())


def main(_: list[str]) -> None:
    sizes = ["--height", str(_HEIGHT.value), "--width", str(_WIDTH.value), "--repeats", str(_REPEATS.value)]
    # The page has a table of the published size, and one of another where training fits this machine.
    published = (_HEIGHT.value, _WIDTH.value) == (928, 1600)
    name = "whole_system" if published else f"whole_system_{_HEIGHT.value}x{_WIDTH.value}"
    table = Table(name, ["float32", "median", "peak memory", "first call's compilation"])
    passes = {"forward": []} | ({"forward and backward": ["--gradient"]} if _GRADIENT.value else {})
    with tempfile.TemporaryDirectory() as folder:
        rig = Path(folder) / "rig.npy"
        np.save(rig, camera_rig(_HEIGHT.value, _WIDTH.value))
        for name, more in passes.items():
            remat = ["--remat", "all"] if more else []
            ours = measured([sys.executable, "-m", "benchmarks.model_memory", *sizes, *more, *remat], folder)
            table.details[f"ours, {name}"] = ours
            if isinstance(ours, str):
                table.add(f"ours, {name}", "more memory than here", ours, "")
                continue
            table.add(f"ours, {name}", *_figures(ours), f"{ours['compile_seconds']:.1f} s")
            if not _OFFICIAL.value:
                continue
            script = str(Path(__file__).with_name("official_pop3d.py"))
            command = [_PYTHON.value, script, "--official", _OFFICIAL.value, "--rig", str(rig), *sizes, *more]
            theirs = measured(command, folder)
            if isinstance(theirs, str):
                table.add(f"official, {name}", "more memory than here", theirs, "none")
                continue
            table.add(f"official, {name}", *_figures(theirs), "none")
            table.add(
                f"ours / official, {name}",
                f"{ours['median_seconds'] / theirs['median_seconds']:.2f}",
                f"{ours['peak_gigabytes'] / theirs['peak_gigabytes']:.2f}",
                "",
            )
            table.details[f"official, {name}"] = theirs
    table.write(_JSON.value)


def _figures(report: dict[str, Any]) -> tuple[str, str]:
    return f"{report['median_seconds']:.1f} s", f"{report['peak_gigabytes']:.2f} GiB"


if __name__ == "__main__":
    app.run(main)

"""Time and peak memory of the official PyTorch network, for benchmarks/whole_system.py.

    python official_pop3d.py --official POP3D --repeats 5 --json FILE

A script of its own, for the interpreter that has the official code's dependencies (torch, mmcv 1.x, mmsegmentation 0.x,
mmdet 2.x): it needs nothing of this project. Input and sizes are those of benchmarks/model_memory.py; the weights are
the constructor's, since neither time nor memory depends on them. Of the official repository it uses
`config/pop3d_maskclip_12ep.py` and the package `tpvformer04`.

Not run by the authors of this project, who had neither that code nor its dependencies at hand.
"""

import argparse
import importlib
import importlib.util
import json
import resource
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any


def tensors_in(outputs: Any) -> list:
    """All tensors of nested lists, tuples and dictionaries that have a gradient."""
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, list | tuple):
        return [tensor for output in outputs for tensor in tensors_in(output)]
    return [outputs] if getattr(outputs, "requires_grad", False) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", required=True, help="clone of the official repository")
    parser.add_argument("--rig", required=True, help=".npy of lidar_to_image [6, 4, 4]")
    parser.add_argument("--height", type=int, default=928)
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--points", type=int, default=34688)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gradient", action="store_true", help="forward and backward of a mean of squares")
    parser.add_argument("--json", required=True)
    values = parser.parse_args()
    config_file = Path(values.official) / "config" / "pop3d_maskclip_12ep.py"
    if not config_file.is_file():
        sys.exit(f"--official={values.official}: {config_file} does not exist; give a clone of vobecant/POP3D")
    sys.path.insert(0, values.official)
    import mmcv
    import numpy as np
    import torch
    from mmseg.models import build_segmentor

    # The official code asks for a GPU in places, for a name that NumPy dropped, and for packages it does not use here.
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
    np.bool8 = np.bool_
    for name in ("wandb", "clip"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    importlib.import_module("tpvformer04")
    config = mmcv.Config.fromfile(str(config_file))
    network = build_segmentor(config.model).eval()
    rng = np.random.default_rng(0)
    images = 60.0 * rng.standard_normal((1, 6, 3, values.height, values.width), np.float32)
    grid = (config.tpv_w_, config.tpv_h_, config.tpv_z_)
    points = torch.from_numpy(rng.uniform(0, grid, (1, values.points, 3)).astype(np.float32))
    shape = (values.height, values.width, 3)
    metas = [{"lidar2img": list(np.load(values.rig).astype(np.float64)), "img_shape": [shape] * 6}]
    seconds = []
    with torch.set_grad_enabled(values.gradient):
        for _ in range(values.repeats + 1):
            start = time.perf_counter()
            batch = {"points": points, "features": points.clone(), "img": torch.from_numpy(images), "img_metas": metas}
            outputs = network(**batch, use_grid_mask=False)
            if values.gradient:
                network.zero_grad(set_to_none=True)
                sum((output.float() ** 2).mean() for output in tensors_in(outputs)).backward()
            seconds.append(time.perf_counter() - start)
    report = {
        "first_seconds": seconds[0],
        "seconds": seconds[1:],
        "median_seconds": statistics.median(seconds[1:]),
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    Path(values.json).write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()

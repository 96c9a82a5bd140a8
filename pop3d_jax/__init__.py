"""POP-3D in JAX: open-vocabulary 3D occupancy from six surround images, trained without labels."""

import glob
import os
from typing import Any

import jaxlib

# libtpu, where it is installed to compile for TPUs that are not there, would ask the network what machine this is.
if not glob.glob("/dev/accel[0-9]*") and not glob.glob("/dev/vfio/[0-9]*"):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")

# XLA's YNNPACK fusions for the CPU end the process with a segmentation fault in the gradient of the TPV encoder at
# jaxlib 0.10.2 (seen from 50 x 50 x 8 voxels on). They are left out there; the flag is read when the first device is
# asked for, so it must be set before that. Accelerators do not know these fusions.
if jaxlib.__version__ == "0.10.2":
    _flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_experimental_ynn_fusion_type" not in _flags:
        os.environ["XLA_FLAGS"] = f"{_flags} --xla_cpu_experimental_ynn_fusion_type=".strip()


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: most commands need neither the store nor the text tower.
    if name == "FeatureGrids":
        from pop3d_jax.grids.feature_grids import FeatureGrids

        return FeatureGrids
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

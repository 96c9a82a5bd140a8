"""POP-3D in JAX: open-vocabulary 3D occupancy from six surround images, trained without labels."""

import os

import jaxlib

# XLA's YNNPACK fusions for the CPU end the process with a segmentation fault in the gradient of the TPV encoder at
# jaxlib 0.10.2 (seen from 50 x 50 x 8 voxels on). They are left out there; the flag is read when the first device is
# asked for, so it must be set before that. Accelerators do not know these fusions.
if jaxlib.__version__ == "0.10.2":
    _flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_experimental_ynn_fusion_type" not in _flags:
        os.environ["XLA_FLAGS"] = f"{_flags} --xla_cpu_experimental_ynn_fusion_type=".strip()

"""Weak scaling without a pod: the training step compiled for 1, 2, 4 and 8 devices, one key frame each.

    python -m benchmarks.weak_scaling [--config configs/demo.py] [--json docs/results]

What the compiled programs say, not wall time: simulated devices share this machine's cores. Perfect scaling is the same
work on every device whatever their number, and collectives whose bytes do not grow: the gradients, once a step.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
from absl import app, flags
from ml_collections import config_flags

from benchmarks.report import Table
from pop3d_jax.compile_report import compile_training
from pop3d_jax.sharding import make_mesh

_CONFIG = config_flags.DEFINE_config_file("config", "configs/demo.py", "experiment; reads the teacher only")
_DEVICES = flags.DEFINE_list("devices", ["1", "2", "4", "8"], "numbers of devices")
_JSON = flags.DEFINE_string("json", None, "folder of weak_scaling.json")


def main(_: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    columns = [
        "devices",
        "FLOPs a device (loop bodies once)",
        "temporaries a device",
        "all-reduces",
        "bytes of them",
        "others",
    ]
    table = Table("weak_scaling", columns)
    for count in map(int, _DEVICES.value):
        config = _CONFIG.value.copy_and_resolve_references()
        config.batch_size, config.mesh.data, config.mesh.camera = count, count, 1
        program = compile_training(config, make_mesh(count, 1, jax.devices()[:count]))
        reduces, reduced = program.collectives.get("all-reduce", (0, 0))
        others = {kind: value for kind, value in program.collectives.items() if kind != "all-reduce"}
        table.add(
            count,
            f"{program.flops / 1e9:.3f} G",
            f"{program.temporaries / 1e6:.0f} MB",
            reduces,
            f"{reduced / 1e6:.2f} MB",
            ", ".join(f"{number} {kind} {size / 1e6:.2f} MB" for kind, (number, size) in others.items()) or "none",
        )
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)

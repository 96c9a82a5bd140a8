"""The published networks compiled for TPUs that are not here: memory, collectives and work per chip.

    python -m benchmarks.topologies [--topologies v5e:4x4=16,v6e:4x4=32] [--json docs/results]
    python -m benchmarks.topologies --experiment scalr --topologies v5e:2x2=4

Each is what `python -m pop3d_jax.train --config configs/pop3d_nuscenes.py --compile_only --topology TOPOLOGY` compiles,
in a process of its own, with bfloat16 and everything rematerialised; with `--experiment scalr` what configs/scalr.py
is, as it is. Needs the extra `tpu`, and for each 10 to 25 min and, of POP-3D, 14 GB of memory (one key frame a chip;
18 GB with two). Topologies compiled before stay in the table.
"""

import dataclasses
import importlib
import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.report import Table

_TOPOLOGIES = flags.DEFINE_list(
    "topologies",
    ["v5e:2x2=4", "v5e:4x4=16", "v5e:16x16=256", "v5p:2x2x2=8", "v6e:4x4=32", "v6e:16x16=256"],
    "TOPOLOGY=BATCH, the batch being spread over the chips",
)
_EXPERIMENT = flags.DEFINE_enum("experiment", "pop3d_nuscenes", ["pop3d_nuscenes", "scalr"], "of configs/")
_JSON = flags.DEFINE_string("json", "docs/results", "folder of topologies.json, or of topologies_scalr.json")
# What the published experiments leave open.
_FIELDS = {"pop3d_nuscenes": {"model.remat": "all", "model.compute_dtype": "bfloat16"}, "scalr": {}}
_TABLES = {"pop3d_nuscenes": "topologies", "scalr": "topologies_scalr"}
_COLUMNS = [
    "topology",
    "key frames a chip",
    "program",
    "alive at a time",
    "of the chip",
    "with gaps, at most",
    "of the chip",
    "arguments",
    "collectives",
    "matrix FLOPs",
    "compiled in",
    "at revision",
]


def compile_one(experiment: str, topology: str, batch: int, results: multiprocessing.Queue) -> None:
    """Puts the programs' reports, and FLOPs per chip, into the queue."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from pop3d_jax.compile_report import compile_programs
    from pop3d_jax.workdir import git_revision

    config = importlib.import_module(f"configs.{experiment}").get_config()
    config.update_from_flattened_dict(_FIELDS[experiment] | {"batch_size": batch})
    revision, dirty, _ = git_revision().partition("-dirty")
    programs = compile_programs(config, topology)
    results.put([dataclasses.asdict(program) | {"revision": revision[:7] + dirty} for program in programs])


def compiled(experiment: str, topology: str, batch: int) -> list[dict[str, Any]]:
    """Both programs' reports, made by a process that gives its memory back."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=compile_one, args=(experiment, topology, batch, results))
    process.start()
    while True:
        try:
            programs = results.get(timeout=5)
            break
        except Exception as error:
            if not process.is_alive():
                raise RuntimeError(
                    f"compiling for {topology} ended with exit code {process.exitcode}: was there enough memory?"
                ) from error
    process.join()
    return programs


def _cells(program: dict[str, Any], topology: str) -> list[str]:
    from pop3d_jax.compile_report import CAPACITY, Compiled

    collectives = [f"{count} {kind} {size / 1e9:.2f} GB" for kind, (count, size) in program["collectives"].items()]
    fields = {field.name for field in dataclasses.fields(Compiled)}
    compiled = Compiled(**{name: value for name, value in program.items() if name in fields})
    capacity = CAPACITY[topology.partition(":")[0]]
    return [
        f"{compiled.peak / 1e9:.2f} GB",
        f"{100 * compiled.peak / capacity:.0f} %",
        f"{compiled.with_gaps / 1e9:.2f} GB",
        f"{100 * compiled.with_gaps / capacity:.0f} %",
        f"{compiled.arguments / 1e9:.2f} GB",
        ", ".join(collectives) or "none",
        f"{program['matrix_flops'] / 1e12:.1f} T",
    ]


def main(_: list[str]) -> None:
    name = _TABLES[_EXPERIMENT.value]
    path = Path(_JSON.value) / f"{name}.json"
    details = json.loads(path.read_text())["details"] if path.exists() else {}
    wanted = [entry.partition("=")[::2] for entry in _TOPOLOGIES.value]
    wrong = [f"{topology}={batch}" for topology, batch in wanted if not batch.isdigit() or int(batch) < 1]
    if wrong:
        raise app.UsageError(f"--topologies: {', '.join(wrong)}: expected TOPOLOGY=BATCH, for example v5e:4x4=16")
    for topology, batch in wanted:
        print(f"compiling for {topology}, batch {batch}", flush=True)
        details[f"{topology}={batch}"] = compiled(_EXPERIMENT.value, topology, int(batch))
        print_table(name, details).write(_JSON.value)
    if not wanted:  # columns may have changed
        print_table(name, details).write(_JSON.value)


def print_table(title: str, details: dict[str, list[dict[str, Any]]]) -> Table:
    """All that was compiled so far, in the order of names."""
    table = Table(title, _COLUMNS, **details)
    for name, programs in sorted(details.items()):
        topology, _, batch = name.partition("=")
        chips = math.prod(map(int, topology.partition(":")[2].split("x")))
        for program in programs:
            cells = ["does not fit", *[""] * 6] if program["refused"] else _cells(program, topology)
            seconds = f"{program['seconds']:.0f} s"
            table.add(topology, int(batch) // chips, program["name"], *cells, seconds, program["revision"])
    return table


if __name__ == "__main__":
    app.run(main)

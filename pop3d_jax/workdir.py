"""The folder of one run: configuration, manifest, metrics. Checkpoints live beside them (`checkpoint.py`)."""

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from typing import Any

import jax
import ml_collections
from etils import epath

_PACKAGES = (
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tensorflow-datasets",
    "numpy",
)


class WorkdirError(Exception):
    """The folder holds another run; the message says which fields differ and what to do."""


def config_to_json(config: ml_collections.ConfigDict) -> str:
    """The configuration as indented JSON."""
    return json.dumps(json.loads(config.to_json()), indent=2)


def config_from_json(text: str) -> ml_collections.ConfigDict:
    """The inverse of `config_to_json`; lists come back as tuples, as experiments write them."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    return ml_collections.ConfigDict(tuples(json.loads(text)))


def read_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
    """The configuration that a workdir was trained with.

    Raises:
      WorkdirError: the folder has none.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise WorkdirError(f"{path} does not exist: --workdir must name a folder that `pop3d_jax.train` wrote")
    return config_from_json(path.read_text())


# Fields that may change when a run goes on: they touch neither its numbers nor its checkpoints.
_FREE_FIELDS = (
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_every",
    "eval_batch_size",
    "mesh",
    "data.workers",
    "points.raw_capacity",
    "export",
)


def _flat(config: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def prepare(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> None:
    """Creates the folder, or checks that it belongs to the same experiment; the first host writes config.json.

    Raises:
      WorkdirError: the folder was trained with other settings.
    """
    workdir = epath.Path(workdir)
    path = workdir / "config.json"
    if path.exists():
        before, now = _flat(json.loads(path.read_text())), _flat(json.loads(config.to_json()))
        differing = [
            f"config.{key}: was {before.get(key)!r}, is {now.get(key)!r}"
            for key in sorted(set(before) | set(now))
            if before.get(key) != now.get(key)
            and not any(key == field or key.startswith(field + ".") for field in _FREE_FIELDS)
        ]
        if differing:
            raise WorkdirError(
                f"{workdir} holds a run of other settings:\n  "
                + "\n  ".join(differing)
                + "\nTrain into another --workdir, or give the settings it began with."
            )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(config_to_json(config))


def git_revision() -> str:
    """Commit of this code, with "-dirty" where files were changed since; says so where it is no git checkout."""
    project = epath.Path(__file__).parent.parent
    command = ["git", "-C", str(project), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


def write_manifest(workdir: epath.PathLike, *, seed: int, data: dict[str, str], step: int) -> None:
    """Adds this start to manifest.json: versions, revision, devices, seed and data fingerprints.

    Args:
      workdir: the run's folder.
      seed: of the run.
      data: split -> fingerprint of its records.
      step: where this start takes up the run.
    """
    if jax.process_index():
        return
    path = epath.Path(workdir) / "manifest.json"
    starts = json.loads(path.read_text())["starts"] if path.exists() else []
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "first_step": step,
            "seed": seed,
            "data_fingerprints": data,
            "git_revision": git_revision(),
            "command": sys.argv,
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "devices": [str(device) for device in jax.devices()],
            "processes": jax.process_count(),
        }
    )
    path.write_text(json.dumps({"starts": starts}, indent=2))


class MetricWriter:
    """Scalars to metrics.jsonl and TensorBoard; a resumed run takes back what lies behind its checkpoint.

    TensorBoard files are written to local folders only; metrics.jsonl also to buckets. Of several hosts, which all have
    the same numbers, the first one writes.
    """

    def __init__(self, workdir: epath.PathLike, first_step: int):
        self._silent = jax.process_index() != 0
        if self._silent:
            return
        self._path = epath.Path(workdir) / "metrics.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        # A killed process may leave half a line at the end.
        whole = [line for line in lines if line.startswith("{") and line.endswith("}")]
        self._lines = [line for line in whole if json.loads(line)["step"] <= first_step]
        self._path.write_text("".join(line + "\n" for line in self._lines))
        self._remote = "://" in str(workdir)
        # Not at the top: where PyTorch is installed it comes along, a second and a half that only training needs.
        from tensorboardX import SummaryWriter

        self._tensorboard = (
            None if self._remote else SummaryWriter(str(epath.Path(workdir) / "tensorboard"), purge_step=first_step)
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line in each; `step` counts finished steps."""
        if self._silent:
            return
        self._lines.append(json.dumps({"step": step, **values}))
        if self._remote:  # objects in a bucket cannot be appended to
            self._path.write_text("".join(line + "\n" for line in self._lines))
            return
        with self._path.open("a") as file:
            file.write(self._lines[-1] + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what TensorBoard's writer still holds."""
        if not self._silent and self._tensorboard:
            self._tensorboard.close()

"""Fixtures of the whole suite: where golden data is, and shapes checked at run time."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Workers of the input pipeline and command tests inherit this: no telemetry, no hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from jaxtyping import install_import_hook

# Every signature of the package is checked against the arrays it really gets.
_hook = install_import_hook("pop3d_jax", "beartype.beartype")

import pop3d_jax  # noqa: E402, F401 (sets what XLA reads when it starts, before any test asks for a device)

_PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Golden data: POP3D_GOLDEN_DIR, else ../shared/golden, else the free copy in tests/golden."""
    named = os.environ.get("POP3D_GOLDEN_DIR")
    if named:
        path = Path(named).resolve()
        if not path.is_dir():
            pytest.fail(f"POP3D_GOLDEN_DIR={named} is not a folder")
        return path
    shared = _PROJECT.parent / "shared" / "golden"
    return shared if shared.is_dir() else _PROJECT / "tests" / "golden"


@pytest.fixture(scope="session")
def golden_file(golden_dir: Path) -> Callable[[str], Path]:
    """Path of a golden file or folder by its relative name; skips the test where the set has no such file."""

    def find(name: str) -> Path:
        path = golden_dir / name
        if not path.exists():
            pytest.skip(f"the golden set {golden_dir} has no {name}: set POP3D_GOLDEN_DIR to a folder that has it")
        return path

    return find


@pytest.fixture(scope="session")
def tiny_clip_folder() -> Path:
    """A CLIP of random weights in Hugging Face format, from the free golden data."""
    return _PROJECT / "tests" / "golden" / "clip" / "tiny_clip"


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic world of three scenes at a tenth of the images' scale, as the command writes it."""
    folder = tmp_path_factory.mktemp("small_world") / "world"
    _run_module("data_prep.synthetic", out=folder, scenes=3, keyframes=2, seed=0, image_scale=0.1)
    return folder


@pytest.fixture(scope="session")
def small_records(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of the small world, splits train and val."""
    folder = tmp_path_factory.mktemp("small_records") / "records"
    for split in ("train", "val"):
        _run_module("data_prep.build", source=small_world, version="v1.0-trainval", split=split, out=folder)
    return folder


def _run_module(module: str, **arguments: object) -> None:
    command = [sys.executable, "-m", module, *(f"--{name}={value}" for name, value in arguments.items())]
    finished = subprocess.run(command, cwd=_PROJECT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr

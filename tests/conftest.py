"""Fixtures of the whole suite: where golden data is, and shapes checked at run time."""

import atexit
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation of programs that run for milliseconds.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Tests and the processes they start compile the same programs again and again: once is enough.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="pop3d_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# What commands keep for the user is kept for the suite instead, and shared by its processes.
if "POP3D_TESTS_CACHE" not in os.environ:
    os.environ["POP3D_TESTS_CACHE"] = tempfile.mkdtemp(prefix="pop3d_jax_tests_cache_")
    atexit.register(shutil.rmtree, os.environ["POP3D_TESTS_CACHE"], ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = os.environ["POP3D_TESTS_CACHE"]
# Workers of the input pipeline and command tests inherit this: no telemetry, no hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ml_collections
import pytest
from filelock import FileLock
from jaxtyping import install_import_hook

# Every signature of the package is checked against the arrays it really gets.
_hook = install_import_hook("pop3d_jax", "beartype.beartype")
# The package sets what XLA reads when it starts: import it before any test asks for a device.
importlib.import_module("pop3d_jax")


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
def dinov2_folder() -> Path:
    """A DINOv2 of random weights in Hugging Face format, from the free golden data."""
    return _PROJECT / "tests" / "golden" / "clip" / "tiny_dinov2"


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`make_once(name, make)`: the folder that `make(folder)` filled, once for all processes of the suite."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / name
        with FileLock(root / f"{name}.lock"):
            if not (root / f"{name}.made").exists():
                folder.mkdir()
                make(folder)
                (root / f"{name}.made").touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def small_world(make_once) -> Path:
    """A synthetic world of three scenes at a tenth of the images' scale, as the command writes it."""

    def make(folder: Path) -> None:
        _run_module("data_prep.synthetic", out=folder / "world", scenes=3, keyframes=2, seed=0, image_scale=0.1)

    return make_once("small_world", make) / "world"


@pytest.fixture(scope="session")
def small_records(small_world: Path, make_once) -> Path:
    """Records of the small world, splits train and val."""

    def make(folder: Path) -> None:
        for split in ("train", "val"):
            _run_module(
                "data_prep.build", source=small_world, version="v1.0-trainval", split=split, out=folder / "records"
            )

    return make_once("small_records", make) / "records"


def _layout_world(make_once: Callable[[str, Callable[[Path], object]], Path], layout: str, **flags: object) -> Path:
    def make(folder: Path) -> None:
        _run_module("data_prep.synthetic", out=folder / "world", layout=layout, scenes=2, keyframes=2, seed=0, **flags)

    return make_once(f"{layout}_world", make) / "world"


@pytest.fixture(scope="session")
def semantic_kitti_world(make_once) -> Path:
    """A synthetic world in SemanticKITTI's layout: sequences 00 (train) and 08 (val), two key frames each."""
    return _layout_world(make_once, "semantic_kitti", image_scale=0.5)


@pytest.fixture(scope="session")
def pandaset_world(make_once) -> Path:
    """A synthetic world in PandaSet's layout: scenes 001 (train) and 077 (val), two key frames each."""
    return _layout_world(make_once, "pandaset", image_scale=0.25)


@pytest.fixture(scope="session")
def semantic_kitti_records(semantic_kitti_world: Path, make_once) -> Path:
    """Records of the world in SemanticKITTI's layout, splits train and val."""
    return _layout_records(make_once, semantic_kitti_world, "semantic_kitti")


@pytest.fixture(scope="session")
def pandar64_records(pandaset_world: Path, make_once) -> Path:
    """Records of the spinning lidar of the world in PandaSet's layout, splits train and val."""
    return _layout_records(make_once, pandaset_world, "pandar64")


@pytest.fixture(scope="session")
def pandar_gt_records(pandaset_world: Path, make_once) -> Path:
    """Records of the forward lidar of the world in PandaSet's layout, splits train and val."""
    return _layout_records(make_once, pandaset_world, "pandar_gt")


def _layout_records(make_once: Callable[[str, Callable[[Path], object]], Path], world: Path, dataset: str) -> Path:
    def make(folder: Path) -> None:
        for split in ("train", "val"):
            _run_module("data_prep.build", dataset=dataset, source=world, split=split, out=folder / "records")

    return make_once(f"{dataset}_records", make) / "records"


def small_fields(records: Path, teacher: Path) -> dict[str, object]:
    """Fields that make the demo's experiment as small as it goes, on the small world."""
    return {
        "data.records": str(records),
        "data.image_hw": (64, 96),
        "data.teacher_image_hw": (48, 80),
        "data.max_feature_points": 2_000,
        "data.sample_feature_points": 2_000,
        "data.photometric": True,
        "model.backbone_blocks": (1, 1, 1, 1),
        "model.backbone_width": 8,
        "model.grid_size": (12, 10, 4),
        "model.embed_dims": 16,
        "model.num_heads": 2,
        "model.num_layers": 1,
        "model.feature_dim": 16,
        "model.dropout": 0.1,
        "model.grid_mask": True,
        "teacher.path": str(teacher),
        # The program of Muon, the demo's optimiser, takes longer to compile: 27 s, this one 17 s.
        "optim.name": "adamw",
        "optim.learning_rate": 1e-3,
        "total_steps": 8,
        "log_every": 1,
        "checkpoint_every": 2,
        "eval_every": 100,
        "batch_size": 2,
    }


@pytest.fixture
def small_config(small_records: Path, tiny_clip_folder: Path) -> ml_collections.ConfigDict:
    """The experiment of `small_run`."""
    config = importlib.import_module("configs.demo").get_config()
    config.update_from_flattened_dict(small_fields(small_records, tiny_clip_folder))
    return config


@pytest.fixture(scope="session")
def small_train(small_records: Path, tiny_clip_folder: Path) -> Callable[..., subprocess.Popen]:
    """Starts the training command of the small experiment in a process of its own: `small_train(workdir, *flags)`."""

    def start(workdir: Path, *more: str, environment: Mapping[str, str] = MappingProxyType({})) -> subprocess.Popen:
        fields = [f"--config.{name}={value}" for name, value in small_fields(small_records, tiny_clip_folder).items()]
        command = [sys.executable, "-m", "pop3d_jax.train", "--config=configs/demo.py", f"--workdir={workdir}"]
        return subprocess.Popen(
            [*command, *fields, *more], cwd=_PROJECT, env=os.environ | environment, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.fixture(scope="session")
def small_run(small_train: Callable[..., subprocess.Popen], make_once) -> Path:
    """Workdir of a finished, unbroken run of the small experiment."""

    def make(folder: Path) -> None:
        process = small_train(folder / "run")
        _, log = process.communicate(timeout=400)
        assert process.returncode == 0, log

    return make_once("small_run", make) / "run"


@pytest.fixture(scope="session")
def small_probe_run(small_records: Path, make_once) -> Path:
    """Workdir of a finished run of linear probing, from nothing, on the small world's records; beside it RECORDS."""

    def make(folder: Path) -> None:
        (folder / "records").mkdir()
        (folder / "records" / "nuscenes").symlink_to(small_records, target_is_directory=True)
        fields = {
            "data.records": folder / "records",
            "data.workers": 0,
            "points.capacity": 8192,
            "points.max_points": 2048,
            "points.voxel_size": 0.5,
            "points.neighbors": 4,
            "model.channels": 16,
            "model.depth": 3,
            "model.grid_shapes": ((32, 32), (32, 8), (32, 8)),
            "model.remat": "none",
            "optim.warmup_epochs": 0.0,
            "optim.warmup_steps": 1,
            "optim.learning_rate": 0.05,
            "total_steps": 3,
            "batch_size": 2,
            "eval_batch_size": 2,
            "eval_every": 0,
        }
        more = {f"config.{name}": value for name, value in fields.items()}
        _run_module("pop3d_jax.train", config="configs/scalr_probe.py:nuscenes", workdir=folder / "run", **more)

    return make_once("small_probe_run", make) / "run"


@pytest.fixture(scope="session")
def lidar_records(small_records: Path, make_once) -> Path:
    """The small world's records where experiments of ScaLR look for them: in a folder by the data set's name."""
    return make_once("lidar_records", lambda folder: (folder / "nuscenes").symlink_to(small_records))


def small_lidar_fields(records: Path, teacher: Path) -> dict[str, object]:
    """Fields that make ScaLR's demo as small as it goes, on the small world, towards a tiny DINOv2."""
    return {
        "data.records": str(records),
        "points.max_points": 1024,
        "points.image_hw": (28, 56),
        "model.channels": 16,
        "model.depth": 3,
        "model.grid_shapes": ((16, 16), (16, 4), (16, 4)),
        "model.output_channels": 48,
        "teacher.name": "dinov2",
        "teacher.path": str(teacher),
        "teacher.variant": "official",
        "optim.warmup_steps": 2,
        "total_steps": 40,
        "log_every": 1,
        "checkpoint_every": 4,
        "batch_size": 2,
    }


@pytest.fixture
def small_lidar_config(lidar_records: Path, dinov2_folder: Path) -> ml_collections.ConfigDict:
    """The distillation of `small_lidar_run`."""
    config = importlib.import_module("configs.demo_scalr").get_config("nuscenes")
    config.update_from_flattened_dict(small_lidar_fields(lidar_records, dinov2_folder))
    return config


@pytest.fixture(scope="session")
def small_lidar_train(lidar_records: Path, dinov2_folder: Path) -> Callable[..., subprocess.Popen]:
    """Starts the small distillation in a process of its own: `small_lidar_train(workdir, *flags)`."""

    def start(workdir: Path, *more: str) -> subprocess.Popen:
        fields = [
            f"--config.{name}={value}" for name, value in small_lidar_fields(lidar_records, dinov2_folder).items()
        ]
        experiment = f"--config={_PROJECT}/configs/demo_scalr.py:nuscenes"
        command = [sys.executable, "-m", "pop3d_jax.train", experiment, f"--workdir={workdir}", *fields, *more]
        return subprocess.Popen(command, cwd=_PROJECT, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="session")
def small_lidar_run(small_lidar_train: Callable[..., subprocess.Popen], make_once) -> Path:
    """Workdir of a finished, unbroken small distillation."""

    def make(folder: Path) -> None:
        process = small_lidar_train(folder / "run")
        _, log = process.communicate(timeout=400)
        assert process.returncode == 0, log

    return make_once("small_lidar_run", make) / "run"


@pytest.fixture(scope="session")
def small_distillation_run(small_records: Path, tiny_clip_folder: Path, make_once) -> Path:
    """Workdir of a finished distillation of two steps, from the tiny CLIP, on the small world's records."""

    def make(folder: Path) -> None:
        (folder / "records").mkdir()
        (folder / "records" / "nuscenes").symlink_to(small_records)
        fields = {
            "data.records": folder / "records",
            "points.capacity": 1024,
            "points.max_points": 1024,
            "points.image_hw": (48, 80),
            "model.channels": 16,
            "model.depth": 3,
            "model.output_channels": 16,
            "teacher.path": tiny_clip_folder,
            "total_steps": 2,
            "optim.warmup_steps": 1,
            "log_every": 1,
            "checkpoint_every": 2,
        }
        flags = {f"config.{name}": value for name, value in fields.items()}
        _run_module("pop3d_jax.train", config="configs/demo_scalr.py:nuscenes", workdir=folder / "run", **flags)

    return make_once("small_distillation_run", make) / "run"


@pytest.fixture(scope="session")
def small_grids(small_run: Path, make_once) -> Path:
    """Exported grids of the small run: all voxels of the training split's four key frames, of two scenes."""

    def make(folder: Path) -> None:
        out = folder / "grids.zarr"
        _run_module("pop3d_jax.export", workdir=small_run, split="train", out=out, dense=True, precision="float16")

    return make_once("small_grids", make) / "grids.zarr"


def _run_module(module: str, **arguments: object) -> None:
    command = [sys.executable, "-m", module, *(f"--{name}={value}" for name, value in arguments.items())]
    finished = subprocess.run(command, cwd=_PROJECT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr

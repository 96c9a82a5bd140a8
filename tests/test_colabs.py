"""The notebooks: what is committed of them, and that they run from end to end."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from conftest import small_fields
from IPython.core.inputtransformer2 import TransformerManager

from colabs.execute import FOLDER, NAMES, execute, has_tag, seconds_of_cells
from data_prep.splits import scene_names
from pop3d_jax.data.records import RecordSource
from pop3d_jax.nuscenes import CLASS_NAMES, LIDARSEG_TO_CLASS

_PROJECT = FOLDER.parent
_MOST_BYTES = 1.5e6
# A machine's own folders; Colab's /content is everybody's.
_MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|opt|root|tmp|usr|var|work|Users)/")
_PAGE = '<iframe srcdoc="'


def committed(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """What a cell has written, pictures left out."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        elif output.output_type == "error":
            yield f"{output.ename}: {output.evalue}"
        else:
            yield from (text for kind, text in output.data.items() if not kind.startswith("image/"))


def written(notebook):
    return "\n".join(text for cell in code_cells(notebook) for text in texts(cell))


def pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", ()) for output in outputs)


def errors(notebook):
    """(cell, output) of every cell that raised."""
    return [(cell, output) for cell in code_cells(notebook) for output in cell.outputs if output.output_type == "error"]


def assigned_names(cell):
    """The variables that a cell gives a value."""
    lines = [line for line in cell.source.splitlines(keepends=True) if not line.startswith("%%")]
    tree = ast.parse(TransformerManager().transform_cell("".join(lines)))
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def run(name, folder, *, optimised=False, **parameters):
    """Executes a notebook with this project's code, whatever else is installed, as `execute` does."""
    environment = os.environ | {"PYTHONPATH": str(_PROJECT)}
    if optimised:  # the suite asks XLA for quick compilation, which long training pays for
        environment.pop("XLA_FLAGS", None)
    return execute(name, folder, parameters, environment)


def as_flags(fields):
    return " ".join(shlex.quote(f"--config.{name}={value}") for name, value in fields.items())


# What the cells of training set themselves. A tuple given twice would be two tuples in one, so no flag is.
_SET_BY_NOTEBOOKS = ("data.records", "teacher.path", "total_steps", "log_every", "checkpoint_every", "eval_every")


def smallest_network(*set_too):
    """The suite's smallest network, for the tiny CLIP of the golden data, as flags; less what the notebooks set.

    With `training_steps=total_steps()` its program is that of `small_run`, compiled once for the suite; two steps run.
    """
    fields = small_fields("", "")
    return as_flags({name: fields[name] for name in fields.keys() - {*_SET_BY_NOTEBOOKS, *set_too}}) + " --stop_after=2"


def total_steps():
    return small_fields("", "")["total_steps"]


class TestCommitted:
    @pytest.mark.parametrize("name", NAMES)
    def test_they_are_small_and_free_of_errors_and_of_machine_paths(self, name):
        assert (FOLDER / f"{name}.ipynb").stat().st_size < _MOST_BYTES
        notebook = committed(name)
        nbformat.validate(notebook)
        for cell, output in errors(notebook):
            assert has_tag(cell, "stops"), output.evalue
            assert output.ename == "SystemExit"
        for cell in notebook.cells:
            for text in [cell.source, *(texts(cell) if cell.cell_type == "code" else ())]:
                assert not _MACHINE_PATH.search(text), _MACHINE_PATH.search(text)
                assert "error: " not in text
                assert "Traceback" not in text

    @pytest.mark.parametrize("name", NAMES)
    def test_every_cell_was_executed_up_to_the_one_that_stops(self, name):
        cells = code_cells(committed(name))
        stops = [number for number, cell in enumerate(cells) if has_tag(cell, "stops")]
        executed = cells[: stops[0] + 1] if stops else cells
        assert [cell.execution_count for cell in executed] == list(range(1, len(executed) + 1))
        assert not any(cell.outputs for cell in cells[len(executed) :])

    def test_the_outputs_are_those_of_the_synthetic_world(self):
        demo, search, reproduce = map(committed, NAMES)
        assert pictures(demo) >= 1
        assert pictures(search) >= 1
        assert pictures(reproduce) == 0
        (cell,) = [cell for cell in search.cells if has_tag(cell, "parameters")]
        assert '\nnuscenes = ""' in cell.source
        assert not any(cell.outputs for book in (demo, search) for cell in book.cells if has_tag(cell, "not_kept"))

    def test_they_are_installed_alike(self):
        (setup,) = {cell.source for name in NAMES for cell in code_cells(committed(name)) if "uv venv" in cell.source}
        assert 'find_spec("pop3d_jax")' in setup
        # A notebook's kernel names its own backend of matplotlib there, which the project's environment has not.
        assert "\n%env MPLBACKEND=Agg\n" in setup

    @pytest.mark.parametrize("name", NAMES)
    def test_no_cell_changes_a_setting(self, name):
        """Cells may be run twice: a setting that one of them adds to would grow."""
        notebook = committed(name)
        (settings,) = [cell for cell in notebook.cells if has_tag(cell, "parameters")]
        others = [cell for cell in code_cells(notebook) if cell is not settings]
        assert set.union(*map(assigned_names, others)).isdisjoint(assigned_names(settings))

    @pytest.mark.parametrize("name", NAMES)
    def test_phrases_are_quoted_for_the_shell(self, name):
        commands = "\n".join(cell.source for cell in code_cells(committed(name)))
        assert commands.count("--text ") == commands.count("--text {shlex.quote(phrase)}")

    def test_ruff_has_nothing_to_say(self):
        files = [f"colabs/{name}.ipynb" for name in NAMES]
        for arguments in (["check"], ["format", "--check"]):
            done = subprocess.run(
                [sys.executable, "-m", "ruff", *arguments, *files],
                cwd=_PROJECT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
        covered = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--show-files", "."],
            cwd=_PROJECT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert all(file in covered.stdout for file in files)


def test_a_parameter_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"demo.ipynb has no parameters step: it has .*training_steps"):
        execute("demo", tmp_path, {"step": 3})


def check_demo(notebook, folder):
    assert not errors(notebook)
    text = written(notebook)
    assert "error: " not in text
    assert "similarity     right     ahead        up  metres from the lidar" in text
    assert "occupancy IoU, observed voxels" in text
    assert re.search(r"everything but the installation: \d+ min \d+ s, on \d+ processor cores", text)
    assert pictures(notebook) == 1
    assert (folder / "answer.png").read_bytes().startswith(b"\x89PNG")
    (page,) = [text for cell in notebook.cells if has_tag(cell, "not_kept") for text in texts(cell) if _PAGE in text]
    assert "&lt;canvas" in page or "&lt;script" in page


@pytest.mark.slow
def test_the_demo_runs(tiny_clip_folder, tmp_path):
    notebook = run(
        "demo",
        tmp_path,
        scenes=3,
        image_scale=0.1,
        teacher=str(tiny_clip_folder),
        training_steps=total_steps(),
        key_frame=0,
        fields=smallest_network(),
    )
    check_demo(notebook, tmp_path / "work" / "demo")
    assert "training: 2 of 2" in written(notebook) or "2/2" in written(notebook)
    cells = list(seconds_of_cells(notebook))
    assert [number for number, _, _ in cells] == [cell.execution_count for cell in code_cells(notebook)]
    assert any(command.startswith("!{python} -m pop3d_jax.train ") and seconds > 0 for _, command, seconds in cells)


@pytest.mark.slow
def test_the_demo_answers_rightly(tmp_path):
    folder = tmp_path / "work" / "demo"
    check_demo(run("demo", tmp_path, optimised=True), folder)
    results = json.loads((folder / "results.json").read_text())
    scores = {row["phrase"]: row["average_precision"] / row["matching_share"] for row in results["retrieval"]}
    # What the notebook says of itself; measured: see its outputs.
    assert scores["a tree"] > 5
    assert scores["a building"] > 4
    assert results["scores"]["miou_voxels_occupied"] > 3 * results["baselines"]["miou_voxels_occupied_shuffled_prompts"]


def check_search(notebook, folder, phrases=("a red car", "a tree")):
    assert not errors(notebook)
    text = written(notebook)
    assert "error: " not in text
    for phrase in phrases:
        assert f"“{phrase}”: " in text
    assert re.search(r"^\d+ key frames, [\d,]+ voxels, features as int8$", text, re.MULTILINE)
    assert re.search(r"features \(\d+, \d+\)", text)
    assert pictures(notebook) == 1
    assert (folder / "hits.png").read_bytes().startswith(b"\x89PNG")
    assert any(_PAGE in text for cell in notebook.cells if has_tag(cell, "not_kept") for text in texts(cell))


@pytest.mark.slow
def test_the_search_runs_in_full(tmp_path):
    check_search(run("export_and_search", tmp_path, optimised=True), tmp_path / "work" / "search")


@pytest.fixture
def mini(small_world, tmp_path):
    """The small world as v1.0-mini without the lidarseg download: its tables, its scenes' names, its folder."""
    root = tmp_path / "My Drive" / "nuscenes"
    tables = root / "v1.0-mini"
    shutil.copytree(small_world / "v1.0-trainval", tables)
    (root / "samples").symlink_to(small_world / "samples")
    (tables / "lidarseg.json").unlink()
    categories = json.loads((tables / "category.json").read_text())
    for row in categories:
        del row["index"]
    (tables / "category.json").write_text(json.dumps(categories))
    # Two scenes of three are those of the split train.
    names = dict(zip(scene_names("train")[:2], scene_names("mini_train")[:2], strict=True))
    names[scene_names("val")[0]] = scene_names("mini_val")[0]
    scenes = json.loads((tables / "scene.json").read_text())
    (tables / "scene.json").write_text(json.dumps([row | {"name": names[row["name"]]} for row in scenes]))
    return root


@pytest.mark.slow
def test_the_search_takes_a_folder_of_nuscenes_mini(mini, tiny_clip_folder, tmp_path):
    notebook = run(
        "export_and_search",
        tmp_path,
        nuscenes=str(mini),
        clip=str(tiny_clip_folder),
        clip_dim=small_fields("", "")["model.feature_dim"],
        clip_image_hw=small_fields("", "")["data.teacher_image_hw"],
        training_steps=total_steps(),
        fields=smallest_network("model.feature_dim", "data.teacher_image_hw"),
    )
    check_search(notebook, tmp_path / "work" / "search")
    text = written(notebook)
    assert "recording scenes" not in text
    assert f"4 key frames in 2 scenes of mini_train; {len(scene_names('mini_train')) - 2} scenes are not" in text
    assert f"2 key frames in 1 scenes of mini_val; {len(scene_names('mini_val')) - 1} scenes are not" in text
    assert scene_names("mini_val")[0] in text  # where the hits are


def test_a_wrong_folder_of_nuscenes_stops_the_search(tmp_path):
    ((_, output),) = errors(run("export_and_search", tmp_path, nuscenes="nowhere"))
    assert output.ename == "SystemExit"
    assert output.evalue.startswith("nowhere has no v1.0-mini: name in `nuscenes` the folder")


def test_reproduce_verifies_first_and_stops_where_files_are_missing(tmp_path):
    notebook = run("reproduce", tmp_path, families="schedule", test="other")
    assert re.search(r"\d+ comparisons on cpu in \d+ s: all within tolerance", written(notebook))
    ((cell, output),) = errors(notebook)
    assert has_tag(cell, "stops")
    assert output.evalue.startswith(
        "To be supplied by you: pop3d_weights.pth, zeroshot_weights.pth, nuscenes/v1.0-trainval, nuscenes/lidarseg, "
        "retrieval_benchmark/retrieval_anns_val.csv, retrieval_benchmark/retrieval_anns_test.csv, other/v1.0-test."
    )
    after = code_cells(notebook)[code_cells(notebook).index(cell) + 1 :]
    assert len(after) >= 4
    assert not any(cell.outputs for cell in after)


@pytest.mark.slow
def test_reproduce_verifies_everything(tmp_path):
    notebook = run("reproduce", tmp_path)
    assert re.search(r"\d+ comparisons on cpu in \d+ s: all within tolerance", written(notebook))
    assert [output.ename for _, output in errors(notebook)] == ["SystemExit"]


@pytest.mark.slow
def test_reproduce_ends_in_the_papers_table(small_world, small_records, small_run, tiny_clip_folder, tmp_path):
    """Files made in the published formats take the place of the authors' and of nuScenes: every cell runs."""
    torch = pytest.importorskip("torch", reason="PyTorch, an extra, is not installed: pip install torch")
    weights = tmp_path / "weights.safetensors"
    subprocess.run(
        [sys.executable, "-m", "pop3d_jax.convert", f"--to_torch={weights}", f"--workdir={small_run}"],
        cwd=_PROJECT, check=True, capture_output=True,
    )  # fmt: skip
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32))
    torch.save((matrix, list(range(32))), tmp_path / "zeroshot_weights.pth")
    key_frame = RecordSource(small_records, "val")[0]
    benchmark = tmp_path / "benchmark"
    (benchmark / "annotations").mkdir(parents=True)
    road = LIDARSEG_TO_CLASS[key_frame.lidarseg] == CLASS_NAMES.index("driveable_surface")
    np.save(benchmark / "annotations" / "road.npy", road)
    line = f"{key_frame.sample_token};val;annotations/road.npy;matching_points/none.npy;the road\n"
    (benchmark / "retrieval_anns_val.csv").write_text(line)
    sizes = {name: value for name, value in small_fields("", "").items() if name.startswith("model.")}
    images = {"data.image_hw": (64, 96), "data.teacher_image_hw": (48, 80)}
    notebook = run(
        "reproduce",
        tmp_path,
        weights=str(weights),
        text_weights=str(tmp_path / "zeroshot_weights.pth"),
        benchmark=str(benchmark),
        trainval=str(small_world),
        test="",
        clip=str(tiny_clip_folder),
        families="schedule",
        fields=as_flags(sizes | images),
        experiment="configs/demo.py",
    )
    assert not errors(notebook), errors(notebook)
    text = written(notebook)
    assert "error: " not in text
    (table,) = [text for text in texts(code_cells(notebook)[-1]) if text.startswith("| score | paper | here |")]
    assert re.search(r"\| 16\.66 \| \d+\.\d\d \|", table)
    assert re.search(r"\| 24\.1 \| \d+\.\d \|", table)
    assert "val_miou_vox_clip_all" in text

"""The command that scores on Occ3D's grid, from end to end, and the page made of its reports."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.splits import SplitError
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.evaluate_occupancy import evaluate_occupancy
from pop3d_jax.grids.feature_grids import FeatureGrids
from pop3d_jax.occ3d.grid import FREE, MASKS, OCC3D_CLASSES, OTHER_FLAT, OTHERS
from pop3d_jax.occ3d.ground_truth import Occ3DGroundTruth
from pop3d_jax.occ3d.label_files import OccupancyFileError
from pop3d_jax.occ3d.report import RAYIOU, RULE_NAMES, format_report, spread
from pop3d_jax.occ3d.results_page import ReportError, read_reports, results_page

_PROJECT = Path(__file__).resolve().parent.parent


def command(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=_PROJECT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def truth(small_world, make_once):
    """True labels of the small world's held-out scene."""

    def make(folder):
        done = command("data_prep.dense_labels", f"--world={small_world}", "--split=val", f"--out={folder / 'gts'}")
        assert done.returncode == 0, done.stderr

    return make_once("small_truth", make) / "gts"


@pytest.fixture(scope="module")
def perfect(truth, tmp_path_factory):
    """The ground truth given as a prediction."""
    folder = tmp_path_factory.mktemp("perfect")
    labels = Occ3DGroundTruth(truth)
    for token in labels.sample_tokens:
        np.savez_compressed(folder / f"{token}.npz", labels[token].semantics)
    return folder


def score(truth, predictions, rules=("challenge",), masks=MASKS, **more):
    return evaluate_occupancy(str(truth), str(predictions), rules=rules, masks=masks, **more)


def test_a_perfect_prediction_is_perfect_by_every_rule(truth, perfect, small_records):
    report = score(truth, perfect, RULE_NAMES, records=str(small_records), split="val")
    rows = report["scores"]["files"]
    assert len(rows) == (len(RULE_NAMES) - 1) * len(MASKS) + 1
    assert {row["rule"] for row in rows} == set(RULE_NAMES)
    labels = Occ3DGroundTruth(truth)
    for row in rows:
        present = {
            OCC3D_CLASSES[label]
            for token in labels.sample_tokens
            for label in np.unique(labels[token].semantics[labels[token].mask(row["mask"])])
        }
        if row["rule"].startswith("occnerf") and not set(row["classes"]) <= present:
            assert np.isnan(row["miou"])  # plain means, as these programs take them
        elif row["rule"] == "locc":
            assert row["miou"] == pytest.approx(100 * len(present - {"free"}) / 17, abs=1e-3)
        else:
            assert row["miou"] == pytest.approx(100)
        if row["rule"] != RAYIOU:
            assert row["iou"] == pytest.approx(100)
            assert row["unseen_percent"] == 0
    assert rows[-1]["rays"] > 10_000
    assert rows[-1]["per_threshold"] == [100, 100, 100]
    assert report["frames"] == 2
    assert report["ground_truth"] == "true labels of a synthetic world, seed 0"  # not Occ3D's
    assert not report["partial"]
    assert report["prompts"] is None
    text = format_report(report)
    assert all(f"{rule}: " in text for rule in RULE_NAMES)
    assert "PARTIAL" not in text
    json.dumps(report)


@pytest.mark.slow
def test_a_run_is_asked_and_looked_up(truth, small_run, small_records, tmp_path):
    out = tmp_path / "ours.json"
    done = command(
        "pop3d_jax.evaluate_occupancy", f"--ground_truth={truth}", f"--predictions={small_run}", "--all",
        "--prompts=pop3d", f"--out={out}", "--method=ours",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["split"] == "val"
    assert report["step"] == 8
    assert set(report["scores"]) == {"queried", "resampled"}
    assert report["prompts"]["name"] == "pop3d"
    assert "prompts: pop3d (vobecant/POP3D" in done.stdout
    for name, rows in report["scores"].items():
        by_place = {(row["rule"], row["mask"]): row for row in rows}
        row = by_place["challenge", "camera"]
        assert 0 <= row["miou"] <= 100
        assert 0 < row["unseen_percent"] < 100
        # Every voxel of the mask is counted.
        labels = Occ3DGroundTruth(truth)
        assert row["voxels"] == sum(int(labels[token].mask_camera.sum()) for token in labels.sample_tokens)
        # The mean is that of the classes it names.
        known = [row["per_class_iou"][name] for name in row["classes"] if row["per_class_iou"][name] is not None]
        assert row["miou"] == pytest.approx(np.mean(known))
        low, high = spread([row for row in rows if row["rule"] != RAYIOU])
        assert f"the same prediction: {low['miou']:.2f} by {low['rule']}" in done.stdout, name
        assert low["miou"] <= row["miou"] <= high["miou"]
    page = results_page(read_reports(tmp_path))
    assert f"`{report['command']}`" in page
    # Every rule once, those of the same numbers in one row; one row more is the spread.
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ours | queried |")]
    assert sorted(rule for row in rows[:-1] for rule in row[4].split(", ")) == sorted(RULE_NAMES)
    camera = {rule: row[7] for row in rows[:-1] for rule in row[4].split(", ")}
    for row in report["scores"]["queried"]:
        if row["mask"] == "camera" and row["miou"] is not None:
            assert camera[row["rule"]] == f"{row['miou']:.2f}"


@pytest.mark.slow
def test_a_store_is_looked_up(truth, small_run, small_records, tmp_path):
    store = tmp_path / "grids.zarr"
    done = command("pop3d_jax.export", f"--workdir={small_run}", "--split=val", f"--out={store}", "--precision=float16")
    assert done.returncode == 0, done.stderr
    with pytest.raises(OccupancyFileError, match="which only records tell"):
        score(truth, store, (RAYIOU,))
    report = score(truth, store, ("challenge", RAYIOU), ("camera",), records=str(small_records), split="val")
    assert set(report["scores"]) == {"resampled"}
    assert report["frames"] == len(FeatureGrids.open(store))
    # The run's own grid, looked up likewise; the store's rounding may move single voxels from one class to another.
    of_run = score(truth, small_run, ("challenge", RAYIOU), ("camera",))["scores"]["resampled"]
    for ours, theirs in zip(report["scores"]["resampled"], of_run, strict=True):
        assert ours["miou"] == pytest.approx(theirs["miou"], abs=0.2)
    assert report["scores"]["resampled"][0]["iou"] == pytest.approx(of_run[0]["iou"], abs=0.2)


def test_rays_need_every_pose_of_a_scene(truth, perfect, small_records, tmp_path):
    """A ground truth of one key frame more than the records: its scene has another place that rays start from."""
    more, files = tmp_path / "gts", tmp_path / "files"
    shutil.copytree(truth, more)
    shutil.copytree(perfect, files)
    scene = next(entry for entry in more.iterdir() if entry.is_dir())
    shutil.copytree(next(scene.iterdir()), scene / "another")
    shutil.copy(next(files.glob("*.npz")), files / "another.npz")
    arguments = {"records": str(small_records), "split": "val"}
    assert score(more, files, **arguments)["frames"] == 3
    with pytest.raises(OccupancyFileError, match=r"have no pose for 1 of 3 \(another\) key frames"):
        score(more, files, (RAYIOU,), partial=True, **arguments)


def test_key_frames_that_the_records_skipped_are_missing(truth, perfect, small_records, tmp_path):
    records = tmp_path / "records"
    shutil.copytree(small_records, records)
    path = records / "index_val.json"
    index = json.loads(path.read_text())
    index["shards"][0]["skipped"].append({"sample_token": "damaged", "error": "made up"})
    path.write_text(json.dumps(index))
    with pytest.raises(OccupancyFileError, match=r"ground truth of 1 of 3 \(damaged\) key frames of the records"):
        score(truth, perfect, records=str(records), split="val")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts=pop3d"], "--prompts says nothing of a folder of files"),
        (["--step=3"], "--step says nothing of"),
        (["--all", "--rule=locc"], "leave --rule out"),
        (["--rule=rayiou", "--mask=lidar"], "leave --mask out"),
    ],
)
def test_flags_that_say_nothing_are_refused(truth, perfect, flags, message):
    done = command("pop3d_jax.evaluate_occupancy", f"--ground_truth={truth}", f"--predictions={perfect}", *flags)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]


def test_a_part_is_never_printed_as_the_whole(truth, perfect, small_records, tmp_path):
    files = sorted(perfect.glob("*.npz"))
    os.link(files[0], tmp_path / files[0].name)
    with pytest.raises(OccupancyFileError, match=rf"predictions of 1 of 2 \({files[1].stem}\) key frames. --partial"):
        score(truth, tmp_path)
    report = score(truth, tmp_path, partial=True)
    assert report["partial"]
    assert report["frames"] == 1
    text = format_report(report)
    assert text.count("PARTIAL, 1 key frames only: missing are predictions of 1 of 2") == 2  # above and below
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "part.json").write_text(json.dumps(report))
    assert "**PARTIAL**" in results_page(read_reports(tmp_path / "results"))


def test_gaussianflowocc_leaves_the_two_classes_out(truth, perfect, tmp_path):
    """A prediction that is wrong only where the ground truth is others or other_flat is perfect by its rule."""
    labels = Occ3DGroundTruth(truth)
    for token in labels.sample_tokens:
        semantics = labels[token].semantics.copy()
        semantics[np.isin(semantics, (OTHERS, OTHER_FLAT))] = FREE
        np.savez_compressed(tmp_path / f"{token}.npz", semantics)
    rows = {row["rule"]: row for row in score(truth, tmp_path, RULE_NAMES[:-1], ("none",))["scores"]["files"]}
    assert rows["gaussianflowocc"]["miou"] == rows["gaussianflowocc"]["iou"] == pytest.approx(100)
    assert rows["gaussianflowocc"]["voxels"] <= rows["challenge"]["voxels"]


def test_labels_accumulated_from_records(small_world, small_records, perfect, tmp_path):
    records = tmp_path / "records"  # a copy: boxes are written into it
    shutil.copytree(small_records, records)
    arguments = {"masks": ("camera",), "records": str(records), "split": "val"}
    with pytest.raises(RecordError, match=r"data_prep\.boxes"):
        score("accumulated", perfect, **arguments)
    done = command(
        "data_prep.boxes", f"--source={small_world}", "--version=v1.0-trainval", "--split=val", f"--out={records}"
    )
    assert done.returncode == 0, done.stderr
    report = score("accumulated", perfect, **arguments)
    assert "our own construction, not Occ3D's labels" in report["ground_truth"]
    assert report["frames"] == len(RecordSource(small_records, "val"))
    # Two sweeps see less than there is, and what they see is there.
    assert 5 < report["scores"]["files"][0]["iou"] < 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": [RAYIOU]}, "--records and --split"),
        ({"truth": "nowhere"}, "--ground_truth: there is no folder nowhere"),
        ({"predictions": "nowhere"}, "--predictions: there is no folder nowhere"),
        ({"truth": "accumulated"}, "name them, --records and --split"),
        ({"records": "nowhere"}, "needs --split"),
        ({"split": "valid"}, "no split 'valid'"),
    ],
)
def test_wrong_requests_are_named(truth, perfect, changes, message):
    with pytest.raises((OccupancyFileError, SplitError), match=message):
        score(**{"truth": truth, "predictions": perfect, "partial": True} | changes)


def test_an_error_is_one_line(truth, perfect):
    done = command("pop3d_jax.evaluate_occupancy", f"--ground_truth={truth}", f"--predictions={perfect}", "--all")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: RayIoU starts from the lidar's places")
    assert not done.stdout


def report_of(method="a|b", truth="Occ3D's labels.npz files", **changes):
    row = {"rule": "challenge", "mask": "camera", "classes": ["car"], "miou": 10.0, "iou": 20.0}
    rows = [row, row | {"mask": "none", "miou": 5.0}, row | {"rule": "occnerf", "miou": None}]
    report = {"method": method, "ground_truth": truth, "frames": 3, "split": "val", "partial": False, "missing": []}
    return report | {"scores": {"files": rows}, "command": "python", "prompts": None} | changes


def test_the_page_keeps_ground_truths_and_parts_apart(tmp_path):
    reports = {
        "one": report_of(),
        "two": report_of(truth="accumulated, not Occ3D's"),
        "three": report_of(method="c", partial=True, missing=["predictions of 1 of 4 (x) key frames"]),
    }
    for name, report in reports.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    out = tmp_path / "pages" / "page.md"
    done = command("pop3d_jax.occupancy_results", f"--results={tmp_path}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    sections = dict(part.split("\n", 1) for part in out.read_text().split("\n## ")[1:])
    occ3d, accumulated = sections["Against Occ3D's labels.npz files"], sections["Against accumulated, not Occ3D's"]
    # Two rows of each report's table, one of its spread.
    assert accumulated.count("| a\\|b | files | 3 of val |") == 3
    assert occ3d.count("| a\\|b | files | 3 of val |") == 3
    assert occ3d.count("| c | files | 3 of val **PARTIAL** |") == 3
    assert "**PARTIAL**, c: missing are predictions of 1 of 4 (x) key frames" in occ3d
    assert "PARTIAL" not in accumulated
    assert "| 5.00 | challenge, mask none | 10.00 | challenge, mask camera | 2.00 |" in accumulated


@pytest.mark.parametrize(
    "changes",
    [{"scores": []}, {"scores": {}}, {"scores": {"files": [{"rule": "challenge"}]}}, {"prompts": "plain"},
     {"scores": {"files": [report_of()["scores"]["files"][0] | {"rule": "unknown"}]}}],
)  # fmt: skip
def test_the_page_refuses_reports_of_another_form(tmp_path, changes):
    (tmp_path / "a.json").write_text(json.dumps(report_of(**changes)))
    with pytest.raises(ReportError, match=r"a\.json is no report .* it has no scores as this version writes them"):
        read_reports(tmp_path)


def test_the_page_refuses_what_is_no_report(tmp_path):
    with pytest.raises(ReportError, match=r"holds no \.json files"):
        read_reports(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ReportError, match=r"a\.json is damaged"):
        read_reports(tmp_path)
    (tmp_path / "a.json").write_text('{"method": "x"}')
    with pytest.raises(ReportError, match=r"a\.json is no report .* it has no ground_truth"):
        read_reports(tmp_path)

"""The retrieval command on archives in the published layout, of the synthetic world and of the real key frame."""

import json
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from data_prep.splits import SPLITS_OF_VERSION, scene_names
from pop3d_jax import evaluate_retrieval as command
from pop3d_jax.data.records import RecordSource
from pop3d_jax.data.visibility import visible_pairs
from pop3d_jax.models.clip import load_clip
from pop3d_jax.nuscenes import CAMERAS, CLASS_NAMES, LIDARSEG_TO_CLASS
from pop3d_jax.protocol import retrieval_benchmark
from pop3d_jax.retrieval import RetrievalError
from pop3d_jax.text import embed_phrases


class Archive:
    """Writes the published layout: tables, annotations/*.npy, matching_points/*.npy."""

    def __init__(self, folder):
        self.folder = folder
        self.tables = {"train": [], "val": [], "test": []}
        for name in ("annotations", "matching_points"):
            (folder / name).mkdir(parents=True)

    def add(self, split, token, phrase, matches, visible=None):
        annotation = f"annotations/{token}__{len(self.tables[split])}__retrieval.npy"
        np.save(self.folder / annotation, matches)
        points = f"matching_points/{token}__points.npy"
        if visible is not None:
            np.save(self.folder / points, visible)
        self.tables[split].append(f"{token};{split};{annotation};{points};{phrase}")

    def write(self):
        for split, lines in self.tables.items():
            if lines:
                (self.folder / f"retrieval_anns_{split}.csv").write_text("".join(f"{line}\n" for line in lines))
        return self.folder


def of_class(key_frame, name):
    return LIDARSEG_TO_CLASS[key_frame.lidarseg] == CLASS_NAMES.index(name)


def phrases_of(key_frame, classes):
    return {name: of_class(key_frame, name) for name in classes if of_class(key_frame, name).any()}


@pytest.fixture(scope="module")
def archive(small_records, tmp_path_factory):
    """Queries in val and test; the last of val answers nowhere. The test split's key frame is of train."""
    archive = Archive(tmp_path_factory.mktemp("benchmark"))
    key_frame, other = RecordSource(small_records, "val")[0], RecordSource(small_records, "train")[0]
    for name, matches in phrases_of(key_frame, ("driveable_surface", "manmade", "car", "vegetation")).items():
        archive.add("val", key_frame.sample_token, f"a {name}", matches)
    archive.add("val", key_frame.sample_token, "a ghost", np.zeros(len(key_frame.points), bool))
    archive.add("test", other.sample_token, "the road", of_class(other, "driveable_surface"))
    return archive.write()


def scored(workdir, folder, **options):
    """The command's report, and what it saw of each key frame: features, visible entries, teacher's features."""
    seen = {}
    look = command.PointFeatures.__call__

    def remember(self, key_frame):
        seen[key_frame.sample_token] = look(self, key_frame)
        return seen[key_frame.sample_token]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.PointFeatures, "__call__", remember)
        return command.evaluate_retrieval(workdir, folder, bootstrap_samples=200, **options), seen


@pytest.fixture(scope="module")
def scored_archive(small_run, archive):
    return scored(small_run, archive)


@pytest.fixture(scope="module")
def report(scored_archive):
    return scored_archive[0]


def check_rows(rows, key_frame, looked_at, clip, matches_of):
    """Every row is scikit-learn's average precision of raw products with the phrase."""
    features, visible, teacher = looked_at
    assert len(features) == len(key_frame.points)
    assert len(teacher) == len(visible)
    for row in rows:
        text = embed_phrases(clip, [row["phrase"]])[0]
        matches = matches_of(row["phrase"])
        np.testing.assert_allclose(row["student"], 100 * average_precision_score(matches, features @ text), rtol=1e-6)
        seen = matches[visible]
        found = [100 * average_precision_score(seen, values @ text) for values in (features[visible], teacher)]
        np.testing.assert_allclose([row["student_visible"], row["teacher_visible"]], found, rtol=1e-6)
        assert row["matching"] == matches.sum()
        assert row["visible_matching"] == seen.sum()


def test_scores_are_scikit_learns_for_student_and_teacher(scored_archive, small_records, tiny_clip_folder):
    report, seen = scored_archive
    key_frame = RecordSource(small_records, "val")[0]
    look = seen[key_frame.sample_token]
    rows = [row for row in report["queries"] if row["split"] == "val" and row["student_visible"] is not None]
    assert rows
    check_rows(rows, key_frame, look, load_clip(tiny_clip_folder), lambda p: of_class(key_frame, p.removeprefix("a ")))


def test_splits_come_alone_and_together(report):
    tables = report["splits"]
    assert list(tables) == ["val", "test", "valtest"]
    assert tables["valtest"]["queries"] == tables["val"]["queries"] + tables["test"]["queries"]
    assert tables["valtest"]["key_frames"] == 2
    assert (tables["val"]["undefined"], tables["test"]["undefined"]) == (1, 0)
    assert tables["val"]["student"]["queries"] == tables["val"]["queries"] - 1
    for name in ("student", "student_visible", "teacher_visible", "difference_visible"):
        interval = tables["valtest"][name]
        assert interval["low"] <= interval["mean"] <= interval["high"]
    assert json.loads(json.dumps(report)) == report


def test_the_tables_are_readable(report):
    text = command.format_tables(report)
    assert "POP-3D - teacher, paired" in text
    assert "left out of the means: 1 queries" in text
    assert "published" not in text  # these are not the published queries
    assert "a ghost" in text
    assert "a ghost" not in command.format_tables(report, per_query=False)
    # Paths are as long as they are.
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 120


def test_published_numbers_stand_beside_the_published_queries(report):
    published = retrieval_benchmark()
    table = report["splits"]["val"] | {"queries": published["expected_counts"]["val"]}
    text = command.format_tables(report | {"splits": {"val": table}}, per_query=False)
    assert f"{published['expected_map']['val']['pop3d']:.1f}" in text
    assert "published: MaskCLIP+" in text


def test_missing_key_frames_are_listed_with_the_way_out(small_run, small_records, tmp_path):
    archive = Archive(tmp_path / "benchmark")
    known = RecordSource(small_records, "val").sample_tokens[0]
    archive.add("val", known, "a car", np.ones(7, bool))
    for number in range(5):
        archive.add("test", f"unknown{number}", "a car", np.ones(7, bool))
    folder = archive.write()
    with pytest.raises(RetrievalError, match=r"5 of 6 key frames .*unknown0, unknown1, unknown2, \.\.\..*data_prep"):
        command.evaluate_retrieval(small_run, folder)
    # What is there has an annotation of another sweep: both counts are told, nothing is skipped in silence.
    with pytest.raises(RetrievalError, match=f"sample {known}.*7 annotated points, [0-9]+ in the sweep"):
        command.evaluate_retrieval(small_run, folder, on_missing="skip")
    with pytest.raises(RetrievalError, match="no key frame of the splits test"):
        command.evaluate_retrieval(small_run, folder, splits=["test"], on_missing="skip")


@pytest.mark.slow
def test_without_teacher_and_with_skipped_key_frames_the_command_ends_with_status_three(
    small_run, archive, small_records, tmp_path
):
    table = (archive / "retrieval_anns_test.csv").read_text()
    (tmp_path / "annotations").symlink_to(archive / "annotations")
    lost = table.replace(table.split(";")[0], "lost", 1)
    (tmp_path / "retrieval_anns_test.csv").write_text(table + lost)
    finished = subprocess.run(
        [sys.executable, "-m", "pop3d_jax.evaluate_retrieval", f"--workdir={small_run}", f"--benchmark={tmp_path}",
         f"--records={small_records}", "--on_missing=skip", "--noteacher", f"--out={tmp_path / 'out.json'}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 3, finished.stderr
    assert "SKIPPED: 1 key frames that the records lack (lost)" in finished.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["missing_key_frames"] == ["lost"]
    assert report["teacher"] is None
    assert all(row["teacher_visible"] is None for row in report["queries"])
    assert "paired" not in finished.stdout


@pytest.mark.golden
@pytest.mark.slow
def test_an_archive_of_the_real_key_frame(golden_file, small_run, tiny_clip_folder, tmp_path):
    root = golden_file("nuscenes/nuscenes_keyframe")
    version = next(root.glob("v1.0-*")).name
    scenes = {scene["name"] for scene in json.loads((root / version / "scene.json").read_text())}
    split = next(split for split in SPLITS_OF_VERSION[version] if scenes & set(scene_names(split)))
    records = tmp_path / "records"
    build = subprocess.run(
        [sys.executable, "-m", "data_prep.build", f"--source={root}", f"--version={version}", f"--split={split}",
         f"--out={records}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    key_frame = RecordSource(records, split)[0]
    with np.load(golden_file("nuscenes/projection.npz")) as arrays:
        stored = dict(arrays)
    # The archive lists the visible points of the devkit's projection, camera after camera.
    visible = np.concatenate([stored[f"points_{camera}"] for camera in CAMERAS])
    archive = Archive(tmp_path / "benchmark")
    # The classes that the frame has most of, by their names.
    counts = np.bincount(LIDARSEG_TO_CLASS[key_frame.lidarseg], minlength=len(CLASS_NAMES))
    counts[0] = 0
    names = tuple(CLASS_NAMES[index] for index in np.argsort(-counts)[:4] if counts[index])
    for name, matches in phrases_of(key_frame, names).items():
        archive.add("val", key_frame.sample_token, f"a {name}", matches, visible)
    report, seen = scored(small_run, archive.write(), records=[records])
    assert report["splits"]["val"]["queries"] == len(names)
    assert (report["visible_compared"], report["visible_differing"]) == (1, [])
    assert "the same in 1 of 1 key frames" in command.format_tables(report)
    assert {row["visible"] for row in report["queries"]} == {len(visible)}

    look = seen[key_frame.sample_token]
    index, _, _ = visible_pairs(
        key_frame.points[:, :3], key_frame.intrinsics, key_frame.lidar_to_camera, tuple(stored["image_hw"].tolist())
    )
    np.testing.assert_array_equal(look[1], index)
    np.testing.assert_array_equal(look[1], visible)
    rows = [row for row in report["queries"] if row["student_visible"] is not None]
    check_rows(rows, key_frame, look, load_clip(tiny_clip_folder), lambda p: of_class(key_frame, p.removeprefix("a ")))

"""Annotated boxes beside the records."""

import json
import re
import shutil

import numpy as np
import pytest

from data_prep.boxes import read_annotations, write_split_boxes
from data_prep.split_build import build_split
from data_prep.splits import SPLITS_OF_VERSION, SplitError, scene_names
from data_prep.table_rows import SourceError
from pop3d_jax.data.boxes import boxes_path, read_boxes
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.geometry import apply_rigid, invert_rigid, rigid_transform
from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES

VERSION = "v1.0-trainval"


@pytest.fixture
def records(small_records, tmp_path):
    return shutil.copytree(small_records, tmp_path / "records")


@pytest.fixture
def tables(small_world, tmp_path):
    """The tables of the small world, to be broken."""
    shutil.copytree(small_world / VERSION, tmp_path / "tables" / VERSION)
    return tmp_path / "tables"


def _change(tables, name, change):
    path = tables / VERSION / f"{name}.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


def _rows(world, name):
    return json.loads((world / VERSION / f"{name}.json").read_text())


def test_boxes_are_the_rows_of_the_split(small_world, records):
    write_split_boxes(small_world, VERSION, "train", records)
    boxes = read_boxes(records, "train")
    source = RecordSource(records, "train")
    assert boxes.sample_tokens == source.sample_tokens
    assert boxes.fingerprint == source.fingerprint
    rows = [row for row in _rows(small_world, "sample_annotation") if row["sample_token"] in source.sample_tokens]
    names = {row["token"]: row["name"] for row in _rows(small_world, "category")}
    categories = {row["token"]: names[row["category_token"]] for row in _rows(small_world, "instance")}
    found = [
        (boxes.sample_tokens[sample], LIDARSEG_CATEGORIES[category], *place.tolist())
        for sample, category, place in zip(
            boxes.sample, boxes.category, np.hstack([boxes.centre, boxes.size, boxes.rotation]), strict=True
        )
    ]
    expected = [
        (row["sample_token"], categories[row["instance_token"]], *row["translation"], *row["size"], *row["rotation"])
        for row in rows
    ]
    assert len(expected) > 20
    assert sorted(found) == sorted(expected)
    assert (np.diff(boxes.sample) >= 0).all()
    # One number for each thing, at both key frames.
    assert len(set(boxes.instance)) == len({row["instance_token"] for row in rows}) < len(rows)


def test_returns_of_things_lie_in_boxes_of_their_category(small_world, records):
    boxes = write_split_boxes(small_world, VERSION, "val", records)
    assert _share_in_boxes(RecordSource(records, "val")[0], boxes, 0, margin=0.1) > 0.97


def _share_in_boxes(frame, boxes, number, margin):
    """Share of the returns of boxed categories that lie in a box of their category."""
    points = apply_rigid(frame.ego_to_global @ frame.lidar_to_ego, frame.points[:, :3])
    here = boxes.sample == number
    inside = np.zeros(len(points), bool)
    for category, centre, size, rotation in zip(
        *(array[here] for array in (boxes.category, boxes.centre, boxes.size, boxes.rotation)), strict=True
    ):
        local = apply_rigid(invert_rigid(rigid_transform(rotation, centre)), points)
        inside |= (np.abs(local) <= size[[1, 0, 2]] / 2 + margin).all(1) & (frame.lidarseg == category)
    boxed = np.isin(frame.lidarseg, boxes.category[here])
    assert boxed.sum() > 100
    return inside[boxed].mean()


@pytest.mark.golden
def test_boxes_of_a_real_key_frame_hold_its_labelled_returns(golden_file, tmp_path):
    source = golden_file("nuscenes/nuscenes_keyframe")
    version = next(source.glob("v1.0-*")).name
    if not (source / version / "sample_annotation.json").exists():
        pytest.skip("the golden key frame has no boxes")
    names = {scene["name"] for scene in json.loads((source / version / "scene.json").read_text())}
    split = next(split for split in SPLITS_OF_VERSION[version] if names & set(scene_names(split)))
    build_split(source, version, split, tmp_path, skip_errors=False, workers=1)
    boxes = write_split_boxes(source, version, split, tmp_path)
    frame = RecordSource(tmp_path, split)[0]
    rows = json.loads((source / version / "sample_annotation.json").read_text())
    assert len(boxes.sample) == sum(row["sample_token"] == frame.sample_token for row in rows) > 0
    # Few returns have two boxes around them and the label of the other.
    assert _share_in_boxes(frame, boxes, 0, margin=1e-3) > 0.99
    vehicles = [i for i, name in enumerate(LIDARSEG_CATEGORIES) if name.startswith("vehicle.")]
    assert np.isin(boxes.category, vehicles).any()


def test_missing_stale_and_damaged_files_name_the_command(small_world, records):
    command = re.escape(f"python -m data_prep.boxes --source NUSCENES --version {VERSION} --split val --out {records}")
    with pytest.raises(RecordError, match=f"no boxes .*boxes-val.npz.*{command}"):
        read_boxes(records, "val")
    write_split_boxes(small_world, VERSION, "val", records)
    path = boxes_path(records, "val")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(RecordError, match=f"is damaged.*{command}"):
        read_boxes(records, "val")
    write_split_boxes(small_world, VERSION, "train", records)
    shutil.copy(boxes_path(records, "train"), path)
    with pytest.raises(RecordError, match=f"belongs to other records.*{command}"):
        read_boxes(records, "val")


def test_tables_of_another_build_are_refused(tables, records):
    _change(tables, "sample", lambda rows: rows[0].update(note="other"))
    with pytest.raises(SourceError, match="was built from other tables"):
        write_split_boxes(tables, VERSION, "val", records)


def test_a_split_of_another_version_is_refused(small_world, records):
    with pytest.raises(SplitError, match="mini_val"):
        write_split_boxes(small_world, VERSION, "mini_val", records)


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("sample_annotation", {"size": [1.0, 2.0]}, r"table sample_annotation: row \w+: not a size"),
        ("sample_annotation", {"size": [1.0, 0.0, 2.0]}, r"table sample_annotation: row \w+: not a size"),
        ("sample_annotation", {"rotation": [0, 0, 0, 0]}, r"table sample_annotation: row \w+: not a rotation"),
        ("sample_annotation", {"translation": [0, None, 0]}, r"table sample_annotation: row \w+"),
        ("sample_annotation", {"instance_token": "x"}, r"row \w+ has instance_token x, which table instance does not"),
        ("instance", {"category_token": "x"}, r"row \w+ has category_token x, which table category does not have"),
        ("category", {"name": "animal.dragon"}, r"table category: row \w+: 'animal.dragon' is no category"),
    ],
)
def test_damaged_rows_are_named(tables, small_records, table, change, message):
    source = RecordSource(small_records, "train")

    def damage(rows):
        row = next(row for row in rows if row.get("sample_token", source.sample_tokens[0]) in source.sample_tokens)
        row.update(change)

    _change(tables, table, damage)
    with pytest.raises(SourceError, match=message):
        read_annotations(tables, VERSION, source.sample_tokens, "")


def test_two_boxes_of_one_thing_at_a_key_frame_are_refused(tables, small_records):
    source = RecordSource(small_records, "train")
    _change(tables, "sample_annotation", lambda rows: rows.extend([dict(row, token="again") for row in rows]))
    with pytest.raises(SourceError, match="has two boxes of one instance"):
        read_annotations(tables, VERSION, source.sample_tokens, "")


def test_a_split_without_boxes_has_none(tables, small_records):
    source = RecordSource(small_records, "train")
    _change(tables, "sample_annotation", lambda rows: rows.clear())
    boxes = read_annotations(tables, VERSION, source.sample_tokens, "")
    assert boxes.centre.shape == (0, 3)
    assert boxes.rotation.shape == (0, 4)

"""Files of other methods: every layout gives the same labels, everything else is refused by name."""

import numpy as np
import pytest
from label_folders import random_labels

from pop3d_jax.occ3d.grid import FREE
from pop3d_jax.occ3d.label_files import OccupancyFileError
from pop3d_jax.occ3d.predictions import PredictionFiles

LABELS = random_labels(3)
PLACES = np.argwhere(LABELS != FREE)


def challenge(folder):
    np.savez_compressed(folder / "aa.npz", LABELS)


def with_batch_axis(folder):
    np.savez_compressed(folder / "aa.npz", LABELS[None].astype(np.int64))


def flashocc(folder):
    (folder / "scene-0001" / "aa").mkdir(parents=True)
    # FlashOCC gives the open ground truth file, which NumPy pickles.
    arrays = {"pred": LABELS, "gt": np.array({}, object), "sample_token": "aa"}
    np.savez_compressed(folder / "scene-0001" / "aa" / "pred.npz", **arrays)


def occ3d(folder):
    (folder / "scene-0001" / "aa").mkdir(parents=True)
    np.savez_compressed(folder / "scene-0001" / "aa" / "labels.npz", semantics=LABELS)


def sparse(folder):
    order = np.random.default_rng(0).permutation(len(PLACES))
    np.savez(folder / "aa.npz", occ_loc=PLACES[order][None], sem_pred=LABELS[tuple(PLACES[order].T)][None])


def langocc(folder, vocabularies=1, thresholds=1):
    for name, count in (("occupancy", vocabularies), ("free_space", thresholds)):
        (folder / name).mkdir()
        grids = (
            [np.where(LABELS == FREE, 3, LABELS), LABELS][:count] if name == "occupancy" else [LABELS == FREE] * count
        )
        np.savez_compressed(folder / name / "scene-0001.npz", aa=np.stack(grids))


@pytest.mark.parametrize("write", [challenge, with_batch_axis, flashocc, occ3d, sparse, langocc])
def test_every_layout_gives_the_labels(tmp_path, write):
    write(tmp_path)
    files = PredictionFiles(tmp_path)
    assert files.sample_tokens == ["aa"]
    np.testing.assert_array_equal(files["aa"], LABELS)
    assert files["aa"].dtype == np.uint8


def test_langoccs_choices(tmp_path):
    langocc(tmp_path, vocabularies=2, thresholds=2)
    with pytest.raises(OccupancyFileError, match=r"holds 2 grids: say which with --vocabulary, 0 to 1"):
        PredictionFiles(tmp_path)["aa"]
    with pytest.raises(OccupancyFileError, match="say which with --free_space"):
        PredictionFiles(tmp_path, vocabulary=1)["aa"]
    with pytest.raises(OccupancyFileError, match="--vocabulary=2 is none of them"):
        PredictionFiles(tmp_path, vocabulary=2, free_space=0)["aa"]
    np.testing.assert_array_equal(PredictionFiles(tmp_path, vocabulary=1, free_space=0)["aa"], LABELS)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": LABELS[:100]}, r"shape \(100, 200, 16\), not \(200, 200, 16\)"),
        ({"arr_0": np.where(LABELS == FREE, 20, LABELS)}, "holds labels that Occ3D does not have: 20; 0 to 16"),
        ({"arr_0": LABELS.astype(np.int16) - 1}, "does not have: -1"),
        ({"arr_0": LABELS.astype(np.float16)}, "float16, not integer labels"),
        ({"pred": LABELS, "semantics": LABELS}, "exactly one of"),
        ({"logits": LABELS}, "holds the arrays logits; exactly one of"),
        ({"occ_loc": PLACES + 200, "sem_pred": np.ones(len(PLACES), int)}, "must hold indices below"),
        ({"occ_loc": PLACES[:9], "sem_pred": np.ones(8, int)}, "one for each of sem_pred"),
        (
            {"occ_loc": PLACES.astype(float), "sem_pred": np.ones(len(PLACES), int)},
            "float64 .* must hold rows of three",
        ),
        ({"occ_loc": np.ones(LABELS.shape, bool), "sem_pred": np.ones(3, int)}, "bool .* must hold rows of three"),
        ({"occ_loc": np.array(1), "sem_pred": np.array(1)}, r"int64 \(\), must hold rows of three"),
        ({"occ_loc": np.zeros(0, int), "sem_pred": np.zeros(0, int)}, r"int64 \(0,\), must hold rows of three"),
        ({"occ_loc": PLACES, "sem_pred": np.ones(len(PLACES), int), "semantics": LABELS}, "exactly one of"),
        ({"pred": LABELS, "sample_token": "bb"}, "says that it is of key frame bb, its place says aa"),
        ({"occ_loc": PLACES[[0, 1, 0]], "sem_pred": np.ones(3, int)}, r"names voxel \[.*\] twice"),
        ({"occ_loc": PLACES[:2], "sem_pred": np.array([3, 18])}, "sem_pred holds labels that Occ3D does not have"),
    ],
)
def test_other_contents_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "aa.npz", **arrays)
    with pytest.raises(OccupancyFileError, match=message) as caught:
        PredictionFiles(tmp_path)["aa"]
    assert str(tmp_path / "aa.npz") in str(caught.value)


def test_a_half_written_dump_is_named(tmp_path):
    challenge(tmp_path)
    content = (tmp_path / "aa.npz").read_bytes()
    (tmp_path / "aa.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(OccupancyFileError, match=r"aa.npz cannot be read as a .npz file"):
        PredictionFiles(tmp_path)["aa"]


def test_doubled_and_absent_predictions_are_named(tmp_path):
    with pytest.raises(OccupancyFileError, match="there is no folder"):
        PredictionFiles(tmp_path / "nowhere")
    with pytest.raises(OccupancyFileError, match="holds no predictions: it takes"):
        PredictionFiles(tmp_path)
    (tmp_path / "aa.pkl").write_bytes(b"")
    with pytest.raises(OccupancyFileError, match=r"pickles such as aa.pkl are not read"):
        PredictionFiles(tmp_path)
    flashocc(tmp_path)
    occ3d_copy = tmp_path / "scene-0002" / "aa"
    occ3d_copy.mkdir(parents=True)
    np.savez(occ3d_copy / "labels.npz", semantics=LABELS)
    with pytest.raises(OccupancyFileError, match=r"aa is doubled: .*scene-0001.*pred.npz and .*scene-0002"):
        PredictionFiles(tmp_path)


@pytest.mark.parametrize("other", [flashocc, langocc])
def test_two_layouts_in_one_folder_are_refused(tmp_path, other):
    challenge(tmp_path)
    other(tmp_path)
    with pytest.raises(OccupancyFileError, match="holds files of two layouts"):
        PredictionFiles(tmp_path)


def test_langoccs_free_space_is_needed(tmp_path):
    langocc(tmp_path)
    free = tmp_path / "free_space" / "scene-0001.npz"
    np.savez(free, bb=LABELS == FREE)
    with pytest.raises(OccupancyFileError, match="lacks the key frame"):
        PredictionFiles(tmp_path)["aa"]
    np.savez(free, aa=np.full(LABELS.shape, 0.3))
    with pytest.raises(OccupancyFileError, match="as large, and of 0 and 1 only"):
        PredictionFiles(tmp_path)["aa"]
    free.unlink()
    with pytest.raises(OccupancyFileError, match=r"free_space/scene-0001.npz does not exist"):
        PredictionFiles(tmp_path)["aa"]
    free.parent.rmdir()
    with pytest.raises(OccupancyFileError, match="has no free voxel"):
        PredictionFiles(tmp_path)["aa"]


@pytest.mark.parametrize("shape", [(), (200, 200), (0, 200, 200, 16)])
def test_langoccs_other_shapes_are_named(tmp_path, shape):
    (tmp_path / "occupancy").mkdir()
    np.savez(tmp_path / "occupancy" / "scene-0001.npz", aa=np.zeros(shape, np.uint8))
    with pytest.raises(OccupancyFileError, match="one grid or several are expected"):
        PredictionFiles(tmp_path)["aa"]


def test_labels_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "aa.npz", np.array([LABELS.tolist], object))
    with pytest.raises(OccupancyFileError, match="cannot be read"):
        PredictionFiles(tmp_path)["aa"]

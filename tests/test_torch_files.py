"""Weight files in the formats that training scripts write, whole, broken and hostile."""

import collections
import pickle

import numpy as np
import pytest

from pop3d_jax.torch_files import WeightFileError, read_state_dict, read_torch, write_state_dict

STATE = {"conv.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "steps": np.array(7)}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_safetensors_both_ways(tmp_path):
    write_state_dict(tmp_path / "deep" / "weights.safetensors", STATE)
    assert_same(read_state_dict(tmp_path / "deep" / "weights.safetensors"), STATE)
    assert sorted(file.name for file in (tmp_path / "deep").iterdir()) == ["weights.safetensors"]


def test_a_prefix_of_all_names_is_taken_off_and_one_of_some_is_not(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_state_dict(path, {f"module.{key}": value for key, value in STATE.items()})
    assert_same(read_state_dict(path), STATE)
    write_state_dict(path, {"module.a": STATE["steps"], "b": STATE["steps"]})
    assert set(read_state_dict(path)) == {"module.a", "b"}


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(WeightFileError, match=r"nothing\.pth does not exist"):
        read_state_dict(tmp_path / "nothing.pth")
    path = tmp_path / "weights.safetensors"
    write_state_dict(path, STATE)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(WeightFileError, match="no whole safetensors file"):
        read_state_dict(path)


class TestTorch:
    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = pytest.importorskip("torch", reason="PyTorch, an extra, is not installed: pip install torch")

    def tensors(self):
        return {key: self.torch.from_numpy(value.copy()) for key, value in STATE.items()}

    def test_own_files_come_back(self, tmp_path):
        write_state_dict(tmp_path / "weights.pth", STATE)
        assert_same(read_state_dict(tmp_path / "weights.pth"), STATE)

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("container", [None, "state_dict", "model"])
    def test_checkpoints_of_training_scripts(self, tmp_path, container, legacy):
        state = collections.OrderedDict((f"module.{key}", value) for key, value in self.tensors().items())
        # Beside the weights: what the official training script keeps, NumPy scalars among it.
        whole = state
        if container:
            whole = {
                container: state,
                "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-4}]},
                "epoch": 11,
                "best_val_miou_vox": np.float64(16.5),
            }
        path = tmp_path / "checkpoint.pth"
        self.torch.save(whole, path, _use_new_zipfile_serialization=not legacy)
        assert_same(read_state_dict(path), STATE)

    def test_half_precision_becomes_float32(self, tmp_path):
        path = tmp_path / "half.pth"
        self.torch.save({"a": self.torch.tensor([1.5], dtype=self.torch.bfloat16)}, path)
        found = read_state_dict(path)["a"]
        assert found.dtype == np.float32
        assert found[0] == 1.5

    def test_a_program_in_a_file_is_not_run(self, tmp_path):
        mark = tmp_path / "was_run"

        class Hostile:
            def __reduce__(self):
                return (mark.write_text, ("yes",))

        path = tmp_path / "hostile.pth"
        self.torch.save({"state_dict": self.tensors(), "extra": Hostile()}, path)
        with pytest.raises(WeightFileError, match=r"holds the object .*could run a program"):
            read_state_dict(path)
        path.write_bytes(pickle.dumps(Hostile(), protocol=2))
        with pytest.raises(WeightFileError, match=r"hostile\.pth"):
            read_state_dict(path)
        assert not mark.exists()

    def test_broken_files_are_named(self, tmp_path):
        path = tmp_path / "broken.pth"
        self.torch.save(self.tensors(), path)
        whole = path.read_bytes()
        for part in (b"", b"no weights at all", whole[: len(whole) // 2], whole[:-100]):
            path.write_bytes(part)
            with pytest.raises(WeightFileError, match=rf"broken\.pth \({len(part)} bytes\) is no whole file"):
                read_state_dict(path)

    def test_what_is_no_state_dict_is_said(self, tmp_path):
        path = tmp_path / "other.pth"
        self.torch.save([1, 2], path)
        with pytest.raises(WeightFileError, match="no state dict but a list without tensors"):
            read_state_dict(path)
        self.torch.save({"a": self.torch.ones(1), "note": "x"}, path)
        with pytest.raises(WeightFileError, match=r"entries that are no tensors: \['note'\]"):
            read_state_dict(path)

    def test_other_structures_keep_their_shape(self, tmp_path):
        path = tmp_path / "pair.pth"
        self.torch.save((self.torch.ones(2, 3), [1, 2]), path)
        matrix, mapping = read_torch(path)
        np.testing.assert_array_equal(matrix, np.ones((2, 3)))
        assert mapping == [1, 2]

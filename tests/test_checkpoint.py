import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pop3d_jax.checkpoint import CheckpointError, Checkpoints
from pop3d_jax.sharding import make_mesh, replicated


def state():
    return {
        "parameters": {"layers": {i: {"kernel": jnp.full((2, 3), float(i))} for i in range(12)}},
        "optimizer": {"mu": jnp.arange(4.0)},
        "step": jnp.asarray(7, jnp.int32),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(path, keep=2)
    for step in (3, 5, 7):
        checkpoints.save(step, state(), {"seed": step})
    checkpoints.close()
    return path


def abstract():
    return jax.eval_shape(state)


def test_a_checkpoint_comes_back_bit_for_bit_with_its_configuration(folder):
    checkpoints = Checkpoints(folder, read_only=True)
    restored = checkpoints.restore(abstract(), replicated(make_mesh()))
    assert jax.tree.structure(restored) == jax.tree.structure(state())
    jax.tree.map(np.testing.assert_array_equal, restored, state())
    assert checkpoints.config() == {"seed": 7}


def test_only_the_newest_are_kept(folder):
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.latest_step() == 7
    assert checkpoints.config(5) == {"seed": 5}
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; it has \[5, 7\]"):
        checkpoints.config(3)


def test_a_part_of_the_state_can_be_restored(folder):
    restored = Checkpoints(folder, read_only=True).restore(
        {"parameters": abstract()["parameters"]}, replicated(make_mesh())
    )
    assert list(restored) == ["parameters"]
    np.testing.assert_array_equal(restored["parameters"]["layers"][11]["kernel"], 11.0)


def test_another_model_is_refused_with_every_difference(folder):
    other = abstract()
    other["parameters"]["layers"][0]["kernel"] = jax.ShapeDtypeStruct((9, 9), jnp.float32)
    other["parameters"]["extra"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    with pytest.raises(CheckpointError, match=r"(?s)missing: \['parameters/extra'\].*stored \(2, 3\), wanted \(9, 9\)"):
        Checkpoints(folder, read_only=True).restore(other, replicated(make_mesh()))


def test_an_unfinished_checkpoint_does_not_count(folder, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state(), {})
    checkpoints.wait()
    # What a kill in the middle of a write leaves behind.
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    checkpoints.close()
    assert Checkpoints(tmp_path / "checkpoints").latest_step() == 1


def test_no_checkpoint_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoints(tmp_path / "none", read_only=True)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        Checkpoints(tmp_path / "empty").restore(abstract(), replicated(make_mesh()))


def test_a_damaged_checkpoint_is_an_error_that_names_the_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"w": jnp.arange(1000.0)}, {})
    checkpoints.close()
    for file in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if file.is_file() and "METADATA" not in file.name:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    # In a process of its own: Orbax leaves reads under way behind, which end with its event loop.
    program = """
        import sys, jax, jax.numpy as jnp
        from pop3d_jax.checkpoint import CheckpointError, Checkpoints
        from pop3d_jax.sharding import make_mesh, replicated
        try:
            Checkpoints(sys.argv[1], read_only=True).restore(
                {"w": jax.ShapeDtypeStruct((1000,), jnp.float32)}, replicated(make_mesh())
            )
        except CheckpointError as error:
            print("refused:", error)
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "checkpoints")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "refused:" in finished.stdout, finished.stderr
    assert "checkpoints/1 cannot be read" in finished.stdout

"""Checkpoints through Orbax: asynchronous, atomic, restorable on another mesh.

A checkpoint holds the training state (parameters, statistics, optimiser, step; the step is the data position as well,
see `data/pipeline.py`) and the configuration it was trained with.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding

from pop3d_jax.models.parameters import path_names

_STATE = "state"
_CONFIG = "config"


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or of another model; the message names the folder and the way out."""


def _flat_shapes(tree: Any) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(path_names(path)): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, directory: epath.PathLike, *, keep: int = 2, read_only: bool = False):
        """Opens (and, unless read only, creates) the folder.

        Args:
          directory: local or gs:// folder.
          keep: how many of the newest checkpoints stay.
          read_only: True never writes, creates or deletes anything.
        """
        # Orbax wants absolute local paths; epath leaves gs:// alone.
        self.directory = epath.Path(directory)
        if "://" not in str(directory):
            self.directory = self.directory.resolve()
        if read_only and not self.directory.exists():
            raise CheckpointError(
                f"{self.directory} does not exist: train first, or point --workdir at a folder that "
                "`python -m pop3d_jax.train` wrote"
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={_STATE: ocp.PyTreeCheckpointHandler(), _CONFIG: ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=0 if read_only else 1,
                max_to_keep=None if read_only else keep,
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, config: dict[str, Any]) -> None:
        """Starts writing a checkpoint; returns as soon as the arrays are copied off the devices."""
        self._manager.save(
            step,
            args=ocp.args.Composite(**{_STATE: ocp.args.PyTreeSave(state), _CONFIG: ocp.args.JsonSave(config)}),
        )

    def config(self, step: int | None = None) -> dict[str, Any]:
        """The configuration stored with a checkpoint (the newest by default)."""
        step = self._existing(step)
        return self._manager.restore(step, args=ocp.args.Composite(**{_CONFIG: ocp.args.JsonRestore()}))[_CONFIG]

    def restore(self, abstract_state: Any, sharding: Sharding | dict[str, Any], step: int | None = None) -> Any:
        """Reads a checkpoint (the newest by default).

        Args:
          abstract_state: the tree of shapes and types that is expected (`jax.eval_shape` makes one). A part of the
            stored state may be asked for, for example parameters without the optimiser.
          sharding: where the arrays go, on any mesh: one for all, or a tree like `abstract_state`.
          step: which checkpoint.

        Raises:
          CheckpointError: there is none, it is damaged, or its arrays are not those asked for (lists them).
        """
        step = self._existing(step)
        self._compare(abstract_state, step)
        if isinstance(sharding, Sharding):
            sharding = jax.tree.map(lambda _: sharding, abstract_state)
        target = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract_state, sharding
        )
        try:
            return self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{
                        _STATE: ocp.args.PyTreeRestore(
                            target,
                            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                            partial_restore=True,
                        )
                    }
                ),
            )[_STATE]
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {self.directory}/{step} cannot be read ({error}): remove that folder to go on from the "
                "one before it"
            ) from error

    def close(self) -> None:
        """Waits for writes under way."""
        self._manager.wait_until_finished()
        self._manager.close()

    def wait(self) -> None:
        """Waits for writes under way; the checkpoint is whole afterwards."""
        self._manager.wait_until_finished()

    def _existing(self, step: int | None) -> int:
        latest = self.latest_step()
        if latest is None:
            raise CheckpointError(f"{self.directory} has no whole checkpoint yet: train first")
        if step is not None and step not in self._manager.all_steps():
            raise CheckpointError(
                f"{self.directory} has no checkpoint of step {step}; it has {sorted(self._manager.all_steps())}"
            )
        return latest if step is None else step

    def _compare(self, abstract_state: Any, step: int) -> None:
        try:
            stored = _flat_shapes(self._manager.item_metadata(step)[_STATE].tree)
        except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint {self.directory}/{step} cannot be read ({error}): remove that folder to go on from the "
                "one before it"
            ) from error
        wanted = _flat_shapes(abstract_state)
        missing = sorted(set(wanted) - set(stored))
        misshapen = sorted(
            f"{name}: stored {stored[name]}, wanted {wanted[name]}"
            for name in set(wanted) & set(stored)
            if stored[name] != wanted[name]
        )
        if missing or misshapen:
            raise CheckpointError(
                f"checkpoint {self.directory}/{step} is of another model.\n  missing: {missing}\n"
                f"  other shape: {misshapen}\n"
                f"Use the configuration it was trained with ({self.directory}/../config.json) or another --workdir"
            )

"""What the training loop needs to know of a system: its data, its step and how it is judged."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pop3d_jax.step import State


@dataclasses.dataclass(frozen=True)
class Task:
    """One system on one mesh, ready to be trained.

    Attributes:
      key_frames: records that an epoch goes through.
      total_steps: length of the training and of its schedule.
      fingerprints: of the records, by name.
      step: jitted (state, batch, constants) -> (state, metrics); the state is donated. Its metrics have `total`, the
        loss, and `gradient_norm`. To be called inside `jax.set_mesh`.
      constants: arrays on the devices that every step gets, such as the teacher's parameters.
      abstract_state: shapes of the training state; `shardings` where its arrays live, a tree like it.
      make_state: the state before the first step, on the devices.
      batches: endless batches from a step on.
      host_arrays: arrays of a batch that no device needs; they name its records.
      sample_tokens: of a batch, by its host arrays.
      capacities: what a point that did not fit is counted in (arrays of a batch), and the field that makes room.
      learning_rate: of a step.
      terms: the metrics that a log line shows besides the loss.
      evaluate: the scores of a state; None where training judges nothing.
    """

    key_frames: int
    total_steps: int
    fingerprints: Mapping[str, str]
    step: Callable[[State, dict[str, jax.Array], Any], tuple[State, dict[str, jax.Array]]]
    constants: Any
    abstract_state: State
    shardings: dict[str, Any]
    make_state: Callable[[], State]
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    host_arrays: tuple[str, ...]
    sample_tokens: Callable[[Mapping[str, np.ndarray]], Sequence[str]]
    capacities: Mapping[str, str]
    learning_rate: Callable[[int], Any]
    terms: tuple[str, ...]
    evaluate: Callable[[State], dict[str, float]] | None

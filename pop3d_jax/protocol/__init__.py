"""Facts of published protocols, shipped as JSON: POP-3D's zero-shot prompts and retrieval benchmark, prompts for
Occ3D's classes."""

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import UInt8


@dataclasses.dataclass(frozen=True)
class ZeroShotProtocol:
    """The zero-shot protocol as published with the official implementation.

    templates: 85 sentences with one `{}` (80 of ImageNet and 5 "in the scene");
    category_prompts: for each of the 32 lidarseg categories, in index order, its sub-prompts.
    """

    templates: tuple[str, ...]
    category_prompts: tuple[tuple[str, ...], ...]
    lidarseg_to_class: tuple[int, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        """All sub-prompts, in category order: one row of the text matrix each."""
        return tuple(prompt for prompts in self.category_prompts for prompt in prompts)

    @property
    def prompt_classes(self) -> UInt8[np.ndarray, " prompts"]:
        """Class 0..16 of every sub-prompt by the official label map; class 0 is dropped when classes are assigned."""
        classes = zip(self.lidarseg_to_class, self.category_prompts, strict=True)
        return np.array([label for label, prompts in classes for _ in prompts], np.uint8)


@functools.cache
def zero_shot_protocol() -> ZeroShotProtocol:
    """Templates, category prompts and label map of the zero-shot evaluation."""
    facts = _read("zero_shot_prompts.json")
    entries = sorted(facts["category_prompts"], key=lambda entry: entry["lidarseg_index"])
    assert [entry["lidarseg_index"] for entry in entries] == list(range(len(entries)))
    return ZeroShotProtocol(
        templates=tuple(facts["templates"]),
        category_prompts=tuple(tuple(entry["prompts"]) for entry in entries),
        lidarseg_to_class=tuple(facts["lidarseg32_to_16"][str(index)] for index in range(len(entries))),
    )


@functools.cache
def retrieval_benchmark() -> dict[str, Any]:
    """The language-driven retrieval benchmark: `queries` (camera image and phrase), `expected_counts` per split
    and the published `expected_map`. Its point annotations are a separate download."""
    return _read("retrieval_benchmark.json")


@functools.cache
def occ3d_prompts() -> dict[str, dict[str, Any]]:
    """Lists of phrases that methods ask Occ3D's classes with, by name: `source`, `licence`, `templates` (whether we
    put the 85 of the zero-shot protocol around each phrase), and `phrases`, pairs of words and Occ3D's label."""
    return _read("occ3d_prompts.json")


def _read(name: str) -> Any:
    return json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))

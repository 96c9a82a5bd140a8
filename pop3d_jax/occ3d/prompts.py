"""Phrases that Occ3D's classes are asked with: lists that are published under a permissive licence, ours, a user's.

Each list has a name, which belongs beside every number made with it. A class may have several phrases and takes the
best of them: the best of all phrases says the label. A phrase of label 17 ("sky") makes what it fits best free.

What the peers' programs put around their words is not known (GaussTR reads a ready file of vectors), or the words were
a detector's (`gausstr_grounding`, `occnerf`). Each of the shipped lists is used with the 85 templates of POP-3D's
zero-shot protocol, so scores with a peer's list are not that peer's scores. LangOcc's list is under the AGPL and is not
shipped: who has it writes it into a file for `read_prompt_file`.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from pop3d_jax.models.clip import LoadedCLIP
from pop3d_jax.nuscenes import UNLABELLED
from pop3d_jax.occ3d.grid import FREE, OCC3D_CLASSES, OTHERS
from pop3d_jax.protocol import occ3d_prompts, zero_shot_protocol
from pop3d_jax.text import embed_phrases

PROMPT_SETS = ("plain", "pop3d", "gausstr", "gausstr_grounding", "occnerf")
_FIELDS = ("name", "source", "licence", "templates", "phrases")
_FORM = '{"name": "mine", "phrases": [["a car", "car"], ["sky", 17]]}'


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Phrases and what each of them says.

    Attributes:
      name: to be given with every score.
      source: where the list comes from.
      licence: of that source.
      phrases: words.
      labels: Occ3D's label of each phrase; 17 is free.
      templates: whether each phrase is averaged over the 85 templates of the zero-shot protocol, or stands alone.
    """

    name: str
    source: str
    licence: str
    phrases: tuple[str, ...]
    labels: UInt8[np.ndarray, " phrases"]
    templates: bool = True

    def embed(self, phrases: Sequence[str], clip: LoadedCLIP, cache_dir: Any) -> Float[np.ndarray, "phrases dim"]:
        """Unit text vectors of phrases, with or without templates as this set has it; see `text.embed_phrases`."""
        return embed_phrases(clip, phrases, templates=None if self.templates else ("{}",), cache_dir=cache_dir)


@functools.cache
def prompt_set(name: str) -> PromptSet:
    """A shipped list, one of `PROMPT_SETS`.

    - `plain`: the names of classes 1 to 16 as words. "others" names nothing, so label 0 is never given.
    - `pop3d`: the sub-prompts of POP-3D's zero-shot protocol; those of its class 0 are left out, as there. That class
      is dropped by POP-3D, while Occ3D's 0 is "others".
    - `gausstr`: GaussTR's list, which PG-Occ uses too; without 0 and 12.
    - `gausstr_grounding`: the prompts of GaussTR's detector, in 17 groups that are Occ3D's 1 to 17.
    - `occnerf`: the prompts of OccNeRF's detector, which GaussianOcc uses too; without 0 and 12.

    Raises:
      ValueError: no such list.
    """
    if name not in PROMPT_SETS:
        raise ValueError(f"{name!r} is none of the shipped prompt lists, {', '.join(PROMPT_SETS)}: give one of them")
    if name == "plain":
        labels = np.arange(OTHERS + 1, FREE, dtype=np.uint8)
        words = tuple(OCC3D_CLASSES[label].replace("_", " ") for label in labels)
        return PromptSet(name, "names of Occ3D's classes 1 to 16", "ours", words, labels)
    if name == "pop3d":
        protocol = zero_shot_protocol()
        kept = protocol.prompt_classes != UNLABELLED
        words = tuple(phrase for phrase, keep in zip(protocol.prompts, kept, strict=True) if keep)
        source = "vobecant/POP3D, MaskCLIP/tools/maskclip_utils/prompt_engineering.py:17-98"
        return PromptSet(name, source, "Apache-2.0", words, protocol.prompt_classes[kept])
    facts = occ3d_prompts()[name]
    words, labels = zip(*facts["phrases"], strict=True)
    return PromptSet(name, facts["source"], facts["licence"], words, np.array(labels, np.uint8), facts["templates"])


def read_prompt_file(path: epath.PathLike) -> PromptSet:
    """A user's own list, as JSON.

    `{"name": "mine", "phrases": [["a car", "car"], ["sky", 17]]}`: pairs of words and a label, as Occ3D's number or the
    name of its class ("free" is 17). `source`, `licence` and `templates` (true by default) may be given as well, and
    `name` left out: the file's name takes its place. The pairs alone, without anything around them, will do too.

    Raises:
      ValueError: the file is missing, no such JSON, has no phrase of a class, an empty or doubled phrase (capitals do
        not count, as CLIP does not see them), or an unknown label; names the file and the entry.
    """
    path = epath.Path(path)
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"the prompt file {path} cannot be read ({error}): give JSON such as {_FORM}") from error
    facts = {"phrases": facts} if isinstance(facts, list) else facts
    if not isinstance(facts, dict) or not isinstance(facts.get("phrases"), list):
        raise ValueError(f"the prompt file {path} has no list of phrases: give JSON such as {_FORM}")
    if unknown := sorted(set(facts) - set(_FIELDS)):
        raise ValueError(f"the prompt file {path} has unknown fields {unknown}: known are {', '.join(_FIELDS)}")
    templates = facts.get("templates", True)
    if not isinstance(templates, bool):
        raise ValueError(f"the prompt file {path} has templates = {templates!r}: give true or false")
    entries = [_entry(path, number, entry) for number, entry in enumerate(facts["phrases"])]
    seen: dict[str, int] = {}
    for number, (phrase, _) in enumerate(entries):
        first = seen.setdefault(phrase.lower(), number)
        if first != number:
            raise ValueError(
                f"the prompt file {path}: entries {first} and {number} both say {phrase!r}; leave one of them out"
            )
    if all(label == FREE for _, label in entries):
        raise ValueError(f"the prompt file {path} has no phrase of a class 0 to {FREE - 1}: give at least one")
    words, labels = zip(*entries, strict=True)
    text = _unsaid(path) | {name: facts[name] for name in ("name", "source", "licence") if name in facts}
    if not all(isinstance(value, str) and value for value in text.values()):
        raise ValueError(f"the prompt file {path}: name, source and licence must be words")
    if text["name"] in PROMPT_SETS:
        raise ValueError(
            f"the prompt file {path} calls itself {text['name']!r}, which is a shipped list: name it otherwise"
        )
    return PromptSet(**text, phrases=words, labels=np.array(labels, np.uint8), templates=templates)


def _unsaid(path: epath.Path) -> dict[str, str]:
    return {"name": path.stem, "source": path.name, "licence": "not stated"}


def _entry(path: epath.Path, number: int, entry: Any) -> tuple[str, int]:
    """A phrase and its label."""
    where = f"the prompt file {path}, entry {number} ({entry!r})"
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str) or not entry[0].strip():
        raise ValueError(f'{where}: give a phrase and its label, such as ["a car", "car"]')
    phrase, label = entry[0].strip(), entry[1]
    if isinstance(label, str) and label in OCC3D_CLASSES:
        return phrase, OCC3D_CLASSES.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label <= FREE:
        return phrase, label
    raise ValueError(f"{where}: the label must be 0 to {FREE}, or one of {', '.join(OCC3D_CLASSES)}")

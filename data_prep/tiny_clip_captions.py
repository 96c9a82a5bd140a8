"""What the tiny CLIP reads: captions of the synthetic world in the words of the official protocol, and a tokenizer.

A *kind* is what a thing of the world can be (category, noun, colour). A *phrase* is something to say, with the
kinds it is true of; phrases of things that are not in the world are true of none and serve as contrast.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from pop3d_jax.nuscenes import CLASS_NAMES, LIDARSEG_TO_CLASS, UNLABELLED
from pop3d_jax.protocol import zero_shot_protocol

# Everyday names beside the published sub-prompts, by class.
_EVERYDAY_NAMES = {
    "pedestrian": ("person", "people", "man", "woman"),
    "driveable_surface": ("road", "street"),
    "terrain": ("lawn",),
    "vegetation": ("leaves",),
}
_MERGES = 4096  # more than the corpus needs: every word of it becomes one token
_START, _END = "<|startoftext|>", "<|endoftext|>"
_POSITIONS = 77


@dataclasses.dataclass(frozen=True, order=True)
class Kind:
    """What a thing is: class 1..16, noun, colour ("" where it has none) and the world's caption of it."""

    label: int
    noun: str
    colour: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Phrases:
    """Things to say. `true_of[phrase, kind]`; `in_protocol`: the phrase is a sub-prompt of the zero-shot protocol."""

    texts: tuple[str, ...]
    true_of: Bool[np.ndarray, "phrases kinds"]
    in_protocol: Bool[np.ndarray, " phrases"]


def read_kinds(world: Path, scenes: Sequence[str]) -> tuple[list[Kind], dict[str, dict[int, int]]]:
    """Kinds that occur in the scenes, and for each scene the kind of every thing number.

    Raises:
      ValueError: captions.json names nothing in these scenes.
    """
    entries = [entry for entry in json.loads((world / "captions.json").read_text()) if entry["scene_name"] in scenes]
    if not entries:
        raise ValueError(f"{world / 'captions.json'} has no thing in the scenes {', '.join(scenes)}")

    def kind_of(entry: dict[str, Any]) -> Kind:
        label = int(LIDARSEG_TO_CLASS[entry["lidarseg_index"]])
        return Kind(label, entry["noun"].lower(), entry["colour"].lower(), _without_article(entry["caption"].lower()))

    kinds = sorted({kind_of(entry) for entry in entries})
    index = {kind: i for i, kind in enumerate(kinds)}
    numbers: dict[str, dict[int, int]] = {scene: {} for scene in scenes}
    for entry in entries:
        numbers[entry["scene_name"]][entry["number"]] = index[kind_of(entry)]
    return kinds, numbers


def phrases_about(kinds: Sequence[Kind]) -> Phrases:
    """Every sub-prompt of the protocol (but those of no class), the world's captions, and colours with other nouns.

    A sub-prompt is true of its whole class, unless it is itself the noun of something in the world: "building"
    is not true of a wall, "fence" (there are none) is of all that is man-made.
    """
    labels = np.array([kind.label for kind in kinds])
    nouns = np.array([kind.noun for kind in kinds])
    colours = np.array([kind.colour for kind in kinds])
    captions = np.array([kind.caption for kind in kinds])
    protocol = zero_shot_protocol()
    said: dict[str, np.ndarray] = {}

    def named(name: str, label: int) -> np.ndarray:
        plain = name.lower().strip(" .")
        return nouns == plain if plain in nouns else labels == label

    names = [
        (prompt, int(label))
        for prompt, label in zip(protocol.prompts, protocol.prompt_classes, strict=True)
        if label != UNLABELLED
    ]
    for prompt, label in names:
        said[prompt] = named(prompt, label)
    count = len(said)
    for label, name in enumerate(CLASS_NAMES[1:-1], 1):
        for other in (name.replace("_", " "), *_EVERYDAY_NAMES.get(name, ())):
            names.append((other, label))
            said.setdefault(other, named(other, label))
    for kind in kinds:
        said.setdefault(kind.noun, nouns == kind.noun)
        said.setdefault(kind.caption, captions == kind.caption)
    for kind in kinds:
        if kind.colour and kind.caption == f"{kind.colour} {kind.noun}":
            for name, label in names:
                if label == kind.label and len(name.split()) <= 2 and not name.endswith("."):
                    said.setdefault(f"{kind.colour} {name.lower()}", named(name, label) & (colours == kind.colour))
    return Phrases(tuple(said), np.stack(list(said.values())), np.arange(len(said)) < count)


def sentence(phrase: str, random: np.random.Generator) -> str:
    """A way of saying the phrase: in a random template of the protocol or alone, with or without an article."""
    templates = zero_shot_protocol().templates
    form = random.random()
    if form < 0.2:
        return phrase if form < 0.1 else f"a {phrase}"
    worded = phrase if form < 0.8 else f"a {phrase}"  # free phrases come with an article: "a photo of a a red car."
    return templates[random.integers(len(templates))].replace("{}", worded)


def train_tokenizer(phrases: Sequence[str], folder: Path) -> Any:
    """A CLIP tokenizer (byte-level BPE, end-of-word marks) whose merges come from the phrases and templates.

    The folder gets vocab.json, merges.txt and tokenizer_config.json, and is then read by `transformers`.

    Returns:
      A `transformers.CLIPTokenizer`. Any text can be encoded: all 256 bytes are tokens, inside and at the end of a
      word.
    """
    corpus = [template.replace("{}", "") for template in zero_shot_protocol().templates]
    corpus += [*phrases, *zero_shot_protocol().prompts]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Words are cut as CLIP cuts them: letters, single digits, runs of other signs; white space is dropped.
    words = [word for text in corpus for word in _words(text)]
    learner.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=_MERGES,
            min_frequency=1,
            end_of_word_suffix="</w>",
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    symbols = _byte_symbols()
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    vocabulary += ["".join(pair) for pair in merges]
    vocabulary = list(dict.fromkeys(vocabulary)) + [_START, _END]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": _START,
        "eos_token": _END,
        "pad_token": _END,
        "unk_token": _END,
        "model_max_length": _POSITIONS,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    from transformers import CLIPTokenizer  # takes seconds to import

    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=_POSITIONS)


def _without_article(caption: str) -> str:
    return caption.removeprefix("a ").removeprefix("an ")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|\d|[^\s\w]+|_", text)


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins of bytes, in CLIP's order."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())

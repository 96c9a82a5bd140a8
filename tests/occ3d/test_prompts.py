import json

import numpy as np
import pytest

from pop3d_jax.models.clip import load_clip
from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES
from pop3d_jax.occ3d.grid import FREE
from pop3d_jax.occ3d.prompts import PROMPT_SETS, prompt_set, read_prompt_file
from pop3d_jax.protocol import zero_shot_protocol
from pop3d_jax.text import embed_phrases


def pairs(prompts):
    return list(zip(prompts.phrases, prompts.labels.tolist(), strict=True))


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_a_shipped_list_is_whole(name):
    prompts = prompt_set(name)
    assert prompts.name == name
    assert prompts.source
    assert prompts.licence in ("MIT", "Apache-2.0", "ours")
    assert len({phrase.lower() for phrase in prompts.phrases}) == len(prompts.phrases)
    # Every class that lidarseg scores, but for "other flat", which no detector is asked for.
    missing = set(range(1, FREE)) - set(prompts.labels.tolist())
    assert missing == ({12} if name in ("gausstr", "occnerf") else set())
    assert (FREE in prompts.labels) == (name not in ("plain", "pop3d"))
    assert 0 not in prompts.labels


def test_ours_are_the_names_as_words():
    found = dict(pairs(prompt_set("plain")))
    assert len(found) == 16
    assert found["construction vehicle"] == 5
    assert found["driveable surface"] == 11


@pytest.mark.golden
def test_the_peers_lists_are_theirs(golden_file):
    peers = json.loads(golden_file("occ3d/protocol.json").read_text())["peers"]
    gausstr = peers["GaussTR"]
    expected = [
        (word, label)
        for words, label in zip(gausstr["groups"], gausstr["group_to_occ3d_id"], strict=True)
        for word in words
    ]
    assert pairs(prompt_set("gausstr")) == expected
    grounding = gausstr["grounding_prompts"]["groups"]
    expected = [(word, label) for label, words in enumerate(grounding, 1) for word in words]
    assert pairs(prompt_set("gausstr_grounding")) == expected
    assert dict(pairs(prompt_set("occnerf"))) == peers["OccNeRF_GaussianOcc"]["prompts_to_occ3d_id"]
    words, classes = peers["POP3D"]["subcategories"], peers["POP3D"]["category_index_to_16"]
    expected = [
        (word, classes[str(index)])
        for index, category in enumerate(LIDARSEG_CATEGORIES)
        for word in words[category]
        if classes[str(index)]
    ]
    assert pairs(prompt_set("pop3d")) == expected


def test_an_unknown_list_is_named():
    with pytest.raises(ValueError, match="'langocc' is none of the shipped prompt lists, plain, pop3d, gausstr"):
        prompt_set("langocc")


def test_a_users_file(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('[["a car", "car"], [" Sky ", 17], ["a lorry", 10]]')
    prompts = read_prompt_file(file)
    assert (prompts.name, prompts.source, prompts.licence, prompts.templates) == (
        "mine",
        "mine.json",
        "not stated",
        True,
    )
    assert pairs(prompts) == [("a car", 4), ("Sky", 17), ("a lorry", 10)]
    file.write_text('{"name": "x", "source": "y", "licence": "MIT", "templates": false, "phrases": [["road", 11]]}')
    prompts = read_prompt_file(file)
    assert (prompts.name, prompts.source, prompts.licence, prompts.templates) == ("x", "y", "MIT", False)
    assert pairs(prompts) == [("road", 11)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"mine.json cannot be read \(.*\): give JSON such as"),
        ("[[", "mine.json cannot be read"),
        ("3", "mine.json has no list of phrases: give JSON such as"),
        ('{"words": []}', "mine.json has no list of phrases"),
        ('{"phrases": [["a", 1]], "words": []}', r"unknown fields \['words'\]: known are name, source"),
        ('{"phrases": [["a", 1]], "templates": "no"}', "templates = 'no': give true or false"),
        ("[]", "has no phrase of a class 0 to 16"),
        ('[["sky", 17]]', "has no phrase of a class 0 to 16"),
        ('[["car", 4], ["bus", 18]]', r"entry 1 \(\['bus', 18\]\): the label must be 0 to 17, or one of others, barr"),
        ('[["car", -1]]', "entry 0 .*: the label must be"),
        ('[["car", 4.0]]', "entry 0 .*: the label must be"),
        ('[["car", true]]', "entry 0 .*: the label must be"),
        ('[["car", "cars"]]', "entry 0 .*: the label must be"),
        ('[["car", 4], ["bus", 3], ["Car ", 4]]', "entries 0 and 2 both say 'Car'"),
        ('[["car", 4], [" ", 4]]', "entry 1 .*: give a phrase and its label"),
        ('[["car", 4, 5]]', "entry 0 .*: give a phrase and its label"),
        ('{"name": "gausstr", "phrases": [["car", 4]]}', "calls itself 'gausstr', which is a shipped list"),
        ('{"name": ["a"], "phrases": [["car", 4]]}', "name, source and licence must be words"),
        ('{"source": null, "phrases": [["car", 4]]}', "name, source and licence must be words"),
        ('["car"]', "entry 0 .*: give a phrase and its label"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, words):
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=words) as raised:
        read_prompt_file(file)
    assert str(file) in str(raised.value)


@pytest.mark.slow
def test_words_are_embedded_with_templates_or_as_they_are(tiny_clip_folder, tmp_path):
    clip = load_clip(str(tiny_clip_folder))
    file = tmp_path / "mine.json"
    file.write_text('{"templates": false, "phrases": [["car", 4], ["tree", 16]]}')
    bare = read_prompt_file(file)
    np.testing.assert_array_equal(
        bare.embed(bare.phrases, clip, None), embed_phrases(clip, ["car", "tree"], templates=("{}",))
    )
    file.write_text('[["car", 4], ["tree", 16]]')
    around = read_prompt_file(file).embed(("car",), clip, None)
    expected = embed_phrases(clip, ["car"], templates=zero_shot_protocol().templates)
    np.testing.assert_array_equal(around, expected)
    assert np.abs(around - bare.embed(("car",), clip, None)).max() > 1e-3

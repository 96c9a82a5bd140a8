"""Flags of several commands."""

import importlib

import pytest

from pop3d_jax import shared_flags

_COMMANDS = ("evaluate", "evaluate_lidarseg", "evaluate_retrieval", "query", "export", "view")


class _Recorder:
    """In place of absl.flags: what is defined, and in which words."""

    def __init__(self):
        self.words = {}

    def define(self, name, *rest, **_):
        assert name not in self.words
        self.words[name] = rest[-1]

    def __getattr__(self, name):
        return self.define if name.startswith("DEFINE_") else lambda *_, **__: None


@pytest.fixture
def words(monkeypatch):
    """Command -> flag -> its help."""
    found = {}
    for name in _COMMANDS:
        command = importlib.import_module(f"pop3d_jax.{name}")
        recorder = _Recorder()
        monkeypatch.setattr(command, "flags", recorder)
        monkeypatch.setattr(shared_flags, "flags", recorder)
        command._define_flags()
        found[name] = recorder.words
    return found


def test_a_flag_of_several_commands_is_described_in_one_way(words):
    wordings = {}
    for flags in words.values():
        for name, text in flags.items():
            wordings.setdefault(name, set()).add(text)
    # Another thing in each: what is written; occupancy, not a phrase's lead; several folders.
    assert {name for name, texts in wordings.items() if len(texts) > 1} == {"out", "threshold", "records"}
    assert words["view"]["threshold"] == words["query"]["threshold"] != words["export"]["threshold"]
    assert words["view"]["records"] == words["export"]["records"] != words["evaluate_retrieval"]["records"]

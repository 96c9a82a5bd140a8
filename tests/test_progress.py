import logging

import pytest

from pop3d_jax import progress


def test_items_pass_through_and_plain_lines_tell_the_time_left(caplog, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="absl"):
        assert list(progress.progress(iter("abc"), 3, "reading")) == ["a", "b", "c"]
    assert "reading: 1 of 3, 0:00 left" in caplog.messages
    assert caplog.messages[-1] == "reading: 3 of 3 done in 0:00"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61.0, "1:01"), (3725.0, "1:02:05")])
def test_durations_read_like_a_clock(seconds, text):
    assert progress._duration(seconds) == text

import os

from pop3d_jax.user_cache import user_cache, user_text_cache


def test_it_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert os.fspath(user_cache("compiled")) == str(tmp_path / "pop3d_jax" / "compiled")
    assert os.fspath(user_text_cache()) == str(tmp_path / "pop3d_jax" / "text")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert os.fspath(user_cache("x")) == str(tmp_path / "home" / ".cache" / "pop3d_jax" / "x")


def test_without_a_place_nothing_is_kept(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert user_text_cache() is None

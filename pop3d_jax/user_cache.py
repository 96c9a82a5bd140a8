"""Where results are kept for the user from one command to the next, when no run's folder is there to hold them."""

import os

from etils import epath


def user_cache(name: str) -> epath.Path:
    """`$XDG_CACHE_HOME/pop3d_jax/NAME`, `~/.cache/pop3d_jax/NAME` by default; everything in it can be deleted."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return epath.Path(folder) / "pop3d_jax" / name


def user_text_cache() -> epath.Path | None:
    """For text vectors that are asked for again and again; None where the user may not write."""
    folder = user_cache("text")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None

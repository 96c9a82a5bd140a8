"""The page as one file: its scripts, styles, the 3D library and the data of a scene inlined, nothing fetched."""

import base64
import hashlib
import json
import string
from importlib import resources
from typing import Any

# Names that the scripts import each other by, and their files.
_MODULES = {
    "three": "three.bundle.js",
    "viewer/data.js": "data.js",
    "viewer/colours.js": "colours.js",
    "viewer/faces.js": "faces.js",
    "viewer/voxels.js": "voxels.js",
    "viewer/images.js": "images.js",
    "viewer/page.js": "page.js",
}


def render_page(scene: dict[str, Any], *, live: bool = False) -> str:
    """The HTML page of a scene.

    Whatever text is in the scene reaches the page as JSON in which no markup can begin; the scripts write it as text,
    and the page's content security policy runs no other script than these.

    Args:
      scene: from `scene_json`.
      live: the page may ask the server that it came from for phrases it does not know.
    """
    data = _inert(json.dumps({**scene, "live": live}, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    modules = {name: _data_url(_static(file)) for name, file in _MODULES.items()}
    return string.Template(_static("page.html")).substitute(
        # Not to be guessed by a text within the data, and the same for the same page.
        nonce=hashlib.sha256(data.encode()).hexdigest()[:32],
        connect="'self'" if live else "'none'",
        style=_static("style.css"),
        modules=json.dumps({"imports": modules}),
        data=data,
    )


def _inert(document: str) -> str:
    """JSON of the same meaning that cannot end the script element it stands in."""
    for character in "<>&\u2028\u2029":
        document = document.replace(character, f"\\u{ord(character):04x}")
    return document


def _static(name: str) -> str:
    return resources.files(__package__).joinpath("static", name).read_text(encoding="utf-8")


def _data_url(script: str) -> str:
    return f"data:text/javascript;base64,{base64.b64encode(script.encode()).decode()}"

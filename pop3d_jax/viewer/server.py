"""A small server behind the page: it gives out the page and answers phrases that the page does not know."""

import functools
import http.server
import json
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

from absl import logging

# The same as the field in the page takes.
LONGEST_PHRASE = 200
_LOOPBACK = ("127.0.0.1", "localhost")
# What a browser says of a request that the page itself, or a person at the address bar, has made.
_OWN_REQUESTS = (None, "same-origin", "none")
_KEPT_ANSWERS = 32
_SECONDS_FOR_A_REQUEST = 60


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to the host."""
    return host in _LOOPBACK


def make_server(
    page: str, scorer: Callable[[str], dict[str, Any]], host: str, port: int
) -> http.server.ThreadingHTTPServer:
    """A server, bound and not yet serving: call its `serve_forever()`.

    Args:
      page: HTML, given out at `/`.
      scorer: a `PhraseScorer`; answers `/similarity?text=...`.
      host: name or address to bind to; on loopback, requests under any other name are refused, so that a page of
        another site cannot reach the server through a name of its own.
      port: 0 for any that is free.

    Raises:
      ValueError: the address is taken or not ours.
    """
    document = page.encode()
    lock = threading.Lock()

    @functools.lru_cache(_KEPT_ANSWERS)
    def answer(text: str) -> bytes:
        return json.dumps(scorer(text), allow_nan=False).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = _SECONDS_FOR_A_REQUEST

        def do_GET(self) -> None:
            if is_loopback(host) and (self.headers.get("Host") or "").rsplit(":", 1)[0] not in _LOOPBACK:
                self._reply(403, "text/plain", b"this server answers to localhost only")
                return
            url = urllib.parse.urlsplit(self.path)
            if url.path == "/":
                self._reply(200, "text/html", document)
            elif url.path == "/similarity" and self.headers.get("Sec-Fetch-Site") not in _OWN_REQUESTS:
                self._reply(403, "text/plain", b"only the page itself may ask")
            elif url.path == "/similarity":
                self._answer(urllib.parse.parse_qs(url.query).get("text", [""])[0])
            else:
                self._reply(404, "text/plain", b"there is / and /similarity?text=PHRASE")

        def _answer(self, text: str) -> None:
            text = text.strip()
            if not text or len(text) > LONGEST_PHRASE:
                self._reply(400, "text/plain", f"a phrase has 1 to {LONGEST_PHRASE} characters".encode())
                return
            with lock:  # the text tower serves one at a time
                body = answer(text)
            self._reply(200, "application/json", body)

        def _reply(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, form: str, *values: Any) -> None:
            logging.debug(form, *values)

    try:
        return http.server.ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise ValueError(f"--host={host} --port={port}: {error.strerror}; give others, --port=0 takes any") from error

import http.client
import json
import threading

import pytest

from pop3d_jax.viewer.server import LONGEST_PHRASE, is_loopback, make_server


@pytest.fixture
def asked():
    """Phrases that reached the scorer."""
    return []


@pytest.fixture
def connection(asked):
    def scorer(text):
        asked.append(text)
        return {"text": text}

    server = make_server("<p>page ü</p>", scorer, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    yield client
    client.close()
    server.shutdown()
    server.server_close()
    thread.join()


def get(connection, path, **headers):
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_and_a_phrase(connection, asked):
    assert get(connection, "/") == (200, "<p>page ü</p>")
    for _ in range(2):
        status, body = get(connection, "/similarity?text=a+red%20car%20%3Cb%3E")
        assert (status, json.loads(body)) == (200, {"text": "a red car <b>"})
    assert asked == ["a red car <b>"]  # the second answer was kept


@pytest.mark.parametrize("text", ["", "%20", "x" * (LONGEST_PHRASE + 1)])
def test_a_phrase_too_long_or_empty(connection, asked, text):
    status, body = get(connection, f"/similarity?text={text}")
    assert (status, body) == (400, "a phrase has 1 to 200 characters")
    assert not asked


def test_other_names_and_other_paths_are_refused(connection, asked):
    assert get(connection, "/similarity?text=car", Host="evil.example:80")[0] == 403
    assert get(connection, "/", Host="127.0.0.1.evil.example")[0] == 403
    foreign = {"Sec-Fetch-Site": "cross-site"}
    assert get(connection, "/similarity?text=car", **foreign) == (403, "only the page itself may ask")
    assert get(connection, "/../etc/passwd")[0] == 404
    assert get(connection, "/", Host="localhost:1")[0] == 200
    connection.request("POST", "/similarity", body="text=car")
    assert connection.getresponse().status == 501
    assert not asked


def test_an_address_that_is_taken_is_named(connection):
    with pytest.raises(ValueError, match=f"--host=127.0.0.1 --port={connection.port}: .*--port=0"):
        make_server("", lambda text: {}, "127.0.0.1", connection.port)


def test_loopback_names():
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")

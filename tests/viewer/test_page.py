import json
import re

import pytest

from pop3d_jax.viewer.page import render_page

MARKUP = "</script><script>window.injected = 1</script><!-- <img src=x onerror='window.injected = 1'> & \u2028"


@pytest.mark.parametrize("live", [False, True])
def test_the_data_comes_back_and_cannot_end_its_element(live):
    scene = {"title": MARKUP, "phrases": [{"text": MARKUP}], "number": 0.1}
    page = render_page(scene, live=live)
    (data,) = re.findall(r'<script nonce="[0-9a-f]{32}" type="application/json" id="scene-data">(.*?)</script>', page)
    assert json.loads(data) == {**scene, "live": live}
    assert not set("<>&\u2028") & set(data)
    assert page.count("</script>") == 3


def test_nothing_is_fetched():
    page = render_page({"title": "x"})
    assert "connect-src 'none'" in page
    outside = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.S)
    assert not re.search(r"(src|href)=", outside)
    assert "connect-src 'self'" in render_page({"title": "x"}, live=True)


def test_numbers_that_are_no_json_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        render_page({"title": float("nan")})

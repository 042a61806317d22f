import base64
import re
from html.parser import HTMLParser

import pytest

from sparse_exp.report.page import write_page

PNG = b"\x89PNG\r\n\x1a\nnot really"
TEXT = """# A <script>alert(1)</script> title

- the answer

![speed & more](plots/a%20picture.png)

| engine | images/s |
|---|---:|
| OpenVINO | 43.3 |

[sparsity.csv](sparsity.csv) and [docs](https://example.org/docs)

```sh
python -m sparse_exp name='<b>'
```
"""


class Reader(HTMLParser):
    """The elements of a page: names and attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, name):
        return [attributes for tag, attributes in self.found if tag == name]


@pytest.fixture
def page(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a picture.png").write_bytes(PNG)
    write_page(tmp_path / "report.html", TEXT, "yolov5s & <trees>")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_pictures_stand_in_the_page_itself(page):
    (picture,) = Reader(page).all("img")
    kind, _, data = picture["src"].partition(";base64,")
    assert kind == "data:image/png"
    assert base64.b64decode(data) == PNG
    assert picture["alt"] == "speed & more"


def test_it_needs_no_other_file_and_runs_no_script(page):
    reader = Reader(page)
    assert reader.all("script") == []
    assert reader.all("link") == []
    assert [link["href"] for link in reader.all("a")] == ["https://example.org/docs"]
    assert "sparsity.csv and " in re.sub("<[^>]*>", "", page)
    assert "url(" not in page


def test_text_is_shown_as_it_is(page):
    assert "<title>yolov5s &amp; &lt;trees&gt;</title>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "name='&lt;b&gt;'" in page or "name=&#x27;&lt;b&gt;&#x27;" in page


def test_tables_are_tables_with_numbers_to_the_right(page):
    assert page.count("<table>") == page.count("</table>") == 1
    cells = Reader(page).all("td")
    assert "right" in cells[1]["style"]
    assert "style" not in cells[0]


def test_a_picture_that_is_gone_keeps_its_name(tmp_path):
    write_page(tmp_path / "report.html", "![gone](plots/gone.png)", "x")
    (picture,) = Reader((tmp_path / "report.html").read_text()).all("img")
    assert picture == {"src": "plots/gone.png", "alt": "gone"}

import itertools
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from sparse_exp.compare.scatter import page, svg, ticks
from sparse_exp.metrics.pareto import Axis, Point

X, Y = Axis("size/onnx_mb", less=True), Axis("val/map50", less=False)
POINTS = [
    Point(1, "a <b> & c", 2.0, 0.6, front=True, best=True),
    Point(2, "d", 4.0, 0.5, front=False),
    Point(3, "e", 1.0, 0.3, front=True),
]
NOTES = {1: 'a <b> & c\n"x"</script>', 2: "d", 3: "e"}


def test_better_values_lie_higher_and_the_front_is_marked():
    tree = ElementTree.fromstring(svg(POINTS, X, Y, NOTES))
    circles = {int(c.get("data-run")): c for c in tree.iter("circle")}
    assert len(circles) == 3
    across = {number: float(c.get("cx")) for number, c in circles.items()}
    down = {number: float(c.get("cy")) for number, c in circles.items()}
    assert across[3] < across[1] < across[2]
    assert down[1] < down[2] < down[3]  # pixels are counted from above
    assert {number: c.get("class") for number, c in circles.items()} == {1: "front best", 2: "", 3: "front"}
    assert circles[1].find("title").text == NOTES[1]


def test_values_are_where_the_ticks_say():
    tree = ElementTree.fromstring(svg(POINTS, X, Y, NOTES))
    labels = [t for t in tree.iter("text") if t.get("text-anchor") == "middle" and t.get("x")][:-1]
    (x1, v1), (x2, v2) = [(float(t.get("x")), float(t.text)) for t in (labels[0], labels[-1])]
    for circle, point in (
        (c, p) for c in tree.iter("circle") for p in POINTS if str(p.number) == c.get("data-run")
    ):
        shown = v1 + (float(circle.get("cx")) - x1) * (v2 - v1) / (x2 - x1)
        assert shown == pytest.approx(point.x, abs=0.01)


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.rows = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.rows += tag == "tr"


def test_the_page_needs_nothing_else_and_escapes_what_it_shows():
    rows = [(1, ["*", "a <b> & c", "0.6"]), (2, ["", "d", "0.5"])]
    text = page(
        "T <1>", POINTS, X, Y, notes=NOTES, table=(["", "run", "map50"], rows), numeric=1, lines=["x <= 4"]
    )
    reader = _Reader()
    reader.feed(text)
    assert not reader.links
    assert "http" not in text
    assert reader.rows == 3
    assert "b" not in reader.tags
    data = re.search(r'<script id="notes" type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(data) == {str(number): note for number, note in NOTES.items()}


def test_one_point_or_equal_values_still_make_a_picture():
    alone = [Point(1, "a", 0.0, 0.0, front=True)]
    tree = ElementTree.fromstring(svg(alone, X, Y, {}))
    circle = next(tree.iter("circle"))
    assert 0 < float(circle.get("cx")) < 860
    assert 0 < float(circle.get("cy")) < 470


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.2, 7.9), (5.94, 98.2), (1e-9, 3e-9), (0.41, 0.66), (999, 1001)]
)
def test_ticks_are_round_few_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)
    steps = {float(f"{b - a:.3g}") for a, b in itertools.pairwise(found)}
    assert len(steps) == 1
    assert f"{steps.pop():.0e}"[0] in "125"

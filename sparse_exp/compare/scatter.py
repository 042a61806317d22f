"""Draw runs by two metrics as one HTML page without other files: an SVG with hover, and a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape

from sparse_exp.metrics.pareto import Axis, Point, staircase

_WIDTH, _HEIGHT = 860, 470
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 18, 16, 56
_TICKS = 6

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --faint: #e3e3e3; --other: #9a9a9a; --front: #0072b2;
  --best: #e69f00; --paper: #fff; --lit: #eef5fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --faint: #3a3a3a; --other: #8a8a8a;
  --front: #56b4e9; --paper: #1b1b1b; --lit: #243340 } }
p { overflow-wrap: anywhere }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
svg { width: 100%; height: auto; overflow: visible } svg text { fill: var(--ink); font-size: 12px }
.grid { stroke: var(--faint) }
.stairs { fill: none; stroke: var(--front); stroke-opacity: .55; stroke-width: 1.5 }
circle { fill: var(--other) } circle.front { fill: var(--front) }
circle.best { stroke: var(--best); stroke-width: 3.5 } circle.lit { stroke: var(--ink); stroke-width: 2.5 }
#tip { position: fixed; display: none; pointer-events: none; background: var(--paper); color: var(--ink);
  border: 1px solid var(--other); border-radius: 5px; padding: .4rem .6rem; max-width: 30rem; font-size: 13px;
  white-space: pre-line; overflow-wrap: anywhere; box-shadow: 0 2px 8px #0003 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; width: 100% }
th, td { text-align: left; padding: .25rem .6rem; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--faint) }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal }
tr.front td { font-weight: 600 } tr.lit td { background: var(--lit) }
"""

_SCRIPT = """
const tip = document.getElementById('tip'), notes = JSON.parse(document.getElementById('notes').textContent);
const parts = number => document.querySelectorAll(`[data-run="${number}"]`);
function show(number, x, y) {
  parts(number).forEach(part => part.classList.add('lit'));
  tip.textContent = notes[number];
  tip.style.display = 'block';
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8)) + 'px';
  tip.style.top = Math.max(4, Math.min(y + 14, innerHeight - tip.offsetHeight - 8)) + 'px';
}
function hide(number) {
  parts(number).forEach(part => part.classList.remove('lit'));
  tip.style.display = 'none';
}
document.querySelectorAll('[data-run]').forEach(part => {
  part.addEventListener('mousemove', event => show(part.dataset.run, event.clientX, event.clientY));
  part.addEventListener('mouseleave', () => hide(part.dataset.run));
});
"""


def page(
    title: str,
    points: Sequence[Point],
    x: Axis,
    y: Axis,
    *,
    notes: dict[int, str],
    table: tuple[Sequence[str], Sequence[tuple[int, Sequence[str]]]],
    numeric: int,
    lines: Sequence[str],
) -> str:
    """The page as HTML. Without scripts it shows the same, with the browser's own tool tips.

    Args:
        title: headline.
        points: at least one.
        x: horizontal axis.
        y: vertical axis.
        notes: the text that hovering shows for each run of the table, by its number; may have several lines.
        table: titles of columns, and for each row the run's number and its cells.
        numeric: how many of the last columns hold numbers.
        lines: remarks below the picture.
    """
    data = json.dumps({str(number): note for number, note in notes.items()}).replace("<", "\\u003c")
    front = {point.number for point in points if point.front}
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n<h1>{escape(title)}</h1>\n"
        f"{svg(points, x, y, notes)}\n<p>{'<br>'.join(map(escape, lines))}</p>\n"
        f'<div class="wide">{_table(*table, numeric, front)}</div>\n<div id="tip"></div>\n'
        f'<script id="notes" type="application/json">{data}</script>\n<script>{_SCRIPT}</script>\n</html>\n'
    )


def svg(points: Sequence[Point], x: Axis, y: Axis, notes: dict[int, str]) -> str:
    """The picture alone; see `page`."""
    across = _Scale([point.x for point in points], _LEFT, _WIDTH - _RIGHT)
    up = _Scale([point.y for point in points], _HEIGHT - _BOTTOM, _TOP)
    front = [(point.x, point.y) for point in points if point.front]
    corners = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in staircase(front, x_less=x.less))
    # The front and the best are drawn last, so that nothing covers them.
    circles = "".join(
        _circle(point, across(point.x), up(point.y), notes.get(point.number, point.name))
        for point in sorted(points, key=lambda point: (point.best, point.front))
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(y.metric)} over {escape(x.metric)}">'
        f"{_grid(across, up)}{_titles(x, y)}"
        f'<polyline class="stairs" points="{corners}"/>{circles}</svg>'
    )


class _Scale:
    """Maps values to pixels; the axis reaches a little beyond the values, and its ticks are round numbers."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        self._low, self._high, self._start, self._end = low - margin, high + margin, start, end
        self.ticks = ticks(self._low, self._high)

    def __call__(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)


def ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _grid(across: _Scale, up: _Scale) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    vertical = "".join(
        f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{_TOP}" y2="{bottom}"/>'
        f'<text x="{across(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>'
        for tick in across.ticks
    )
    horizontal = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in up.ticks
    )
    return vertical + horizontal


def _titles(x: Axis, y: Axis) -> str:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    return (
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 14}" text-anchor="middle">'
        f"{escape(x.label)}</text>"
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>'
    )


def _circle(point: Point, across: float, up: float, note: str) -> str:
    kinds = " ".join(name for name, held in (("front", point.front), ("best", point.best)) if held)
    radius = 6.5 if point.front or point.best else 4.5
    return (
        f'<circle class="{kinds}" data-run="{point.number}" cx="{across:.1f}" cy="{up:.1f}" r="{radius}">'
        f"<title>{escape(note)}</title></circle>"
    )


def _table(
    titles: Sequence[str], rows: Sequence[tuple[int, Sequence[str]]], numeric: int, front: set[int]
) -> str:
    """The table; hovering over a row marks its point, too."""
    texts = len(titles) - numeric
    head = "".join(_cell("th", text, index >= texts) for index, text in enumerate(titles))
    body = "".join(
        f'<tr class="{"front" if number in front else ""}" data-run="{number}">'
        f"{''.join(_cell('td', text, index >= texts) for index, text in enumerate(cells))}</tr>\n"
        for number, cells in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _cell(kind: str, text: str, is_number: bool) -> str:  # noqa: FBT001
    return f"<{kind}{' class=n' if is_number else ''}>{escape(text)}</{kind}>"

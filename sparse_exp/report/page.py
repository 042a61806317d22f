"""Write ``report.html``: the report as one page that needs no other file, for a browser or a mail."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

from sparse_exp.files import write_text

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --faint: #ddd; --paper: #fff; --link: #0060a0 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --faint: #444; --paper: #1b1b1b; --link: #6cb8ee }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1000px;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }
h1 + ul { font-size: 17px } a { color: var(--link) }
img { max-width: 100%; background: #fff; border-radius: 4px }
.wide { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; font-size: 13px }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--faint); text-align: left;
  overflow-wrap: normal; font-variant-numeric: tabular-nums }
pre { padding: .6rem .8rem; border: 1px solid var(--faint); border-radius: 4px; white-space: pre-wrap }
"""


def write_page(path: Path, markdown: str, title: str) -> None:
    """Write a page of Markdown as HTML, whole or not at all.

    Pictures stand in the page itself. Links to other files of the machine become plain text, as they lead
    nowhere once the page is sent to someone. HTML in the text is shown, not followed.

    Args:
        path: file to write; links of the text start from its directory.
        markdown: the text, with tables.
        title: of the page.

    Raises:
        OSError: the file cannot be written.
    """
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')  # wide ones scroll
    reader.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = reader.parse(markdown)
    for token in tokens:
        _embed(token.children or (), path.parent)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{reader.renderer.render(tokens, reader.options, {})}</body>\n</html>\n"
    )
    write_text(path, page)


def _embed(tokens: Sequence[Token], folder: Path) -> None:
    """Put pictures into the page, and take links to files out, in place."""
    for token in tokens:
        if token.type == "image":
            token.attrSet("src", _data_of(str(token.attrGet("src")), folder))
    local = False
    for token in tokens:
        if token.type == "link_open":
            local = not urlsplit(str(token.attrGet("href"))).scheme
        if local and token.type in ("link_open", "link_close"):
            token.type, token.tag, token.nesting, token.content = "text", "", 0, ""


def _data_of(address: str, folder: Path) -> str:
    """A picture of the folder as an address that holds it; another address as it is."""
    file = folder / unquote(address)
    if urlsplit(address).scheme or not file.is_file():
        return address
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"

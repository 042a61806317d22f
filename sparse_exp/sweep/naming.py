"""Derive the name of a sweep from its command line, so that the same command finds its directory again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

_FLAGS = ("-m", "--multirun")
# Words that say where a sweep runs or is logged, or how it goes on, but do not change its jobs.
_WITHOUT_EFFECT = re.compile(
    r"[+~]*(hydra[./]|launcher[.=]|ray\.|tracker[.=]|paths[.=]|sweep\.(name|rerun|trials)=|dry_run=|overwrite=)"
)
_SWEPT = re.compile(r"[+~]*(?P<key>[^=]+)=(?P<value>.*)", re.DOTALL)
_FUNCTIONS = re.compile(r"^\s*(choice|range|interval|glob|shuffle|sort|tag)\(")
_SHOWN = 3


def sweep_name(words: Sequence[str]) -> str | None:
    """A directory name for the sweep that a command line starts, for example ``model-recipe-1f09c3``.

    Args:
        words: the command line without the program's name.

    Returns:
        Up to three keys that vary, and a digest of the words that affect the jobs. Their order counts, since
        the numbers of the jobs depend on it. None for a command that starts no sweep.
    """
    if not any(word in _FLAGS for word in words):
        return None
    effective = [word for word in words if word not in _FLAGS and not _WITHOUT_EFFECT.match(word)]
    varied = [key for key in map(_varied_key, effective) if key]
    digest = hashlib.sha256("\n".join(effective).encode()).hexdigest()[:6]
    return "-".join([*(varied[:_SHOWN] or ["sweep"]), digest])


def _varied_key(word: str) -> str:
    """The last part of the key that a word varies, or the sweep preset that it names; else an empty text."""
    match = _SWEPT.fullmatch(word)
    if match is None:
        return ""
    key, value = match["key"], match["value"]
    if key == "sweep":
        return _as_name(value)
    outside = re.sub(r"\[.*?\]|\{.*?\}|\(.*?\)|'.*?'|\".*?\"", "", value, flags=re.DOTALL)
    return _as_name(key) if "," in outside or _FUNCTIONS.match(value) else ""


def _as_name(key: str) -> str:
    return re.sub(r"[^\w-]", "_", re.split(r"[./@]", key)[-1])

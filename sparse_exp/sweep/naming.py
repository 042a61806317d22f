"""Derive the name of a sweep from its command line, so that the same command finds its directory again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Words that say where a sweep runs or is logged, or how it goes on, but do not change its jobs.
_WITHOUT_EFFECT = re.compile(
    r"[+~]*(hydra(?!/sweeper)[./]|launcher[.=]|ray\.|tracker[.=]|paths[.=]|sweep\.(name|rerun|trials|max_loss)=|dry_run=|overwrite=)"
)
_SWEPT = re.compile(r"[+~]*(?P<key>[^=]+)=(?P<value>.*)", re.DOTALL)
_FUNCTIONS = re.compile(r"^\s*(choice|range|interval|glob|shuffle|sort|tag)\(")
_SHOWN = 3
launched: str | None = None
"""Name of the sweep whose jobs this process launches, which ``sweep.name`` is by default."""
NO_CHDIR = (
    "hydra.job.chdir=true does not work here, as relative paths start at the current directory. "
    "Leave it out; paths.run, hydra.run.dir and hydra.sweep.dir say where files go."
)


def sweep_name(words: Sequence[str], params: Mapping[str, Any] | None = None) -> str:
    """A directory name for the sweep that a command line starts, for example ``model-recipe-1f09c3``.

    Args:
        words: the command line without the program's name.
        params: ``hydra.sweeper.params``: what presets vary, or the command line itself.

    Returns:
        Up to three keys that vary, and a digest of all that affects the jobs. Its order counts, since the
        numbers of the jobs depend on it.
    """
    effective = [word for word in words if not (_is_flag(word) or _WITHOUT_EFFECT.match(word))]
    given = [f"{key}={value}" for key, value in (params or {}).items()]
    varied = [key for key in map(_varied_key, effective) if key] or list(
        filter(None, map(_varied_key, given))
    )
    text = "\n".join([*effective, *([json.dumps(given)] if given else [])])
    return "-".join([*(varied[:_SHOWN] or ["sweep"]), hashlib.sha256(text.encode()).hexdigest()[:6]])


def _is_flag(word: str) -> bool:
    """Whether a word is ``-m``, ``--multirun``, or one of the abbreviations that argparse takes for it."""
    return word == "-m" or (word.startswith("--m") and "--multirun".startswith(word))


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

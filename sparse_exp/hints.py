"""Commands that messages tell people to type: they work as they are printed, whatever a path holds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

# What Hydra reads as a text without quotes: it begins with a letter or holds a slash, and is no null or true.
_PLAIN = re.compile(r"(?!(?:null|true|false|inf|nan)$)(?=[a-z_]|.*/)[\w./@%+-]+", re.ASCII | re.IGNORECASE)


def command_line(*words: str, module: str = "sparse_exp") -> str:
    """``python -m MODULE WORDS``, each word quoted where a shell would read more into it."""
    return shlex.join(["python", "-m", module, *words])


def resume_command(run: Path, *words: str) -> str:
    """What goes on with a run: its directory and other words of the command line.

    Args:
        run: the directory; a relative one is meant from where the command will be typed.
        words: as `override` makes them.
    """
    return command_line(override("resume", str(run)), *words)


def override(key: str, value: object) -> str:
    """``KEY=VALUE`` as Hydra reads it, to be quoted once more for a shell.

    Args:
        key: dotted name of a value.
        value: a text, number, truth value, None, or a list or a dictionary of them.
    """
    return f"{key}={_value(value)}"


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_value, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_value(name)}:{_value(each)}" for name, each in value.items()) + "}"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else _quoted(value)
    return "null" if value is None else str(value).lower()


def _quoted(text: str) -> str:
    """In double quotes, which the single ones of a shell leave alone.

    Of backslashes Hydra's grammar reads only those that stand before a quote.
    """
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'

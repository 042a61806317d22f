"""Errors and addresses as they may be shown."""

from __future__ import annotations

import re


def one_line(error: BaseException) -> str:
    """The message of an error as one line of at most 300 characters, without its last full stop."""
    text = " ".join(without_password(str(error)).split()) or type(error).__name__
    return (text if len(text) <= 300 else text[:297] + "...").rstrip(".")


def without_password(text: str) -> str:
    """``text`` with the user and password of the addresses in it replaced by ``***``."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)

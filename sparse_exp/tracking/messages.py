"""Errors as they may be shown."""

from __future__ import annotations

from sparse_exp.redaction import without_secrets


def one_line(error: BaseException) -> str:
    """The message of an error as one line of at most 300 characters, without its last full stop."""
    text = " ".join(without_secrets(str(error)).split()) or type(error).__name__
    return (text if len(text) <= 300 else text[:297] + "...").rstrip(".")

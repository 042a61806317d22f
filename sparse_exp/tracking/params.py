"""Names and values as MLflow takes them: pure functions of plain data.

The limits are those of MLflow 3 (``mlflow.utils.validation``), which cuts longer values silently.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

MAX_VALUE_LENGTH = 6000
MAX_KEY_LENGTH = 250
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9_\-. :/]")


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """Flat parameters of a nested configuration, such as ``{"trainer.lr": "0.001"}``.

    Plain values are written as in YAML (``null``, ``true``), enums by their name. A list of plain
    values is one parameter (``[1, 32]``); a list that holds dicts or lists is numbered from 0
    (``model.sources.0.uri``). Keys that become the same once sanitized are told apart by a hash.

    Args:
        config: dicts, lists and plain values.

    Returns:
        Parameters in the configuration's order; keys are valid names for MLflow, values at most
        6000 characters.
    """
    params: dict[str, str] = {}
    for path, value in _leaves(config, ()):
        key = sanitize(".".join(path))
        if key in params:
            key = f"{key[: MAX_KEY_LENGTH - 9]}-{_hash(repr(path))}"
        params[key] = shorten(_text(value), MAX_VALUE_LENGTH)
    return params


def sanitize(name: str) -> str:
    """The nearest name that MLflow accepts for a metric, parameter or tag.

    Letters, digits and ``_ - . space : /`` stay and others become ``_``, as do parts that are no
    name in a path (empty, ``.`` and ``..``). Longer than 250 characters is shortened with a hash.
    """
    parts = _NOT_ALLOWED.sub("_", name).split("/")
    path = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    # MLflow refuses any path that begins like the parent directory, even "..name".
    return shorten("_" + path if path.startswith("..") else path, MAX_KEY_LENGTH, mark="...")


def shorten(text: str, limit: int, mark: str = "... shortened, sha256 ") -> str:
    """``text``, or its beginning and a hash of the whole when it is longer than ``limit`` characters."""
    if len(text) <= limit:
        return text
    tail = mark + _hash(text)
    return text[: limit - len(tail)] + tail


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(_plain(key))))
    elif _is_list(value) and any(isinstance(inner, Mapping) or _is_list(inner) for inner in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(index)))
    else:
        yield path, value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


def _text(value: Any) -> str:
    value = _plain(value)
    if _is_list(value):
        return json.dumps([_plain(inner) for inner in value], ensure_ascii=False, default=str)
    if value is None or isinstance(value, bool | Mapping):
        return json.dumps(value)
    return str(value)

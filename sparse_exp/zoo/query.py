"""The little language of ``zoo search``: ``size=s sparsity>=0.7 quantized``.

Terms are joined by spaces, and a model is found when it fits them all. A term is

- ``KEY OP VALUE`` with one of ``= != < <= > >=``; spaces around OP may be there or not. Text is compared
  without regard to case, and ``*`` and ``?`` stand for any letters; of text only ``=`` and ``!=`` make sense.
  A number may be a percentage: ``70%`` is 0.7.
- a word: ``quantized``, ``pruned``, ``dense`` or ``vnni``, or else the size, data set, recipe, a class, or a
  part of the tag.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from sparse_exp.errors import ConfigError, expected

Metadata = Mapping[str, Any]
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_TEXTS = ("size", "dataset", "tag", "recipe", "stub", "origin", "by", "published")
_METRICS = {
    "map50": "val/map50",
    "map50_95": "val/map50_95",
    "recovery": "recovery/map50",
    "onnx_mb": "size/onnx_mb",
    "onnx_gzip_mb": "size/onnx_gzip_mb",
}


def _metric(name: str, model: Metadata) -> Any:
    return model.get("metrics", {}).get(name)


_NUMBERS: dict[str, Callable[[Metadata], Any]] = {
    "sparsity": lambda model: model.get("sparsity"),
    "imgsz": lambda model: model.get("imgsz"),
    "classes": lambda model: len(model.get("classes", ())),
    **{key: partial(_metric, name) for key, name in _METRICS.items()},
}
_FLAGS: dict[str, Callable[[Metadata], bool]] = {
    "quantized": lambda model: bool(model.get("quantized")),
    "pruned": lambda model: not str(model.get("tag")).startswith("base"),
    "dense": lambda model: str(model.get("tag")).startswith("base"),
    "vnni": lambda model: bool(model.get("block4")),
}
KEYS = (*_TEXTS, *_NUMBERS, *_FLAGS)
_AROUND = re.compile(r"\s*(<=|>=|!=|=|<|>)\s*")
_TERM = re.compile(r"(?P<key>[^<>=!]+)(?P<op><=|>=|!=|=|<|>)(?P<value>[^<>=!]+)")
_YES, _NO = ("true", "yes", "1"), ("false", "no", "0")


def parse_query(text: str) -> Callable[[Metadata], bool]:
    """A query as a test of what ``model.json`` says; an empty one fits any model.

    Raises:
        ConfigError: a term is malformed, names a key that there is not, or compares a text or a number with
            something else; the message names the term.
    """
    terms = [_parse_term(term) for term in _AROUND.sub(r"\1", text).split()]
    return lambda model: all(fits(model) for fits in terms)


def _parse_term(term: str) -> Callable[[Metadata], bool]:
    if not re.search("[<>=!]", term):
        return _FLAGS.get(term.lower()) or _names(term.lower())
    match = _TERM.fullmatch(term)
    if match is None:
        raise _wrong(term, "KEY OP VALUE, OP one of = != < <= > >=")
    key, op, value = match["key"].lower(), match["op"], match["value"]
    if key in _TEXTS:
        return _compare_text(term, key, op, value.lower())
    if key in _NUMBERS:
        return _compare_number(term, key, op, value)
    if key in _FLAGS:
        return _compare_flag(term, key, op, value.lower())
    raise _wrong(term, f"a key of {', '.join(KEYS)}")


def _wrong(term: str, should_be: str) -> ConfigError:
    example = "Correct the search, for example 'size=s sparsity>=0.7 quantized'."
    return ConfigError(expected("the term of the search", should_be, term, example))


def _names(word: str) -> Callable[[Metadata], bool]:
    def fits(model: Metadata) -> bool:
        texts = [model.get(key, "") for key in ("size", "dataset", "recipe", "tag")]
        texts += [*re.split("[-_]", str(model.get("tag", ""))), *model.get("classes", ())]
        return any(fnmatchcase(str(text).lower(), word) for text in texts)

    return fits


def _compare_text(term: str, key: str, op: str, value: str) -> Callable[[Metadata], bool]:
    if op in ("=", "!="):
        return lambda model: fnmatchcase(str(model.get(key, "")).lower(), value) == (op == "=")
    if key == "published":  # dates sort as their texts do
        return lambda model: _OPERATORS[op](str(model.get(key, "")).lower(), value)
    raise _wrong(term, f"{key}=VALUE or {key}!=VALUE, {key} being a text")


def _compare_number(term: str, key: str, op: str, value: str) -> Callable[[Metadata], bool]:
    try:
        wanted = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise _wrong(term, f"{key} compared with a number") from None

    def fits(model: Metadata) -> bool:
        found = _NUMBERS[key](model)
        return found is not None and _OPERATORS[op](float(found), wanted)

    return fits


def _compare_flag(term: str, key: str, op: str, value: str) -> Callable[[Metadata], bool]:
    if op not in ("=", "!=") or value not in (*_YES, *_NO):
        raise _wrong(term, f"{key}, {key}=true or {key}=false")
    wanted = (value in _YES) == (op == "=")
    return lambda model: _FLAGS[key](model) == wanted

"""Find models of the zoo by what they are: ``size=s sparsity>=0.7 quantized``.

Terms stand between spaces or commas, and a model is found when it meets them all. A term is

- ``KEY OP VALUE`` as in ``compare --best``; see `sparse_exp.metrics.names`. KEY is one of `KEYS`, or else a
  metric, in full or short. Texts are compared without regard to case, and ``*`` and ``?`` stand for any
  letters; they take only ``=`` and ``!=``, except dates.
- a word: ``quantized``, ``pruned``, ``slim``, ``dense`` or ``vnni``, or else the size, the data set, the
  recipe, a class, or the tag or a part of it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from sparse_exp.config.imgsz import imgsz_of, sides
from sparse_exp.errors import ConfigError, expected
from sparse_exp.metrics.names import (
    SIGNS,
    Limit,
    full_name,
    metrics_like,
    read_comparison,
    read_number,
    split_terms,
)
from sparse_exp.sources.local import Published

Metadata = Mapping[str, Any]
Test = Callable[[Metadata], bool]
_TEXTS = ("size", "dataset", "tag", "recipe", "stub", "origin", "by", "published")
_NUMBERS: dict[str, Callable[[Metadata], Any]] = {
    "sparsity": operator.methodcaller("get", "sparsity"),
    "imgsz": lambda model: _longer_side(model.get("imgsz")),
    "classes": lambda model: len(model.get("classes", ())),
}
_FLAGS: dict[str, Test] = {
    "quantized": lambda model: bool(model.get("quantized")),
    "pruned": lambda model: not re.match("base|slim[0-9]+(_quant|-|$)", str(model.get("tag"))),
    "slim": lambda model: str(model.get("tag")).startswith("slim"),
    "dense": lambda model: str(model.get("tag")).startswith("base"),
    "vnni": lambda model: bool(model.get("block4")),
}
KEYS = (*_TEXTS, *_NUMBERS, *_FLAGS)
# Metrics that may be named although no model of the zoo has them.
_USUAL = ("val/map50", "val/map50_95", "recovery/map50", "size/onnx_mb", "size/onnx_gzip_mb")
_EQUAL = ("=", "==", "!=")
_YES, _NO = ("true", "yes", "1"), ("false", "no", "0")


def _longer_side(imgsz: object) -> int | None:
    try:
        return max(sides(imgsz_of(imgsz)))
    except ValueError:  # not recorded
        return None


def find_models(text: str, models: Sequence[Published]) -> list[Published]:
    """The models that meet all terms of a search; of an empty one, all models.

    Args:
        text: the search.
        models: to choose from. A model that lacks a number fits no comparison with it.

    Raises:
        ConfigError: a term is malformed, names no key and no metric, or compares a text or a number with
            something else; the message names the term.
    """
    metrics = {name for model in models for name in _metrics(model.metadata)}.union(_USUAL)
    tests = [_test(term, metrics) for term in split_terms(text)]
    return [model for model in models if all(fits(model.metadata) for fits in tests)]


def _metrics(model: Metadata) -> dict[str, float]:
    numbers = model.get("metrics", {}).items()
    return {name: value for name, value in numbers if isinstance(value, int | float)}


def _test(term: str, metrics: set[str]) -> Test:
    comparison = read_comparison(term)
    if comparison is None:
        if re.search("[<>=!]", term):
            raise _wrong(term, f"KEY OP VALUE, OP one of {' '.join(SIGNS)}")
        return _FLAGS.get(term.lower()) or _is_called(term.lower())
    name, sign, value = comparison
    key, number = name.lower(), read_number(value)
    if key in _FLAGS:
        return _compare_flag(term, key, sign, value.lower())
    # Sizes are letters: compared with a number, size is a metric, as it is in compare.
    if key in _TEXTS and not (key == "size" and number is not None):
        return _compare_text(term, key, sign, value.lower())
    if key not in _NUMBERS and not metrics_like(key, metrics):
        raise _wrong(term, f"a key of {', '.join(KEYS)}, or a metric")
    if number is None:
        raise _wrong(term, f"{key} compared with a number")
    if key in _NUMBERS:
        return lambda model: Limit(key, sign, number).keeps(_NUMBERS[key](model))
    limit = Limit(full_name(key, metrics), sign, number)
    return lambda model: limit.keeps(_metrics(model).get(limit.metric))


def _wrong(term: str, should_be: str) -> ConfigError:
    example = "Correct the search, for example 'size=s sparsity>=0.7 quantized'."
    return ConfigError(expected("the term of the search", should_be, term, example))


def _is_called(word: str) -> Test:
    def fits(model: Metadata) -> bool:
        texts = [model.get(key, "") for key in ("size", "dataset", "recipe", "tag")]
        texts += [*re.split("[-_]", str(model.get("tag", ""))), *model.get("classes", ())]
        return any(fnmatchcase(str(text).lower(), word) for text in texts)

    return fits


def _compare_text(term: str, key: str, sign: str, value: str) -> Test:
    if sign in _EQUAL:
        return lambda model: fnmatchcase(str(model.get(key, "")).lower(), value) == (sign != "!=")
    if key == "published":  # dates sort as their texts do
        return lambda model: SIGNS[sign](str(model.get(key, "")).lower(), value)
    raise _wrong(term, f"{key}=VALUE or {key}!=VALUE, {key} being a text")


def _compare_flag(term: str, key: str, sign: str, value: str) -> Test:
    if sign not in _EQUAL or value not in (*_YES, *_NO):
        raise _wrong(term, f"{key}, {key}=true or {key}=false")
    wanted = (value in _YES) == (sign != "!=")
    return lambda model: _FLAGS[key](model) == wanted

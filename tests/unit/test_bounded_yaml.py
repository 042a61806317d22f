"""Texts from elsewhere, YAML and arithmetic: their own errors, within bounds."""

from __future__ import annotations

import math
import re
from contextlib import suppress

import pytest
import torch
import yaml
from bounded import outcome
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_exp.bounded_yaml import read_yaml
from sparse_exp.data.detection import list_dataset
from sparse_exp.errors import ConfigError, DataError, RecipeError
from sparse_exp.recipes.expressions import ExpressionError, evaluate
from sparse_exp.recipes.language import body_of, filled_in, read_body
from sparse_exp.recipes.layer_patterns import _begins, parameters_matching
from sparse_exp.resolve import read_record

LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)
)


@pytest.mark.parametrize("text", [LAUGHS, MERGED], ids=["aliases", "merges"])
def test_laughs_are_refused_wherever_yaml_is_read(text, tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(f"{text}train: *a29\nval: *a29\nnames: *a29\n", encoding="utf-8")
    assert outcome(lambda: read_yaml(text)).startswith("YAMLError: its aliases stand for more than")
    assert "aliases" in outcome(lambda: list_dataset(path))
    assert "aliases" in outcome(lambda: read_record(f"{text}experiment: *a29\n"))
    assert "aliases" in outcome(lambda: read_body(f"{text}modifiers: *a29\n", "r.yaml"))


def test_what_is_shared_within_bounds_is_read():
    assert read_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert read_yaml("") is None


@pytest.mark.parametrize(
    "text", ["a: 2001-99-99", "[" * 20_000, "a: !!python/name:os.system", "{[]: 1}", "a: &a [*a]"]
)
def test_what_cannot_be_read_is_one_kind_of_error(text):
    with pytest.raises(yaml.YAMLError):
        read_yaml(text)


@pytest.mark.parametrize("number", ["1" + ":00" * 500_000, "1" + ":00" * 500_000 + ".5", "1" * 5000])
def test_numbers_have_an_end(number):
    assert outcome(lambda: read_yaml(f"a: {number}"), seconds=20).startswith("YAMLError: a number in it")
    assert read_yaml("a: 1:30\nb: 1:30.5\nc: '" + "1" * 500 + "'")["a"] == 90


def test_lists_behind_variables_are_counted_wherever_they_stand():
    """Ten thousand values that ten thousand modifiers share, in a file of 300 kB."""
    listed, uses = "[" + "a, " * 10_000 + "]", "  - !Pruning {params: eval(x)}\n" * 10_000
    text = f"x: {listed}\nmodifiers:\n{uses}"
    ended = outcome(lambda: filled_in(read_body(text, "r.yaml"), {}, "r.yaml"), seconds=30)
    assert ended.startswith("RecipeError: The variables of r.yaml stand for more than")


EXPRESSIONS = [
    "9**9**9**9",
    "-" * 900 + "1",
    "(" * 400 + "1" + ")" * 400,
    "1" * 999,
    "round(1e300, 300)",
    "10**308*10.0",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_arithmetic_is_bounded(expression):
    ended = outcome(lambda: evaluate(expression, {}), seconds=20)
    assert ended == "returned" or ended.startswith("ExpressionError")


PATTERNS = [
    *("(a+)+b", "((a|ab)*)c", "(x+x+)+y", "(a?){50}a{50}", "(?=(a+)+)b", ".*" * 9 + "!", "(a{1,20}){1,20}b"),
    *("(" * 5000 + ")" * 5000, "a{99999999999}"),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
def test_patterns_of_layers_take_a_moment(pattern):
    model = torch.nn.ModuleDict({"a" * 50: torch.nn.Linear(1, 1)})
    ended = outcome(lambda: parameters_matching([f"re:{pattern}"], model), seconds=20)
    assert ended.startswith("RecipeError")


def test_patterns_that_recipes_have_are_taken():
    names = ["model.2.m.0.cv1.conv", "model.24.m.1"]
    for pattern in (r"model\.\d+\.m\.\d+\.cv\d+\.conv.*", ".*(cv1|cv2).*", "(?:(?!24).)*$", "model.{1,3}m"):
        assert [_begins(pattern, name) for name in names] == [bool(re.match(pattern, name)) for name in names]


def test_comments_before_the_front_matter_take_a_moment():
    comments = "<!---->\n" * 100_000
    assert body_of(f"{comments}---\na: 1\n---\nText") == "a: 1"
    for text in (f"{comments}x", "---" + "\n" * 100_000, "<!--" * 10_000, "---\n" + "\n---x" * 50_000):
        assert outcome(lambda text=text: body_of(text), seconds=20) == "returned"


def try_expressions(examples: int) -> None:
    parts = st.sampled_from(
        [*"0123456789+-*/%(),.e", "**", "//", "round", "max", "min", "abs", "int", "x", " ", "1e99"]
    )

    @settings(max_examples=examples, deadline=None, database=None)
    @given(st.lists(parts, max_size=30).map("".join))
    def attempt(expression: str) -> None:
        try:
            assert math.isfinite(evaluate(expression, {"x": 3}))
        except ExpressionError:
            return

    attempt()


YAML_PARTS = st.sampled_from(
    [
        "a: ",
        "b: ",
        "&x ",
        "*x",
        "- ",
        "\n",
        "  ",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "!Tag ",
        "'",
        "1",
        "null",
        "<<: ",
        "? ",
        "| ",
        "modifiers: ",
        "stage: ",
        "!QuantizationModifier\n",
        "start_epoch: ",
        "eval(x)",
        "names: ",
        "train: ",
        "val: ",
        "path: ",
        "~nosuchuser/",
        "${oc.env:HOME}",
        "\u2028",
        "---\n",
        "# ",
        "1e999",
        "0x",
        "2001-01-01",
        "nc: ",
    ]
)


def try_texts(examples: int, folder) -> None:
    @settings(max_examples=examples, deadline=None, database=None)
    @given(st.lists(YAML_PARTS, max_size=40).map("".join))
    def attempt(text: str) -> None:
        path = folder / "data.yaml"
        path.write_text(text, encoding="utf-8")
        for read in (
            lambda: filled_in(read_body(body_of(text), "r"), {}, "r"),
            lambda: list_dataset(path),
            lambda: read_record(text),
        ):
            with suppress(RecipeError, DataError, ConfigError):
                read()

    attempt()


def test_texts_of_any_kind_are_read_or_refused(tmp_path):
    try_expressions(200)
    try_texts(100, tmp_path)


@pytest.mark.slow
def test_many_texts_of_any_kind_are_read_or_refused(tmp_path):
    try_expressions(20_000)
    try_texts(5_000, tmp_path)

"""Hydra's sweep grammar as a space to search."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hydra_plugins.sparse_exp_search._space import Space, parse_space
from sparse_exp.errors import ConfigError


def space_of(*words: str) -> Space:
    return parse_space(words, None)  # type: ignore[arg-type]  # only glob() asks the loader


@pytest.mark.parametrize(
    ("word", "axis"),
    [
        ("a=x,y", CategoricalDistribution(["x", "y"])),
        ("a=1,2.5,null", CategoricalDistribution(["1", "2.5", "null"])),
        ("a=choice([1,2],[3])", CategoricalDistribution(["[1,2]", "[3]"])),
        ("a=x,y,x", CategoricalDistribution(["x", "y"])),
        ("a=range(1,4)", IntDistribution(1, 3)),  # as in Python, the end is not in it
        ("a=range(1,10,4)", IntDistribution(1, 9, step=4)),
        ("a=range(9,0,-4)", IntDistribution(1, 9, step=4)),
        ("a=range(0.5,1.0,0.25)", FloatDistribution(0.5, 0.75, step=0.25)),
        ("a=int(interval(1,4))", IntDistribution(1, 4)),
        ("a=interval(0.5,0.9)", FloatDistribution(0.5, 0.9)),
        ("a=tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("a=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
    ],
)
def test_grammar(word, axis):
    assert space_of(word).axes == {"a": axis}


def test_the_last_word_of_a_key_counts_and_the_others_stay_as_they_are():
    space = space_of("model=n,s", "x=interval(0,1)", "y='a b'", "model=m", "x=1,2", "+z=3", "~w")
    assert space.axes == {"x": CategoricalDistribution(["1", "2"])}
    assert space.fixed == ["model=m", "y='a b'", "+z=3", "~w"]
    assert space.job_words({"x": "2"}) == ["model=m", "x=2", "y='a b'", "+z=3", "~w"]


def test_numbers_become_words_that_can_be_read():
    space = space_of("a=interval(0.0,1.0)", "b=tag(log,interval(1e-6,1e-2))", "c=int(interval(1,9))")
    words = space.job_words({"a": 0.1 + 0.2, "b": 1.23456789e-5, "c": 7})
    assert words == ["a=0.3", "b=1.23457e-05", "c=7"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["a=1", "b=2"], "A search needs something that varies"),
        (["a=interval(2,1)"], r"got 'a=interval\(2,1\)'"),
        (["a=tag(log,interval(0,1))"], "got 'a=tag"),
        (["a=range(3,3)"], "got 'a=range"),
    ],
)
def test_a_space_without_points_is_refused_in_one_line(words, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        space_of(*words)
    assert "\n" not in str(caught.value)


def test_a_finite_space_gives_each_of_its_points_once():
    space = space_of("a=x,y", "b=range(0,3)", "c=range(0.1,0.35,0.1)")
    assert space.size == 2 * 3 * 3
    seen: set[tuple[str, ...]] = set()
    while len(seen) < space.size:
        seen.add(space.key_of(space.another(seen, random.Random(len(seen)))))
    assert seen == set(itertools.product("xy", "012", ("0.1", "0.2", "0.3")))
    assert space_of("a=interval(0.0,1.0)", "b=x,y").size == math.inf


def test_corners_have_every_choice_and_both_ends():
    space = space_of("a=x,y,z", "b=interval(0.5,0.9)", "c=range(2,3)", "d=1")
    assert list(space.corners()) == [
        ["a=x", "b=0.5", "c=2", "d=1"],
        ["a=y", "b=0.5", "c=2", "d=1"],
        ["a=z", "b=0.5", "c=2", "d=1"],
        ["a=x", "b=0.9", "c=2", "d=1"],
    ]

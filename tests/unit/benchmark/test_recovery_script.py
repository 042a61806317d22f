"""benchmarks/recovery.py: what its command line means."""

import sys

import pytest
from scripts import load_script

from sparse_exp.errors import ConfigError


@pytest.fixture
def options_of(monkeypatch):
    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["recovery.py", *words])
        return load_script("recovery")._options()

    return parse


@pytest.mark.parametrize(
    "words",
    [
        ("--jobs=2", "--recipes", "transfer_quant", "dense", "tracker=none", "+a.b=1"),
        ("tracker=none", "--recipes", "transfer_quant", "dense", "+a.b=1", "--jobs", "2"),
    ],
)
def test_words_with_an_equals_sign_are_overrides_wherever_they_stand(options_of, words):
    options, overrides = options_of(*words)
    assert (options.recipes, options.jobs) == (["transfer_quant", "dense"], 2)
    assert overrides == ["tracker=none", "+a.b=1"]


def test_a_word_that_is_neither_an_option_nor_an_override_is_refused(options_of):
    with pytest.raises(ConfigError, match="nonsense"):
        options_of("nonsense", "--jobs", "2")

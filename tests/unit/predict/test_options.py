"""What both commands refuse, and alike."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from sparse_exp.errors import ConfigError


def refusal(command: str, *words: str) -> str:
    """What a command says that refuses its words."""
    main = import_module(f"sparse_exp.{command}.__main__").main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, *words])
        with pytest.raises(ConfigError) as caught:
            main()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--conf", "25"], "--conf: expected a number between 0 and 1, but got '25'"),
        (["--conf", "much"], "--conf: expected a number between 0 and 1, but got 'much'"),
        (["--iou", "nan"], "--iou: expected a number between 0 and 1"),
        (["--batch", "0"], "--batch: expected a whole number of at least 1, but got '0'"),
        (["--streams", "1.5"], "--streams: expected a whole number of at least 1"),
        (["--max-det", "-3"], "--max-det: expected a whole number of at least 1"),
        (["--cores", "0"], "--cores: expected a whole number of at least 1"),
        (["--cores", "4096"], "of this host"),
        (["--bogus"], "Unrecognized arguments: --bogus. See --help."),
    ],
)
def test_both_commands_refuse_alike(words, said):
    messages = {refusal("predict", "MODEL", "photo.jpg", *words), refusal("serve", "MODEL", *words)}
    assert len(messages) == 1
    assert said in messages.pop()

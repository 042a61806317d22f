"""Commands in messages: what is typed after a shell and Hydra have read them is what was meant."""

import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as some

from sparse_exp.hints import command_line, override, resume_command

TEXTS = [
    "", " ", "a b", "a=b", "a,b", "null", "True", "inf", "1", "007", "1e3", "0x1", "1_000", "2026-11-22",
    "-", "~a", "+a", "[a]", "{a: b}", "(a)", "a:b", "a'b", 'a"b', 'a\\"b', "a\\", "\\\\", "$HOME", "$(a)",
    "a;b", "#a", "*", "ä", "a\tb", "/x y/runs=1, 2/it's", "12/5", "null/x",
    "outputs/runs/2026-11-22/17-35-11-yolov5s-trees-transfer_quant",
]  # fmt: skip
# As Hydra's grammar has it "${...}" is no text, but refers to another value.
texts = some.text("ab1./\\\"' =,:[]{}()+-_~@%|?", max_size=8)
values = some.recursive(
    texts | some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False),
    lambda inner: some.lists(inner, max_size=3),
)


def read(word: str):
    (parsed,) = OverridesParser.create().parse_overrides([word])
    assert parsed.key_or_group == "some.key"
    return parsed.value()


@pytest.mark.parametrize("text", TEXTS)
def test_hydra_reads_any_text_as_it_is(text):
    assert read(override("some.key", text)) == text


@given(values)
@settings(deadline=None, max_examples=300)
def test_hydra_reads_any_value_as_it_is(value):
    assert read(override("some.key", value)) == value


def test_mappings_are_read_too():
    value = {"uri": "index:a==1!b c/d.pt", "sha256": None, "n": [1, True]}
    assert read(override("some.key", value)) == value


def test_what_is_plain_is_not_quoted():
    assert resume_command(Path("outputs/runs/1/2-a.b"), override("stages", ["evaluate", "export"])) == (
        "python -m sparse_exp resume=outputs/runs/1/2-a.b 'stages=[evaluate,export]'"
    )
    assert override("trainer.patience", None) == "trainer.patience=null"
    assert override("tracker.system_metrics", False) == "tracker.system_metrics=false"


@pytest.mark.parametrize("text", TEXTS)
def test_a_shell_reads_it_as_it_is(text):
    line = command_line(override("some.key", text), module="a.b").replace("python", "printf '%s\\0'", 1)
    typed = subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout.decode().split("\0")
    assert typed[:2] == ["-m", "a.b"]
    assert read(typed[2]) == text

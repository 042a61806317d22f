import pytest
from rich.console import Group

from sparse_exp.text import console_table, markdown_table, plain_text

TITLES = ("engine", "items/s", "note")
ROWS = [("deepsparse", "12.5", "a | b"), ("torch", "-", "two\nlines")]


def test_a_markdown_table_aligns_numbers_to_the_right_and_keeps_its_columns():
    assert markdown_table(TITLES, ROWS).splitlines() == [
        "| engine | items/s | note |",
        "| --- | ---: | --- |",
        r"| deepsparse | 12.5 | a \| b |",
        "| torch | - | two lines |",
    ]
    assert markdown_table(TITLES, []) == ""


@pytest.mark.parametrize(("right", "marks"), [((), "| --- | --- | --- |"), ((0, 2), "| ---: | --- | ---: |")])
def test_columns_of_a_markdown_table_that_are_named_are_aligned_to_the_right(right, marks):
    assert markdown_table(TITLES, ROWS, right=right).splitlines()[1] == marks


def test_a_table_for_the_console_shows_brackets_and_folds_long_cells():
    table = console_table(("[b]key[/b]", "value"), [("model[.]24", "9"), ("x" * 60, "10")], right=[1])
    lines = plain_text(table, width=40).splitlines()
    assert max(map(len, lines)) <= 40
    assert any(line.split() == ["[b]key[/b]", "value"] for line in lines)
    assert next(line for line in lines if "model[.]24" in line).endswith(" 9")
    assert "".join(lines).count("x") == 60


def test_plain_text_is_what_is_printed_without_colours_or_blanks_at_the_end():
    table = console_table(("a", "b"), [("1", "")], styles=["bold red"])
    text = plain_text("first line", Group("second", table), width=40)
    assert text.splitlines()[:2] == ["first line", "second"]
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())

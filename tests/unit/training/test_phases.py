from __future__ import annotations

from itertools import pairwise

import pytest

from sparse_exp.errors import RecipeError
from sparse_exp.recipes.recipe import Phase
from sparse_exp.training.phases import check_phases, evaluated_epochs, evaluated_spans, first_step, is_pruning


def phase(start: float, end: float, name: str = "pruned") -> Phase:
    return Phase(name, start, end, quantized="quant" in name)


@pytest.mark.parametrize(
    ("start", "end", "steps", "marks"),
    [
        (0.0, 2.0, 4, [0, 4, 8]),
        (0.0, 1.5, 4, [0, 4, 6]),
        (1.5, 3.0, 4, [6, 8, 12]),
        (1.25, 1.5, 4, [5, 6]),
        (0.0, 2.0, 1, [0, 1, 2]),
        (0.3, 2.2, 7, [3, 7, 14, 16]),  # 0.3 x 7 = 2.1, 2.2 x 7 = 15.4
    ],
)
def test_a_phase_is_evaluated_at_each_epoch_and_at_its_end(start, end, steps, marks):
    spans = evaluated_spans(phase(start, end), steps)
    assert [(span.start, span.stop) for span in spans] == list(pairwise(marks))


@pytest.mark.parametrize(
    ("start", "end", "every", "marks"),
    [(0, 6, 2, [0, 4, 8, 12]), (0, 5, 3, [0, 6, 10]), (0.5, 4.5, 2, [1, 4, 8, 9]), (3, 5, 10, [6, 10])],
)
def test_some_epochs_are_not_evaluated(start, end, every, marks):
    spans = evaluated_spans(phase(start, end), 2, every)
    assert [(span.start, span.stop) for span in spans] == list(pairwise(marks))
    assert len(spans) == len(evaluated_epochs(phase(start, end), every))


def test_a_phase_without_a_step_is_refused():
    check_phases([phase(0.0, 0.25), phase(0.25, 1.0)], 4)
    with pytest.raises(
        RecipeError, match=r"phase pruned_quant to be at least one step, but got '0\.1 epochs"
    ):
        check_phases([phase(0.0, 0.9), phase(0.9, 1.0, "pruned_quant")], 4)


@pytest.mark.parametrize(
    ("name", "pruning"),
    [("dense", False), ("pruning", True), ("pruned", False), ("pruning_quant", True), ("dense_quant", False)],
)
def test_zeros_are_still_made_in_phases_called_pruning(name, pruning):
    assert is_pruning(phase(0, 1, name)) is pruning


@pytest.mark.parametrize(
    ("epoch", "steps", "wanted"), [(4 / 3, 4, 6), (6.25, 13, 82), (2.0, 7, 14), (0.1 * 3, 10, 3)]
)
def test_a_phase_is_entered_when_its_modifiers_have_begun(epoch, steps, wanted):
    """By hand: 4/3 of 4 is 5.33; 6.25 times 13 is 81.25; 0.1 * 3 is a little more than 0.3."""
    assert first_step(epoch, steps) == wanted

from __future__ import annotations

from itertools import pairwise

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_exp.errors import RecipeError
from sparse_exp.recipes.language import body_of, check_variables, modifiers_of, read_body
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.recipes.schedule import rescaled, staged, stages_of, time_map, without

lengths = st.lists(st.floats(0.1, 50.0), min_size=1, max_size=5)
totals = st.floats(0.2, 200.0)


def boundaries_of(parts: list[float]) -> list[float]:
    boundaries = [0.0]
    for part in parts:
        boundaries.append(boundaries[-1] + part)
    return boundaries


@settings(max_examples=60, deadline=None)
@given(lengths, totals)
def test_a_map_rises_strictly_and_its_ends_meet(parts, total):
    boundaries = boundaries_of(parts)
    time = time_map(boundaries, total)
    assert time(0.0) == 0.0
    assert time(boundaries[-1]) == total
    probes = sorted({*boundaries, *(part * boundaries[-1] / 20 for part in range(21))})
    mapped = [time(probe) for probe in probes]
    assert all(
        a < b or y - x < 1e-9 for a, b, x, y in zip(mapped, mapped[1:], probes, probes[1:], strict=False)
    )


@settings(max_examples=60, deadline=None)
@given(lengths, totals)
def test_each_phase_keeps_an_epoch_where_there_are_enough_and_else_an_equal_share(parts, total):
    boundaries = boundaries_of(parts)
    time = time_map(boundaries, total)
    if total == boundaries[-1]:
        return
    new = [time(end) - time(start) for start, end in pairwise(boundaries)]
    assert min(new) >= min(1.0, total / len(parts)) - 1e-9
    free = [(n, old) for n, old in zip(new, parts, strict=True) if n > 1 + 1e-9]
    if total > len(parts):  # phases that are not held up keep their proportions
        assert all(n / old == pytest.approx(free[0][0] / free[0][1], rel=1e-6) for n, old in free)


@settings(max_examples=30, deadline=None)
@given(lengths, st.floats(0.0, 1.0))
def test_the_same_length_changes_nothing(parts, share):
    boundaries = boundaries_of(parts)
    time = time_map(boundaries, boundaries[-1])
    assert time(share * boundaries[-1]) == pytest.approx(share * boundaries[-1], rel=1e-12)


def test_the_published_schedule_in_two_epochs():
    time = time_map([0.0, 50.0, 55.0], 2.0)
    assert [time(epoch) for epoch in (0, 25, 50, 51, 52, 55)] == pytest.approx([0, 0.5, 1, 1.2, 1.4, 2])
    assert time(-1.0) == -1.0


@pytest.mark.parametrize(
    ("boundaries", "total", "new"),
    [
        ([0, 10, 11, 12], 6, [0, 4, 5, 6]),  # a half becomes one, twice; the first phase pays
        ([0, 10, 11, 12], 3, [0, 1, 2, 3]),
        ([0, 10, 11, 12], 1.5, [0, 0.5, 1, 1.5]),
        ([0, 10, 11, 12], 24, [0, 20, 22, 24]),
        ([0, 50, 52.5, 100], 10, [0, 9 * 50 / 97.5, 9 * 50 / 97.5 + 1, 10]),
        ([0, 7], 0.25, [0, 0.25]),
    ],
)
def test_phases_by_hand(boundaries, total, new):
    assert [time_map(boundaries, total)(epoch) for epoch in boundaries] == pytest.approx(new)


MANY = """modifiers:
    - !EpochRangeModifier
        start_epoch: 0.0
        end_epoch: 100.0
    - !GMPruningModifier
        start_epoch: 10.0
        end_epoch: 50.0
        update_frequency: 2.0
        init_sparsity: 0.05
        final_sparsity: {0.6: ['re:model.2.*'], 0.8: [model.4.cv1.conv.weight]}
        params: []
    - !ConstantPruningModifier
        start_epoch: -1.0
        end_epoch: -1.0
        update_frequency: -1
        params: __ALL__
    - !QuantizationModifier
        start_epoch: 75
        end_epoch: -1.0
        freeze_bn_stats_epoch: 80
        disable_quantization_observer_epoch: null
        num_calibration_steps: 5
    - !LearningRateModifier
        start_epoch: 0.0
        end_epoch: 100.0
        lr_class: MultiStepLR
        lr_kwargs: {milestones: [20, 75], gamma: 0.1}
        init_lr: 0.1
    - !LearningRateModifier
        start_epoch: 0.0
        end_epoch: 100.0
        lr_class: ExponentialLR
        lr_kwargs: {gamma: 0.9}
        init_lr: 0.1
"""


def test_every_epoch_number_is_mapped_and_nothing_else():
    time = time_map([0.0, 10.0, 50.0, 75.0, 100.0], 20.0)  # one fifth everywhere
    old, new = (list(modifiers_of(read_body(text, "r"))) for text in (MANY, rescaled(MANY, time)))
    assert [m.kind for m in new] == [m.kind for m in old]
    length, pruning, constant, quantization, steps, decay = new
    assert length == {"start_epoch": 0.0, "end_epoch": 20.0}
    assert pruning == {
        **old[1],
        "start_epoch": 2.0,
        "end_epoch": 10.0,
        "update_frequency": pytest.approx(0.4),
    }
    assert constant == old[2]
    assert quantization == {**old[3], "start_epoch": 15.0, "freeze_bn_stats_epoch": pytest.approx(16.0)}
    assert steps["lr_kwargs"] == {"milestones": [4.0, 15.0], "gamma": 0.1}
    assert decay["lr_kwargs"]["gamma"] == pytest.approx(0.9**5)  # as far down at the end
    assert decay["init_lr"] == 0.1


def test_a_span_grows_as_its_own_modifier_does():
    time = time_map([0.0, 50.0, 55.0], 7.0)  # the second phase keeps 1 of 5, the first 6 of 50
    text = MANY.replace("start_epoch: 10.0", "start_epoch: 50.0").replace(
        "end_epoch: 50.0", "end_epoch: 55.0"
    )
    pruning = next(m for m in modifiers_of(read_body(rescaled(text, time), "r")) if "GM" in m.kind)
    assert (pruning["start_epoch"], pruning["end_epoch"]) == (6.0, 7.0)
    assert pruning["update_frequency"] == pytest.approx(2.0 / 5)


STAGED = """stage_0:
  lr: 0.1
  a_modifiers:
    - !A
      x: 1
stage_1:
  b_modifiers:
    - !B
      y: 2
"""


def test_front_matter_is_found_behind_marks_and_windows_newlines():
    assert body_of("\ufeff---\r\na: 1\r\n---\r\n# Words\r\n").strip() == "a: 1"
    assert body_of("a: 1\n# --- no front matter ---\n") == "a: 1\n# --- no front matter ---\n"


def test_variables_of_stages_are_variables_too():
    check_variables(read_body(STAGED, "r"), ["lr"], "r")
    with pytest.raises(RecipeError, match="no variable 'x'"):
        check_variables(read_body(STAGED, "r"), ["x"], "r")


def test_stages_are_named_and_renamed_without_losing_any():
    assert stages_of(STAGED) == ["stage_0", "stage_1"]
    assert stages_of(MANY) == []
    both = staged(STAGED, STAGED)
    names = stages_of(both)
    assert names[:2] == ["stage_0", "stage_1"]
    assert len(set(names)) == 4
    assert [m.kind for m in modifiers_of(read_body(both, "r"))] == ["A", "B", "A", "B"]


def test_what_comes_second_begins_where_the_first_ends_and_its_own_moments_move_too():
    both = list(modifiers_of(read_body(staged(MANY, MANY), "r")))
    first, second = both[: len(both) // 2], both[len(both) // 2 :]
    assert [(m["start_epoch"], m["end_epoch"]) for m in first[:3]] == [(0, 100), (10, 50), (-1, 100)]
    assert [(m["start_epoch"], m["end_epoch"]) for m in second[:3]] == [(100, 200), (110, 150), (100, -1)]
    assert (first[3]["start_epoch"], first[3]["end_epoch"]) == (75, -1)  # quantization has no end
    assert (second[3]["start_epoch"], second[3]["freeze_bn_stats_epoch"]) == (175, 180)
    assert second[3]["disable_quantization_observer_epoch"] is None
    assert second[4]["lr_kwargs"] == {"milestones": [120, 175], "gamma": 0.1}


def test_a_kind_is_taken_out_and_with_it_the_stage_that_held_nothing_else():
    left = without(STAGED, "B")
    assert stages_of(left) == ["stage_0"]
    assert [m.kind for m in modifiers_of(read_body(left, "r"))] == ["A"]
    assert without(without(STAGED, "B"), "A") == ""
    assert read_body(without(MANY, "Absent"), "r") == read_body(MANY, "r")


@pytest.mark.parametrize("text", ["[", "modifiers", "- a", "a: 1"])
def test_what_is_no_recipe_is_refused(text):
    with pytest.raises(RecipeError, match="mine") as error:
        read_body(text, "mine")
    assert "\n" not in str(error.value)


def test_rescaled_text_is_yaml_that_pyyaml_reads_with_the_tags_kept():
    assert "!GMPruningModifier" in rescaled(MANY, time_map([0.0, 100.0], 10.0))
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.safe_load(rescaled(MANY, time_map([0.0, 100.0], 10.0)))


PUBLISHED = """num_epochs: &num_epochs 52
init_lr: &rate 0.0032 # of SGD

training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: *num_epochs

  - !SetLearningRateModifier
    start_epoch: 0.0
    learning_rate: *rate
"""


@pytest.mark.parametrize("prefix", ["", "<!--\nlicence\n-->\n\n", "\ufeff<!-- a --> <!-- b -->\r\n"])
def test_a_licence_may_stand_before_the_front_matter(prefix):
    assert body_of(f"{prefix}---\n{PUBLISHED}\n---\n\n# Title\n").strip() == PUBLISHED.strip()


def test_variables_behind_anchors_reach_their_aliases():
    recipe = Recipe(PUBLISHED, {"num_epochs": 3.0, "init_lr": 0.5})
    assert recipe.epochs == 3.0
    assert recipe.learning_rates(recipe.phases()[0]) == [(0.5, 0.5)]
    assert Recipe(PUBLISHED).epochs == 52.0

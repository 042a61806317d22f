"""The native engine against SparseML 1.8, as it was recorded by ``benchmarks/recipe_parity.py``."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scripts import load_script

from sparse_exp.errors import MissingDependency
from sparse_exp.recipes.recipe import Recipe

ROOT = Path(__file__).parents[3]


script = load_script("recipe_parity")
RECORDED = script.read(ROOT / "tests" / "data" / "recipe-parity.npz")
GROUPS: dict[str, list[str]] = {}
for index, name in enumerate(RECORDED):
    GROUPS.setdefault(f"generated {index // 25}" if name.startswith("generated/") else name, []).append(name)


def test_all_shipped_recipes_and_two_hundred_others_were_recorded_and_are_those_that_there_are():
    assert len([name for name in RECORDED if name.startswith("generated/")]) == 200
    recorded = {name: case for name, (case, _) in RECORDED.items()}
    assert script.shipped().items() <= recorded.items()
    seeds = [int(name.split("/")[1]) for name in RECORDED if name.startswith("generated/")]
    assert all(script.generated(seed) == recorded[f"generated/{seed}"] for seed in seeds[::20])


FEW = {"generated 0", "generated 1"}  # the other generated ones take most of a minute


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(
            group, marks=pytest.mark.slow if group.startswith("generated") and group not in FEW else ()
        )
        for group in GROUPS
    ],
)
def test_masks_rates_flags_phases_and_sparsities_are_those_of_sparseml_after_every_step(group):
    for name in GROUPS[group]:
        case, outcome = RECORDED[name]
        assert script.native(case).differs_from(outcome) == "", name


def test_another_mask_rate_or_phase_is_seen():
    _, outcome = RECORDED["generated/0"]
    assert outcome.differs_from(outcome) == ""
    assert script.native(RECORDED["generated/1"][0]).differs_from(outcome)


def test_sparseml_as_an_engine_runs_where_it_is_installed_and_says_how_where_not():
    case, outcome = RECORDED["generated/0"]
    if importlib.util.find_spec("sparseml"):
        assert script.sparseml(case).differs_from(outcome) == ""
        return
    model = torch.nn.Linear(2, 2)
    text = "modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: 1.0\n"
    recipe, optimizer = Recipe(text, engine="sparseml"), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MissingDependency, match=r"pip install 'sparse-exp\[neuralmagic\]'") as error:
        recipe.attach(model, optimizer, 2)
    assert "\n" not in str(error.value)


STRETCHED = """modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 100.0
  - !LearningRateModifier
    start_epoch: 0.0
    end_epoch: 100.0
    init_lr: 0.1
    lr_class: {}
    lr_kwargs: {}
"""


@pytest.mark.parametrize(
    ("schedule", "options", "last"),
    [
        ("ExponentialLR", "{gamma: 0.97}", 0.1 * 0.97**100),
        ("StepLR", "{gamma: 0.5, step_size: 10}", 0.1 * 0.5**10),
        ("MultiStepLR", "{gamma: 0.1, milestones: [30, 60, 90]}", 1e-4),
    ],
)
@pytest.mark.parametrize("length", [1, 3, 300])
def test_a_stretched_schedule_has_no_step_of_no_length_and_ends_where_it_did(schedule, options, last, length):
    recipe = Recipe(STRETCHED.format(schedule, options), num_epochs=length)
    model, steps = torch.nn.Linear(2, 2), 4
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    sparsifier, rates = recipe.attach(model, optimizer, steps), []
    for step in range(length * steps):
        sparsifier.before_step(step / steps)
        rates.append(optimizer.param_groups[0]["lr"])
        sparsifier.step(step / steps)
    assert all(0 < later <= earlier for earlier, later in pairwise(rates))
    slowest = {"ExponentialLR": 0.97 ** (100 / length), "StepLR": 0.5 ** max(1, 10 / length / steps)}
    rounded = 0.25 if schedule == "StepLR" else 0.999  # 1.2 steps become 1, as in SparseML
    assert last * rounded <= rates[-1] <= last / min(slowest.get(schedule, 0.1), 0.97) * 1.001


def test_restarts_of_a_length_that_is_no_whole_number_come_where_they_should():
    text = STRETCHED.format("CosineAnnealingWarmRestarts", "{lr_min: 0.0, cycle_epochs: 50}")
    recipe, model = Recipe(text, num_epochs=3), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    sparsifier, rates = recipe.attach(model, optimizer, 4), []
    for step in range(12):
        sparsifier.before_step(step / 4)
        rates.append(optimizer.param_groups[0]["lr"])
        sparsifier.step(step / 4)
    assert rates[0] == rates[6] == 0.1
    assert rates[3] == pytest.approx(0.05)
    assert rates[1:6] == pytest.approx(rates[7:])

"""``recipe.file``: another recipe under the chosen option, and whose variables count then."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparse_exp import cli, experiment

OWN = """---
num_epochs: 3.0
init_lr: 0.01
training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: eval(num_epochs)
  - !SetLearningRateModifier
    start_epoch: 0.0
    learning_rate: eval(init_lr)
---

# Mine
"""


@pytest.fixture
def own(tmp_path) -> Path:
    path = tmp_path / "own.md"
    path.write_text(OWN)
    return path


@pytest.fixture
def variables(tmp_path, monkeypatch):
    """What of a command line reaches the experiment: the variables of its recipe, and what was logged."""
    seen: list[dict[str, float]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(experiment, "run", lambda e, *_, **__: seen.append(e.recipe.variables))

    def of(*words: str) -> dict[str, float]:
        monkeypatch.setattr(sys, "argv", ["sparse-exp", *words])
        cli.main()
        return seen.pop()

    return of


def test_the_options_variables_do_not_leak_into_another_file(variables, own, capsys):
    ours = variables()
    assert {"init_lr", "quantization_init_lr"} <= set(ours)
    assert capsys.readouterr().err == ""
    assert variables(f"recipe.file={own}") == {}
    said = capsys.readouterr().err  # never silently
    assert "is not the file of recipe=transfer_quant" in said
    assert all(name in said for name in ours)
    assert variables("recipe=custom", f"recipe.file={own}") == {}
    assert variables("recipe=prune", f"recipe.file={own}") == {}  # also those that follow the model


@pytest.mark.parametrize(
    "words",
    [
        ["recipe.variables.num_epochs=12"],  # the very value of the option: still the user's word
        ["++recipe.variables.num_epochs=12"],
        ["recipe.variables={num_epochs:12}"],
    ],
)
def test_what_the_command_line_sets_stays(variables, own, words):
    assert variables(f"recipe.file={own}", *words) == {"num_epochs": 12.0}
    assert variables("recipe=custom", f"recipe.file={own}", *words) == {"num_epochs": 12.0}


def test_a_variable_that_only_the_other_file_has_needs_no_plus(variables, own):
    assert variables(f"recipe.file={own}", "recipe.variables.mine=2") == {"mine": 2.0}


def test_the_options_own_file_keeps_its_variables(variables):
    assert variables("recipe.file=transfer_quant.md") == variables()


def test_a_preset_may_bring_its_own_recipe(variables, own, tmp_path):
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    body = f"recipe:\n  file: {own}\n  variables:\n    num_epochs: 5\n"
    (folder / "own.yaml").write_text(f"# @package _global_\n{body}")
    words = ["--config-dir", str(tmp_path / "mine"), "experiment=own"]
    assert variables(*words) == {"num_epochs": 5.0}
    body = "defaults:\n  - override /recipe: custom\n" + body.replace("num_epochs: 5", "num_epochs: 12")
    (folder / "own.yaml").write_text(f"# @package _global_\n{body}")
    assert variables(*words) == {"num_epochs": 12.0}  # with the option custom whatever the value


def test_unknown_variables_are_refused_by_name(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    words = [f"recipe.file={own}", "recipe.variables.final_lr=1", "dry_run=true", "dataset=digits"]
    monkeypatch.setattr(sys, "argv", ["sparse-exp", *words, "model.weights=scratch"])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    problem = "The recipe own.md has no variable 'final_lr'. Its variables: num_epochs, init_lr."
    assert str(raised.value) == f"Error: {problem}"


@pytest.mark.parametrize("text", ["\ufeff" + OWN, OWN.replace("\n", "\r\n"), OWN.split("---")[1]])
def test_byte_order_mark_windows_newlines_and_plain_yaml(tmp_path, text):
    from sparse_exp.recipes.recipe import Recipe

    path = tmp_path / "own.yaml"
    path.write_bytes(text.encode("utf-8"))
    recipe = Recipe.from_file(path, {"init_lr": 0.02})
    assert recipe.epochs == 3.0
    assert recipe.learning_rates(recipe.phases()[0]) == [(0.02, 0.02)]

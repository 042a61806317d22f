"""What the data chose for a run: recorded once, kept by later starts, the same as if it had been given."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sparse_exp.config.schema import RecipeConfig, TrainerConfig
from sparse_exp.planning import rules
from sparse_exp.runs.directory import CONFIG
from sparse_exp.stages.registry import STAGES

OPEN = {
    "trainer": TrainerConfig(batch_size="auto"),
    "recipe": RecipeConfig(name="transfer", file="transfer.md"),
}
GIVEN = {
    "trainer": TrainerConfig(batch_size=4),
    "recipe": RecipeConfig(name="transfer", file="transfer.md", variables={"num_epochs": 12.0}),
}
ALL = ["fetch", "plan", "train", "evaluate"]


@pytest.fixture
def seen(done, monkeypatch) -> list[tuple]:
    """The batch and the length that the train stage is given."""
    found: list[tuple] = []
    stage = STAGES["train"]

    def run(context):
        found.append((context.experiment.trainer.batch_size, context.recipe.epochs))
        return stage.run(context)

    monkeypatch.setitem(STAGES, "train", replace(stage, run=run))
    return found


def test_what_the_data_chose_reaches_the_stages_and_is_recorded(done, go, seen):
    manifest = go(**OPEN)
    assert seen == [(4, 12.0)]
    assert (manifest["settled"]["batch_size"], manifest["settled"]["num_epochs"]) == (4, 12.0)
    assert set(manifest["settled"]["why"]) == {"batch", "length"}
    recorded = yaml.safe_load(Path("run", CONFIG).read_text())
    assert recorded["trainer"]["batch_size"] == "auto"  # what was asked for
    assert "end_epoch: 12.0" in Path("run", "recipe.md").read_text()


def test_later_starts_keep_it_whatever_the_rules_say_then(done, go, seen, monkeypatch, start):
    go(**OPEN)
    assert done() == ALL
    monkeypatch.setattr(rules, "batch_for", lambda *_: 16)
    monkeypatch.setattr(rules, "epochs_for", lambda *_: 3.0)
    manifest = go(**OPEN)
    assert done() == []
    assert manifest["settled"]["batch_size"] == 4
    go(**{**OPEN, "seed": 1})  # planned and trained once more
    assert seen == [(4, 12.0)] * 2


def test_a_run_that_says_the_same_numbers_is_the_same(done, go, seen):
    chosen = go(**OPEN)["stages"]
    done()
    given = go(**GIVEN)["stages"]
    assert done() == []
    assert chosen == given
    go(run="another", **GIVEN)
    assert done() == ALL
    assert seen == [(4, 12.0)] * 2


def test_what_is_given_later_holds(done, go, seen):
    go(**OPEN)
    done()
    go(**{**OPEN, "trainer": TrainerConfig(batch_size=2)})
    assert done() == ALL[1:]
    assert seen[-1] == (2, 12.0)


def test_what_is_left_open_later_is_chosen_then(done, go, seen):
    go(**{**OPEN, "trainer": TrainerConfig(batch_size=2)})
    manifest = go(**OPEN)
    assert seen == [(2, 12.0), (4, 12.0)]
    assert (manifest["settled"]["batch_size"], manifest["settled"]["num_epochs"]) == (4, 12.0)


@pytest.mark.parametrize("words", [OPEN, GIVEN], ids=["open", "given"])
def test_a_finished_run_is_gone_on_with_where_its_data_are_gone(done, go, data, words):
    go(**words)
    done()
    shutil.rmtree(data.parent)
    go(**words)
    assert done() == []


def test_no_data_are_read_for_a_run_that_trains_nothing(done, go, seen):
    words = {**OPEN, "stages": ["fetch", "evaluate"], "checkpoint": "start.pt"}
    assert "settled" not in go(**words)
    assert seen == []

"""The train and evaluate stages of a run that transfers a pruned checkpoint, and quantizes it."""

from __future__ import annotations

import csv
import logging

import pytest

from sparse_exp.config.schema import DatasetConfig, Experiment, ModelConfig, RecipeConfig, TrainerConfig
from sparse_exp.errors import ConfigError, SparsityError
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.runs.directory import Run, StageRecord
from sparse_exp.runs.replay import told_of_stage
from sparse_exp.stages.base import Context
from sparse_exp.stages.registry import STAGES
from sparse_exp.stages.training import run_training
from sparse_exp.tracking import Artifact, as_plain
from sparse_exp.yolov5 import read_checkpoint

EPOCHS = "training_modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: 1.0\n"
HOLD = """pruning_modifiers:
  - !ConstantPruningModifier
    start_epoch: 0.0
    params: __ALL_PRUNABLE__
"""
QUANTIZE = """quantization_modifiers:
  - !QuantizationModifier
    start_epoch: 0.5
    scheme:
      input_activations: {num_bits: 8, symmetric: False}
      weights: {num_bits: 8, symmetric: True}
    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]
"""
DISTIL = """distillation_modifiers:
  - !DistillationModifier
    start_epoch: 0.0
"""


class Notebook:
    """A tracker that remembers."""

    run_id = None

    def __init__(self) -> None:
        self.events: list[object] = []

    def log(self, event: object, at: float | None = None) -> None:
        self.events.append(event)


@pytest.fixture(scope="module")
def start(train_tiny):
    """A pruned checkpoint (75 %) with its recipe."""
    return train_tiny(EPOCHS.replace("1.0", "0.25") + HOLD).best["pruned"]


def make_context(digits, folder, start, text: str, **options) -> Context:
    experiment = Experiment(
        name="t",
        stages=["train", "evaluate"],
        model=ModelConfig(name="yolov5n", size="n", weights=str(start)),
        dataset=DatasetConfig(name="digits", imgsz=64),
        recipe=RecipeConfig(name="r", file="r.md"),
        trainer=TrainerConfig(batch_size=4),
        **options,
    )
    run = Run.create(folder, overwrite=False)
    context = Context(experiment, run, Notebook(), Recipe(text, name="r.md"))
    context.dataset = digits
    context.cache = folder
    return context


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory, start) -> Context:
    context = make_context(digits, tmp_path_factory.mktemp("run") / "run", start, EPOCHS + HOLD + QUANTIZE)
    outcome = STAGES["train"].run(context)
    files = context.run.digests(outcome.files)
    events = [as_plain(event, context.run.path) for event in outcome.events]
    context.run.record("train", StageRecord("x", files, facts=outcome.facts, events=events))
    for event, _ in told_of_stage(context.run, "train", epochs=False):
        context.tracker.log(event)
    return context


def rows_of(context: Context) -> list[dict[str, str]]:
    with (context.run.path / "sparsity.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_checkpoint_that_goes_on_is_named(trained):
    facts = trained.facts("train")
    assert (facts["checkpoint"], facts["phase"], facts["epoch"]) == (
        "weights/best_pruned_quant.pt",
        "pruned_quant",
        1.0,
    )
    assert trained.checkpoint == trained.run.path / "weights/best_pruned_quant.pt"
    names = ("last", "best_pruned", "best_pruned_quant")
    outputs = {"history.json", "sparsity.csv", "recipe.md", *(f"weights/{name}.pt" for name in names)}
    assert set(trained.run.records["train"].outputs) == outputs


def test_zeros_per_layer_are_written_and_tracked(trained, start):
    rows = {row["layer"]: row for row in rows_of(trained)}
    assert len(rows) == 60
    state = read_checkpoint(start).state_dict
    for name, row in rows.items():
        zeros = int((state[f"{name}.weight"] == 0).sum())
        weights = state[f"{name}.weight"].numel()
        assert int(row["weights"]) == weights
        pruned = name != "model.0.conv" and not name.startswith("model.24.")
        assert int(row["zeros"]) == (zeros if pruned else 0)
        assert float(row["promised"]) == pytest.approx(zeros / weights if pruned else 0.0, abs=1e-6)
        assert float(row["sparsity"]) == pytest.approx(float(row["promised"]), abs=1e-6)
    assert Artifact(trained.run.path / "sparsity.csv") in trained.tracker.events


def test_the_recipe_of_the_start_comes_first_in_checkpoint_and_run(trained):
    kept = read_checkpoint(trained.checkpoint).recipe
    assert kept == trained.facts("train")["recipe"]
    assert kept.count("ConstantPruningModifier") == 2
    assert kept.count("QuantizationModifier") == 1
    written = trained.run.path / "recipe.md"
    assert written.read_text() == f"---\n{kept.strip()}\n---\n"
    assert Artifact(written) in trained.tracker.events
    trained.run.write_recipe(trained.run.composed_recipe)  # as on resume
    assert written.read_text() == f"---\n{kept.strip()}\n---\n"


def test_the_evaluated_file_is_held_to_the_promise_of_each_layer(trained):
    facts = trained.facts("train")
    promised = facts["promised"]
    facts["promised"] = {**promised, "model.9.cv2.conv": 0.99}
    try:
        with pytest.raises(
            SparsityError, match=r"best_pruned_quant\.pt, but got less in model\.9\.cv2\.conv"
        ):
            STAGES["evaluate"].run(trained)
    finally:
        facts["promised"] = promised


def test_a_checkpoint_that_is_only_evaluated_gets_its_table(digits, tmp_path, start):
    context = make_context(digits, tmp_path / "run", start, EPOCHS, checkpoint=str(start))
    context.experiment.stages = ["evaluate"]
    outcome = STAGES["evaluate"].run(context)
    assert outcome.files == [context.run.path / "sparsity.csv"]
    assert outcome.metrics["sparsity/prunable"] == pytest.approx(0.75, abs=1e-3)
    assert {row["promised"] for row in rows_of(context)} == {"0.000000"}


def test_a_start_that_is_not_what_was_planned_is_refused(digits, tmp_path, start):
    context = make_context(digits, tmp_path / "run", start, EPOCHS + HOLD)
    planned = {"sparsity": 0.75, "layers": {"model.1.conv": 0.75, "model.3.conv": 0.9}}
    context.run.record("plan", StageRecord("x", facts=planned))
    with pytest.raises(SparsityError, match=r"in the start weights, but got less in model\.3\.conv \(75"):
        run_training(context)


def test_zeros_that_will_be_lost_are_warned_of(digits, tmp_path, start, caplog):
    context = make_context(digits, tmp_path / "run", start, EPOCHS)
    (tmp_path / "run" / "weights").mkdir()
    with caplog.at_level(logging.WARNING, "sparse_exp"):
        run_training(context)
    assert "The start has 75 % zeros, and r.md does not hold them" in caplog.text


def test_a_baseline_that_there_is_not_cannot_teach(digits, tmp_path, start):
    context = make_context(digits, tmp_path / "run", start, EPOCHS + DISTIL)
    context.experiment.recipe.teacher = "baseline"
    with pytest.raises(ConfigError, match=r"recovery\.baseline=auto"):
        run_training(context)

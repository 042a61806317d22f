"""A training that is cut off and goes on ends as if it had not been."""

from __future__ import annotations

import errno
import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from available import needs_sparseml

from sparse_exp.config.schema import DatasetConfig, Experiment, ModelConfig, RecipeConfig, TrainerConfig
from sparse_exp.metrics.detection import Matcher
from sparse_exp.quantization.choice import QuantizationChoice
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.runs.directory import Run
from sparse_exp.runs.replay import told_of
from sparse_exp.stages.base import Context
from sparse_exp.stages.registry import STAGES
from sparse_exp.tracking import Metrics
from sparse_exp.training import loop, state
from sparse_exp.training.evaluation import Evaluation, Validation
from sparse_exp.training.loop import TrainingResult
from sparse_exp.training.state import StateError, StateFile
from sparse_exp.yolov5 import YOLOv5, read_checkpoint

RECIPES = Path(__file__).parents[3] / "conf" / "recipe"


class Killed(BaseException):
    """What no training catches."""


class Deadly(StateFile):
    """Kills a training: as soon as its state is saved for the ``count``-th time, or just before that."""

    def __init__(self, path: Path, count: int, *, before: bool = False) -> None:
        super().__init__(path, "mark")
        self._left, self._before = count, before

    def write(self, content):
        self._left -= 1
        if not self._left and self._before:
            raise Killed
        super().write(content)
        if not self._left:
            raise Killed


@pytest.fixture(autouse=True)
def telling(monkeypatch):
    """An evaluation whose mAP50 changes with every bit of the weights and buffers; a list to make it fall."""
    trainers: list[loop.Trainer] = []

    def evaluate_model(_, model, *_args, **_options) -> Evaluation:
        finite = (value for value in model.state_dict().values() if value.isfinite().all())
        found = math.modf(sum(float(value.double().abs().sum()) for value in finite) * 1e4)[0]
        if trainers:
            found = 0.9 - 0.1 * trainers[-1]._position.step / 8 + 0.001 * found
        nothing = Matcher(1)
        return Evaluation(
            found, found / 2, np.zeros(101), np.zeros(101), 6, 0.0, nothing.accuracies().by_class, nothing
        )

    monkeypatch.setattr(Validation, "evaluate_model", evaluate_model)
    return trainers


@pytest.fixture
def train(tiny_trainer, telling):
    """A function that trains with new objects, from where the file holds a state."""

    def fit(text, file: StateFile, teacher=None, falls=False, **options):
        torch.manual_seed(1)
        more = {"teacher": YOLOv5(teacher, 10) if teacher else None, "state": file}
        trainer = tiny_trainer(text, options=more, **{"sparsity": 0.0, **options})
        trainer._writer = replace(trainer._writer, folder=file.path.parent)
        if falls:
            telling.append(trainer)
        torch.rand(5)  # whatever else a new process may have drawn
        return trainer, trainer.fit(file.read())

    return fit


@pytest.fixture
def whole_and_cut(train, tmp_path):
    """A function that trains undisturbed, and killed again and again; compares and returns the former.

    Each process is killed after it has saved its state for the n-th time, or where n is negative, just
    before that; the last one ends.
    """

    def compare(text, kills, **options) -> TrainingResult:
        for folder in ("whole", "cut"):
            (tmp_path / folder).mkdir()
        whole, wanted = train(text, StateFile(tmp_path / "whole" / "state.pt", "mark"), **options)
        random, path = torch.get_rng_state(), tmp_path / "cut" / "state.pt"
        for kill in kills:
            with pytest.raises(Killed):
                train(text, Deadly(path, abs(kill), before=kill < 0), **options)
        cut, found = train(text, StateFile(path, "mark"), **options)
        assert told(found.history) == told(wanted.history)
        assert len({record["val/map50"] for record in wanted.history}) == len(wanted.history)
        assert same(cut.model.state_dict(), whole.model.state_dict())
        assert same(cut._contract.masks, whole._contract.masks)
        assert torch.equal(torch.get_rng_state(), random)
        assert found.best == {name: path.parent / best.name for name, best in wanted.best.items()}
        assert [vars(b) | {"path": 0} for b in found.phases.values()] == [
            vars(b) | {"path": 0} for b in wanted.phases.values()
        ]
        for theirs in ["last.pt", *(best.name for best in wanted.best.values())]:
            one, two = (read_checkpoint(tmp_path / folder / theirs) for folder in ("whole", "cut"))
            assert same(one.state_dict, two.state_dict)
            assert (one.epoch, one.phase) == (two.epoch, two.phase)
        return wanted

    return compare


def told(history):
    """What a history says, but for times."""
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_s")} for record in history]


def same(one, two) -> bool:
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name], two[name])] == []


OTHERS = """modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 4.0
  - !LearningRateModifier
    lr_class: ExponentialLR
    lr_kwargs: {gamma: 0.8}
    init_lr: 0.001
    start_epoch: 0.5
  - !TrainableParamsModifier
    params: ['re:model.3.*weight']
    trainable: False
    params_strict: False
    start_epoch: 0.6
    end_epoch: 2.1
  - !GlobalMagnitudePruningModifier
    init_sparsity: 0.1
    final_sparsity: 0.6
    start_epoch: 0.0
    end_epoch: 3.0
    update_frequency: 1.0
    params: ['re:model.[4-9].*conv.weight']
    leave_enabled: False
  - !ConstantPruningModifier
    start_epoch: 1.2
    end_epoch: 3.5
    params: ['re:model.[4-9].*conv.weight']
  - !MagnitudePruningModifier
    init_sparsity: __FROM_PARAM__
    final_sparsity: 0.5
    start_epoch: 0.0
    end_epoch: 2.5
    update_frequency: 0.4
    params: ['re:model.1[0-9].*conv.weight']
    leave_enabled: True
"""
# QAT begins in the middle of epoch 1, batch norms freeze at 2, observers at 3.
QAT = {"num_epochs": 4.0, "quantization_epochs": 2.5, "batch_norm_share": 0.2, "observer_share": 0.6}
CASES = {
    "dense": ({"num_epochs": 3.0}, {}),
    "transfer": ({"num_epochs": 3.0}, {"sparsity": 0.5}),
    "transfer_quant": (QAT, {"sparsity": 0.5}),
    "prune": ({"num_epochs": 2.0}, {}),
    "prune_quant": ({"num_epochs": 4.0, "quantization_epochs": 2.0, "pruning_epochs": 1.5}, {}),
    "distill": ({"num_epochs": 3.0}, {"teacher": "n"}),
    "distill_layers": ({"num_epochs": 2.0, "quantization_epochs": 0.5}, {"teacher": "s"}),
    "others": ({}, {}),
}


def text_of(name: str) -> str:
    return OTHERS if name == "others" else Recipe.from_file(RECIPES / f"{name}.md", CASES[name][0]).text


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        ("prune", [-2]),
        ("transfer_quant", [2, 2]),  # when QAT is to begin, and within it, when batch norms are frozen
        pytest.param("distill_layers", [1], marks=pytest.mark.slow),
    ],
)
def test_a_training_that_is_killed_ends_as_an_undisturbed_one(whole_and_cut, name, kills):
    whole_and_cut(text_of(name), kills, **CASES[name][1])


@needs_sparseml
@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [False, True])
def test_so_does_qat_under_sparseml(whole_and_cut, per_channel):
    chosen = QuantizationChoice(per_channel, 7)
    recipe = Recipe.from_file(RECIPES / "transfer_quant.md", QAT, engine="sparseml", quantization=chosen)
    whole_and_cut(recipe.text, [2, 1, 1], engine="sparseml", sparsity=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_training_killed_in_every_stretch_ends_as_an_undisturbed_one(train, whole_and_cut, name, tmp_path):
    text = text_of(name)
    (tmp_path / "count").mkdir()
    _, result = train(text, StateFile(tmp_path / "count" / "state.pt", "mark"), **CASES[name][1])
    whole_and_cut(text, [-1, 1] * len(result.history), **CASES[name][1])


@pytest.mark.slow
def test_a_phase_that_was_left_early_stays_left(whole_and_cut):
    variables = {"num_epochs": 4.0, "quantization_epochs": 1.0}
    text = Recipe.from_file(RECIPES / "transfer_quant.md", variables).text
    wanted = whole_and_cut(text, [2], sparsity=0.5, patience=1, falls=True)
    assert [(r["phase"], r["epoch"], r.get("stopped early", False)) for r in wanted.history] == [
        ("pruned", 1.0, False),
        ("pruned", 2.0, True),
        ("pruned_quant", 4.0, False),
    ]


EPOCHS = "modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: 3.0\n"


@pytest.fixture
def saved(train, tmp_path) -> Path:
    """The state of a dense training after its first epoch."""
    with pytest.raises(Killed):
        train(EPOCHS, Deadly(tmp_path / "state.pt", 1))
    return tmp_path / "state.pt"


def test_the_position_is_said_and_a_state_is_data_alone(saved, train, caplog):
    caplog.set_level(logging.INFO)
    kept = StateFile(saved, "mark").read()
    assert kept["at"] == {"phase": 0, "step": 2, "batches": 2, "mosaic": True}
    train(EPOCHS, StateFile(saved, "mark"))
    assert "Going on with the training after epoch 1 of 3." in caplog.messages


@pytest.mark.parametrize(("earlier", "goes_on"), [("mark", True), ("another", False), (None, False)])
def test_a_state_of_an_earlier_version_is_gone_on_with_where_nothing_changed(saved, train, earlier, goes_on):
    file = StateFile(saved, "as it is taken now", earlier_mark=earlier)
    assert (file.read() is not None) is goes_on
    if goes_on:
        train(EPOCHS, file)  # which saves its own states from then on
        assert StateFile(saved, "as it is taken now").read()["at"]["step"] == 6


class Runs:
    """An object whose unpickling would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def damage(path: Path, how: str) -> None:
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-4096])
    elif how == "no state":
        torch.save({"model": torch.zeros(1)}, path)
    elif how == "code":
        torch.save({"format": 1, "mark": "mark", "at": Runs(path.with_name("ran"))}, path)
    elif how == "a bit":
        flip_bit(path)


def flip_bit(path: Path) -> None:
    """Change a bit of the weights, of which the file has more than of anything else."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cut off", "it cannot be read"),
        ("a bit", "it cannot be read"),
        ("code", "it cannot be read"),
        ("no state", "it is no state of a training of this version"),
        ("other mark", "the configuration, the data or the code has changed since"),
    ],
)
def test_a_state_that_cannot_be_used_is_said_in_one_line(saved, caplog, how, reason):
    damage(saved, how)
    assert StateFile(saved, "another" if how == "other mark" else "mark").read() is None
    (message,) = caplog.messages
    assert message.startswith(f"The saved state {saved} is not used: {reason}")
    assert "\n" not in message
    assert message.endswith("The training starts from the beginning.")
    assert not saved.with_name("ran").exists()


def other_position(kept):
    kept["at"]["step"] = 700


def other_layers(kept):
    del kept["model"]["model.0.conv.weight"]


def fewer_modifiers(kept):
    kept["sparsifier"]["modifiers"].pop()


def no_best(kept):
    kept["best"]["dense"]["path"] = "gone.pt"


def test_a_best_checkpoint_that_has_changed_since_is_not_gone_on_with(saved, train):
    file = StateFile(saved, "mark")
    flip_bit(saved.parent / file.read()["best"]["dense"]["path"])
    with pytest.raises(StateError, match="does not fit this training"):
        train(EPOCHS, file)


@pytest.mark.parametrize("change", [other_position, other_layers, fewer_modifiers, no_best])
def test_a_state_of_another_training_is_refused(saved, train, change):
    file = StateFile(saved, "mark")
    kept = file.read()
    change(kept)
    file.write(kept)
    with pytest.raises(StateError, match="does not fit this training"):
        train(EPOCHS, file)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_state_that_cannot_be_written_leaves_the_former_one(saved, monkeypatch, error):
    def save(_content, file):
        file.write(b"half")
        raise error

    file = StateFile(saved, "mark")
    monkeypatch.setattr(state.torch, "save", save)
    with pytest.raises(type(error)):
        file.write({"at": {"step": 4}})
    assert file.read()["at"]["step"] == 2
    assert [path.name for path in saved.parent.glob(".*")] == []


class Notebook:
    """A tracker that remembers the epochs it was told of, and interrupts after some."""

    def __init__(self, run_id: str, epochs: int = 100) -> None:
        self.run_id, self.told, self._left = run_id, [], epochs

    def log(self, event: object, at: float | None = None) -> None:
        if isinstance(event, Metrics):
            self.told.append(event.step)
            if len(self.told) == self._left:
                raise Killed


@pytest.fixture
def context(digits, tmp_path):
    """A function that makes the context of one run, as each start of it does."""
    experiment = Experiment(
        name="t",
        stages=["train"],
        model=ModelConfig(name="yolov5n", size="n", weights="scratch"),
        dataset=DatasetConfig(name="digits", imgsz=64),
        recipe=RecipeConfig(name="r", file="r.md"),
        trainer=TrainerConfig(batch_size=8),
    )

    def make(name: str, tracker: Notebook) -> Context:
        run = Run(tmp_path / name)
        made = Context(experiment, run, tracker, Recipe(EPOCHS, name="r.md"), mark="mark")
        run.path.mkdir(exist_ok=True)
        made.dataset, made.cache = digits, tmp_path
        return made

    return make


def test_the_stage_goes_on_and_a_tracker_that_missed_epochs_is_told_of_all(context):
    with pytest.raises(Killed):
        STAGES["train"].run(context("cut", Notebook("one", 3)))
    again = context("cut", Notebook("another"))
    told = [event for event, _ in told_of(again.run) if isinstance(event, Metrics)]
    assert [event.step for event in told] == [100, 200, 300]  # kept before the tracker was told
    outcome = STAGES["train"].run(again)
    assert again.tracker.told == [300]
    assert [event.step for event, _ in told_of(again.run) if isinstance(event, Metrics)] == [100, 200, 300]
    assert [path.name for path in outcome.spent] == ["state.pt"]
    assert outcome.spent[0].is_file()
    assert sorted(path.name for path in outcome.files) == sorted(
        ["history.json", "sparsity.csv", "recipe.md", "best_dense.pt", "last.pt"]
    )


@pytest.mark.slow
def test_the_stage_begins_again_where_the_state_does_not_fit(context, caplog):
    with pytest.raises(Killed):
        STAGES["train"].run(context("cut", Notebook("one", 2)))
    file = StateFile(context("cut", None).run.path / state.STATE, "mark")
    kept = file.read()
    other_layers(kept)
    file.write(kept)
    notebook = Notebook("one")
    STAGES["train"].run(context("cut", notebook))
    assert notebook.told == [100, 200, 300]
    assert "The training starts from the beginning." in caplog.text

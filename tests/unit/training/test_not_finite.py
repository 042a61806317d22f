"""Losses, gradients and weights that are not finite: a step is left out, a few of them end the training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sparse_exp.errors import CheckpointError, StageFailed
from sparse_exp.files import write_json
from sparse_exp.sparsity.measure import SparsityContract
from sparse_exp.yolov5 import YOLOv5, read_checkpoint
from sparse_exp.yolov5.checkpoint import save_checkpoint

TRANSFER = """modifiers:
  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: 4.0}
  - !ConstantPruningModifier {start_epoch: 0.0, params: __ALL_PRUNABLE__}
"""


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch):
    """A function that makes the loss of the given steps (from 1) a number that is none."""
    from sparse_exp.training import loop

    def poison(value: float, *steps: int) -> None:
        original, seen = loop.DetectionLoss.__call__, iter(range(1, 1000))

        def loss(self, raw, targets):
            total, parts = original(self, raw, targets)
            return (total * value, parts) if next(seen) in steps else (total, parts)

        monkeypatch.setattr(loop.DetectionLoss, "__call__", loss)

    return poison


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out(tiny_trainer, scripted, poisoned, tmp_path, value) -> None:
    poisoned(value, 3, 4, 6)
    scripted(0.5)
    trainer = tiny_trainer(TRANSFER)
    history = trainer.fit().history
    assert [record.get("left out", 0) for record in history] == [0, 2, 1, 0]
    assert "loss/box" not in history[1]  # none of its steps counts
    assert all(math.isfinite(v) for record in history for v in record.values() if isinstance(v, float))
    for path in tmp_path.glob("*.pt"):
        state = read_checkpoint(path).state_dict
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_step_that_is_left_out_changes_nothing(tiny_trainer, scripted, poisoned) -> None:
    scripted(0.5)
    trainer = tiny_trainer(TRANSFER)
    poisoned(math.nan, *range(1, 9))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(StageFailed):
        trainer.fit()
    after = trainer.model.state_dict()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []


def test_several_in_a_row_end_the_training(tiny_trainer, scripted, poisoned) -> None:
    poisoned(math.nan, *range(2, 100))
    scripted(0.5)
    with pytest.raises(StageFailed) as caught:
        tiny_trainer(TRANSFER, lr=0.002, warmup=0.0).fit()
    text = str(caught.value)
    assert text.startswith("The loss or its gradients are not finite in the steps 2 to 6 (epoch 2.5, lr 0.00")
    assert "batches of 4 images" in text
    assert "trainer.lr" in text
    assert "Pruning" not in text
    assert "\n" not in text


@pytest.mark.parametrize(("every", "steps"), [(3, "3 to 30"), (2, "2 to 20"), (5, "5 to 50")])
def test_many_of_the_last_steps_end_the_training(tiny_trainer, scripted, poisoned, every, steps) -> None:
    poisoned(math.nan, *range(every, 1000, every))
    scripted(0.5)
    trainer = tiny_trainer(TRANSFER.replace("4.0", "40.0"), lr=0.002, warmup=0.0, val_every=40)
    with pytest.raises(StageFailed, match=rf"not finite in 10 of the steps {steps} \(epoch .*, lr 0\.00"):
        trainer.fit()


def test_few_of_the_last_steps_do_not(tiny_trainer, scripted, poisoned) -> None:
    poisoned(math.nan, *range(6, 1000, 6))
    scripted(0.5)
    trainer = tiny_trainer(TRANSFER.replace("4.0", "40.0"), val_every=40)
    assert trainer.fit().history[-1]["left out"] == 13


def test_a_rate_that_blows_up_is_named(tiny_trainer) -> None:
    """Weights that a step makes infinite, as no step before was anything but finite."""
    with pytest.raises(StageFailed, match=r"not finite in .*learning rate smaller \(trainer\.lr"):
        tiny_trainer(TRANSFER, lr=1e30, max_grad_norm=1e6).fit()


def test_steps_of_quantized_phases_are_left_out_too(tiny_trainer, recipe_text, scripted, poisoned) -> None:
    poisoned(math.nan, 6, 7)
    scripted(0.5)
    trainer = tiny_trainer(recipe_text, {"num_epochs": 4, "quantization_epochs": 2})
    history = trainer.fit().history
    assert [record.get("left out", 0) for record in history] == [0, 0, 1, 1]
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


def test_a_contract_says_that_weights_are_lost_before_it_blames_the_recipe() -> None:
    model = YOLOv5("n", 1)
    convs = model.prunable_convolutions()
    contract = SparsityContract.of(convs)
    contract.masks["model.1.conv"][:] = True
    with torch.no_grad():
        convs["model.1.conv"].weight.fill_(math.nan)
    with pytest.raises(StageFailed, match=r"The weights after epoch 2 are not finite in model\.1\.conv"):
        contract.check(convs, "after epoch 2")


@pytest.mark.parametrize("name", ["model.3.conv.weight", "model.3.bn.running_var"])
def test_a_start_that_is_not_finite_is_refused(tmp_path: Path, name: str) -> None:
    state = YOLOv5("n", 1).state_dict()
    state[name].view(-1)[0] = math.inf
    save_checkpoint(
        tmp_path / "a.pt", model_state=state, size="n", num_classes=1, names=["a"], imgsz=64, recipe="",
        phase="dense", epoch=1, metrics={},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=rf"to be finite, but {name} is not"):
        read_checkpoint(tmp_path / "a.pt")


def test_json_has_no_nan(tmp_path: Path) -> None:
    data = {"a": math.nan, "b": [1.5, -math.inf, {"c": math.inf}], "d": (math.nan,), "e": Path("x")}

    def refuse(text: str) -> None:
        raise AssertionError(text)

    text = write_json(tmp_path / "a.json", data).read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "a": None, "b": [1.5, None, {"c": None}], "d": [None], "e": "x",
    }  # fmt: skip

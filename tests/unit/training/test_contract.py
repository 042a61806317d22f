"""What the loop promises about zeros, phases and steps, with evaluations that are scripted."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from sparse_exp.errors import SparsityError
from sparse_exp.recipes import checkpoints
from sparse_exp.sparsity.measure import state_sparsity
from sparse_exp.training.phases import Best
from sparse_exp.yolov5 import YOLOv5, read_checkpoint

EPOCHS = "training_modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: {}\n"
HOLD = """pruning_modifiers:
  - !ConstantPruningModifier
    start_epoch: 0.0
    end_epoch: {}
    params: __ALL_PRUNABLE__
"""
GRADUAL = """pruning_modifiers:
  - !MagnitudePruningModifier
    init_sparsity: 0.1
    final_sparsity: 0.6
    start_epoch: 0.5
    end_epoch: 2.5
    update_frequency: 0.25
    params: ['re:model[.].*conv[.]weight']
"""
QUANTIZE = """quantization_modifiers:
  - !QuantizationModifier
    start_epoch: {}
    scheme:
      input_activations: {{num_bits: 8, symmetric: False}}
      weights: {{num_bits: 8, symmetric: True}}
    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]
"""


def phases_of(history) -> list[tuple[str, float]]:
    return [(record["phase"], record["epoch"]) for record in history]


def shares(path) -> dict[str, float]:
    return {layer.name: layer.sparsity for layer in state_sparsity(read_checkpoint(path).state_dict)}


@pytest.fixture(scope="module")
def epochs_of_gradual() -> list[tuple[str, float]]:
    return [("dense", 0.5), *(("pruning", e) for e in (1.0, 2.0, 2.5)), *(("pruned", e) for e in (3.0, 4.0))]


@pytest.mark.slow
def test_gradual_pruning_reaches_its_sparsity_in_every_layer(
    tiny_trainer, scripted, epochs_of_gradual, tmp_path
):
    scripted(0.1, 0.2, 0.9, 0.3, 0.5, 0.4)
    trainer = tiny_trainer(EPOCHS.format(4.0) + GRADUAL, sparsity=0.0, patience=1)
    result = trainer.fit()
    assert phases_of(result.history) == epochs_of_gradual  # patience does not end a pruning phase
    sparsity = [record["sparsity/prunable"] for record in result.history]
    # the cubic of Zhu and Gupta 2017: final + (initial - final) (1 - t)^3, a quarter of the way
    assert sparsity[1] == pytest.approx(0.6 - 0.5 * 0.75**3, abs=1e-3)
    assert sparsity == sorted(sparsity)
    # Of the phase that prunes only the end counts, not the 0.9 on the way.
    assert {name: best.epoch for name, best in result.phases.items()} == {
        "dense": 0.5,
        "pruning": 2.5,
        "pruned": 3.0,
    }
    for name in ("pruning", "pruned"):
        best, found = result.phases[name], shares(result.best[name])
        assert best.path == tmp_path / f"best_{name}.pt"
        for layer, conv in trainer.model.prunable_convolutions().items():
            assert found[layer] == pytest.approx(0.6, abs=1 / conv.weight.numel())
            assert best.promised[layer] == pytest.approx(0.6, abs=1 / conv.weight.numel())
    assert set(result.phases["dense"].promised.values()) == {0.0}


@pytest.mark.parametrize(("epochs", "held"), [(1, 0.5), (2, 1.0)], ids=["of the start", "of an epoch"])
def test_a_recipe_that_lets_go_of_the_zeros_fails_the_run_and_names_layers(
    tiny_trainer, scripted, epochs, held
):
    scripted(0.1)
    trainer = tiny_trainer(EPOCHS.format(epochs) + HOLD.format(held))
    with pytest.raises(
        SparsityError, match=rf"0 after epoch {epochs}, but got others in model\.\S+, .* more\. "
    ):
        trainer.fit()


def test_a_dense_recipe_may_lose_the_zeros_of_its_start(tiny_trainer, scripted):
    scripted(0.1)
    result = tiny_trainer(EPOCHS.format(1.0)).fit()
    assert result.history[0]["sparsity/prunable"] < 0.4
    assert result.phases["dense"].promised == dict.fromkeys(result.phases["dense"].promised, 0.0)


def test_too_few_zeros_in_a_layer_fail_the_run(tiny_trainer, scripted, monkeypatch):
    scripted(0.1)
    trainer = tiny_trainer(EPOCHS.format(1.0) + HOLD.format(-1))
    truly = trainer._recipe.expected_sparsity
    more = {"model.2.cv1.conv": 0.9}
    monkeypatch.setattr(trainer._recipe, "expected_sparsity", lambda *args: {**truly(*args), **more})
    with pytest.raises(
        SparsityError, match=r"after epoch 1, but got less in model\.2\.cv1\.conv \(50\.00% of"
    ):
        trainer.fit()


def test_a_zero_that_is_lost_in_the_file_fails_the_run(tiny_trainer, scripted, monkeypatch):
    scripted(0.1)
    save = checkpoints.save_checkpoint

    def careless(path, *, model_state, **others) -> None:
        weight = model_state["model.4.cv1.conv.weight"].clone()
        weight[weight == 0] = 1e-9
        save(path, model_state={**model_state, "model.4.cv1.conv.weight": weight}, **others)

    monkeypatch.setattr(checkpoints, "save_checkpoint", careless)
    trainer = tiny_trainer(EPOCHS.format(1.0) + HOLD.format(-1))
    with pytest.raises(
        SparsityError, match=r"in last\.pt, but got less in model\.4\.cv1\.conv \(0\.00% of 50"
    ):
        trainer.fit()


@pytest.fixture
def standstill() -> dict[str, float]:
    """Four epochs of the default recipe of which the last is QAT at rate 0."""
    return {
        "num_epochs": 4,
        "quantization_epochs": 1,
        "warmup_epochs": 0.5,
        "quantization_init_lr": 0.0,
        "quantization_final_lr": 0.0,
    }


def test_a_phase_that_stops_getting_better_ends_and_the_next_goes_on_from_its_best(
    tiny_trainer, scripted, recipe_text, standstill, caplog
):
    scripted(0.5, 0.5, 0.2)
    trainer = tiny_trainer(recipe_text, standstill, patience=1, options={"composed": "composed: 1.0"})
    with caplog.at_level(logging.INFO, "sparse_exp"):
        result = trainer.fit()
    assert phases_of(result.history) == [("pruned", 1.0), ("pruned", 2.0), ("pruned_quant", 4.0)]
    assert [record.get("stopped early") for record in result.history] == [None, True, None]
    assert "pruned ends early, after epoch 2 of 3" in caplog.text
    assert {name: (best.epoch, best.map50) for name, best in result.phases.items()} == {
        "pruned": (1.0, 0.5),
        "pruned_quant": (4.0, 0.2),  # the best of a phase is not held against the one before
    }
    best, last = (read_checkpoint(result.best[name]).state_dict for name in ("pruned", "pruned_quant"))
    weights = [name for name in best if name.endswith("conv.weight")]
    assert len(weights) > 50
    assert all(torch.equal(last[name], best[name]) for name in weights)
    assert read_checkpoint(result.best["pruned"]).recipe == "composed: 1.0"
    assert result.history[-1]["lr"] == 0.0  # the schedule has jumped, too


def test_the_last_phase_may_end_early_too_but_not_after_its_end(tiny_trainer, scripted):
    scripted(0.5)
    trainer = tiny_trainer(EPOCHS.format(3.0), sparsity=0.0, patience=1)
    history = trainer.fit().history
    assert [(r["epoch"], r.get("stopped early")) for r in history] == [(1.0, None), (2.0, True)]
    history = tiny_trainer(EPOCHS.format(2.0), sparsity=0.0, patience=1).fit().history
    assert [(r["epoch"], r.get("stopped early")) for r in history] == [(1.0, None), (2.0, None)]


def test_a_phase_of_a_name_that_was_there_before_has_a_best_of_its_own(tiny_trainer, scripted, tmp_path):
    scripted(0.1)
    trainer = tiny_trainer(EPOCHS.format(0.5), sparsity=0.0)
    trainer._best["dense"] = Best(tmp_path / "earlier.pt", 0.0, 0.9, 0.9, {})
    best = trainer.fit().phases["dense"]
    assert (best.path.name, best.map50) == ("best_dense.pt", 0.1)


def gradients(trainer, batch, parts: int) -> tuple[list[torch.Tensor], dict[str, float]]:
    sparsifier = trainer._recipe.attach(trainer._model, trainer._optimizer, 2)
    losses = trainer._accumulate(batch, sparsifier, 0.0, parts=parts)
    return [p.grad.clone() for p in trainer.model.parameters()], dict(losses)


def test_parts_of_a_batch_add_up_to_its_gradient(tiny_trainer, tiny_data):
    """With frozen batch norm, and as many boxes in each image, as box losses are means over boxes."""
    trainer = tiny_trainer(EPOCHS.format(1.0), sparsity=0.0)
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    batch = next(iter(tiny_data.train))
    boxes = torch.tensor([[0, 3, 0.4, 0.5, 0.3, 0.3], [0, 7, 0.7, 0.2, 0.2, 0.4]])
    owners = torch.arange(4.0).repeat_interleave(2)
    targets = torch.cat([owners[:, None], boxes[:, 1:].repeat(4, 1)], dim=1)
    batch = batch._replace(targets=targets)
    whole, losses = gradients(trainer, batch, parts=1)
    cut, cut_losses = gradients(trainer, batch, parts=3)  # of 2, 1 and 1 images
    assert max(g.abs().max() for g in whole) > 0.01
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()) + 1e-7)
    assert cut_losses == pytest.approx(losses, rel=1e-5)


def limit(model: YOLOv5, images: int, message: str = "DefaultCPUAllocator: can't allocate memory") -> None:
    """Let a model fail on more images, after its forward pass has moved all statistics."""
    forward = model.forward

    def limited(x: torch.Tensor):
        output = forward(x)
        if len(x) > images:
            raise RuntimeError(message)
        return output

    model.forward = limited


def test_a_quantized_step_that_runs_out_of_memory_is_done_again_in_parts(
    tiny_trainer, scripted, tmp_path, caplog
):
    scripted(0.1)
    text = EPOCHS.format(0.5) + HOLD.format(-1) + QUANTIZE.format(0.0)  # one step
    failing = tiny_trainer(text)
    limit(failing.model, images=1)
    history = failing.fit().history
    assert [r.levelname for r in caplog.records].count("WARNING") == 2  # 2 parts, 4 parts; then no more
    assert "computed in 4 parts" in caplog.text
    found = read_checkpoint(tmp_path / "last.pt").state_dict
    other = tiny_trainer(text, options={"qat_split": 4}).fit().history
    wanted = read_checkpoint(tmp_path / "last.pt").state_dict
    for name in ("loss/box", "loss/obj", "loss/cls"):
        assert history[0][name] == other[0][name]
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize(
    ("images", "message", "start"),
    [(0, "out of memory", 0.0), (1, "shapes differ", 0.0), (1, "out of memory", 0.5)],
    ids=["not even one image fits", "another error", "not quantized yet"],
)
def test_other_failures_of_a_step_go_on(tiny_trainer, scripted, images, message, start):
    scripted(0.1)
    trainer = tiny_trainer(EPOCHS.format(1.0) + QUANTIZE.format(start), sparsity=0.0)
    limit(trainer.model, images, message)
    with pytest.raises(RuntimeError, match=message):
        trainer.fit()


DISTILL = """distillation_modifiers:
  - !DistillationModifier
    start_epoch: 0.0
    end_epoch: 1.0
    hardness: {}
    temperature: 1.0
"""


def test_a_distilling_recipe_learns_from_its_teacher(tiny_trainer, scripted, tmp_path):
    scripted(0.1)
    torch.manual_seed(7)
    teacher = YOLOv5("n", 10)
    losses, weights = {}, {}
    for hardness in (0.0, 0.5):
        trainer = tiny_trainer(EPOCHS.format(1.0) + DISTILL.format(hardness), options={"teacher": teacher})
        losses[hardness] = trainer.fit().history[0]["loss/distill"]
        weights[hardness] = read_checkpoint(tmp_path / "last.pt").state_dict["model.24.m.0.weight"]
    assert losses[0.0] == 0
    assert losses[0.5] != 0
    assert not torch.equal(weights[0.0], weights[0.5])
    assert not teacher.training


def test_a_rate_of_its_own_for_the_biases_is_recorded(tiny_trainer, scripted):
    scripted(0.1)
    rates = """  - !LearningRateFunctionModifier
    start_epoch: 0.0
    end_epoch: 1.0
    lr_func: linear
    init_lr: {}
    final_lr: {}
    param_groups: {}
"""
    text = EPOCHS.format(1.0) + rates.format(0.05, 0.01, "[2]") + rates.format(0.0, 0.01, "[0, 1]")
    record = tiny_trainer(text, sparsity=0.0).fit().history[0]
    # the last of two steps, half of the way
    assert record["lr/biases"] == pytest.approx(0.05 - 0.04 * 0.5)
    assert record["lr"] == pytest.approx(0.01 * 0.5)

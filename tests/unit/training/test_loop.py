from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparse_exp.config.schema import TrainerConfig
from sparse_exp.data.loader import make_loader
from sparse_exp.errors import RecipeError
from sparse_exp.quantization.quantizers import calibrate, quantizers
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.training.averaging import exponential
from sparse_exp.training.evaluation import as_input
from sparse_exp.training.precision import Precision, choose_precision
from sparse_exp.yolov5 import YOLOv5, read_checkpoint

ONLY_EPOCHS = "training_modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: {}\n"


def test_history_has_a_record_at_each_epoch_and_at_the_end_of_each_phase(tiny_run):
    assert [(r["phase"], r["epoch"]) for r in tiny_run.history] == [
        ("pruned", 1.0),
        ("pruned", 1.5),
        ("pruned_quant", 2.0),
        ("pruned_quant", 3.0),
    ]


def test_records_hold_what_is_reported(tiny_run):
    for record in tiny_run.history:
        assert record["sparsity/prunable"] == pytest.approx(0.75, abs=1e-3)
        assert 0 <= record["val/map50_95"] <= record["val/map50"] <= 1
        assert all(math.isfinite(record[f"loss/{name}"]) for name in ("box", "obj", "cls"))
        assert record["images_per_s"] > 0
    # the last rate of each stretch: cosines of the recipe, from step 3, 5, 7 and 11 of 4 per epoch
    mid = 5e-5 + (1e-3 - 5e-5) * 0.5 * (1 + math.cos(math.pi * (1.25 - 0.5) / 1.0))
    assert tiny_run.history[1]["lr"] == pytest.approx(mid)


def fitness(record):
    return 0.1 * record["val/map50"] + 0.9 * record["val/map50_95"]


def test_each_phase_has_its_best_checkpoint_and_the_run_its_last(tiny_run):
    assert {path.name for path in tiny_run.weights.iterdir()} == {
        "best_pruned.pt",
        "best_pruned_quant.pt",
        "last.pt",
    }
    assert tiny_run.best == {
        phase: tiny_run.weights / f"best_{phase}.pt" for phase in ("pruned", "pruned_quant")
    }
    for phase, path in tiny_run.best.items():
        checkpoint = read_checkpoint(path)
        records = [r for r in tiny_run.history if r["phase"] == phase]
        assert checkpoint.phase == phase
        assert fitness(checkpoint.metrics) == max(map(fitness, records))
        assert (checkpoint.epoch, checkpoint.imgsz, checkpoint.size) in [
            (r["epoch"], 64, "n") for r in records
        ]
    assert read_checkpoint(tiny_run.weights / "last.pt").epoch == 3.0


def test_the_start_zeros_are_in_every_checkpoint(tiny_run):
    for path in tiny_run.weights.iterdir():
        state = read_checkpoint(path).state_dict
        weights = [
            v for k, v in state.items() if k.endswith("cv1.conv.weight") or "cv1.conv.module.weight" in k
        ]
        weights = [w for w in weights if w.ndim == 4]
        assert len(weights) > 10
        for weight in weights:
            assert int((weight == 0).sum()) == math.ceil(0.75 * weight.numel())


def test_the_stem_reads_pixels_as_they_are(tiny_run):
    state = read_checkpoint(tiny_run.weights / "last.pt").state_dict
    scales = [state[f"model.{layer}.conv.input_quantizer.scale"].item() for layer in (0, 1)]
    assert scales[0] == pytest.approx(1 / 255, rel=1e-7)
    assert scales[1] != scales[0]


STANDSTILL = {"quantization_init_lr": 0.0, "quantization_final_lr": 0.0, "warmup_epochs": 0.5}


def test_quantization_goes_on_from_the_averaged_weights(train_tiny, recipe_text):
    run = train_tiny(recipe_text, {"num_epochs": 2, "quantization_epochs": 1, **STANDSTILL})
    averaged = read_checkpoint(run.best["pruned"]).state_dict
    quantized = read_checkpoint(run.weights / "last.pt").state_dict
    weights = [name for name in averaged if name.endswith("conv.weight")]
    assert len(weights) > 50
    for name in weights:
        assert torch.equal(quantized[name], averaged[name]), name


@pytest.mark.parametrize(("quantize_from", "epoch"), [("best", 1), ("last", 2)])
def test_quantization_starts_from_the_best_weights_of_the_phase_before(
    tiny_trainer, scripted, recipe_text, tmp_path, quantize_from, epoch
):
    scripted(0.5, 0.4, 0.3)
    variables = {"num_epochs": 3, "quantization_epochs": 1, **STANDSTILL}
    trainer = tiny_trainer(recipe_text, variables, quantize_from=quantize_from)
    weights = {}
    trainer._on_epoch = lambda record: weights.setdefault(
        record["epoch"], read_checkpoint(tmp_path / "last.pt").state_dict["model.9.cv1.conv.weight"]
    )
    trainer.fit()
    assert torch.equal(weights[3], weights[epoch])
    assert not torch.equal(weights[1], weights[2])


def test_ranges_are_found_on_the_calibration_images_before_the_first_step(
    tiny_trainer, tiny_data, scripted, recipe_text, digits
):
    scripted(0.5)
    images = make_loader(digits.splits["train"][8:14], 10, imgsz=64, batch_size=4, train=False)
    variables = {"num_epochs": 2, "quantization_epochs": 1, "observer_share": 0.0, **STANDSTILL}
    trainer = tiny_trainer(recipe_text, variables)
    trainer._data = replace(tiny_data, calibration=images)
    result = trainer.fit()
    model = YOLOv5("n", 10)
    model.load_state_dict(read_checkpoint(result.best["pruned"]).state_dict)
    Recipe(recipe_text, variables).apply_structure(model.to(memory_format=torch.channels_last))
    calibrate(model, (as_input(batch.images, torch.channels_last) for batch in images))
    found, expected = quantizers(trainer.model), quantizers(model)
    assert len(expected) > 100
    for name, quantizer in expected.items():
        assert torch.equal(found[name].scale, quantizer.scale), name


DETERMINED = ("phase", "epoch", "loss/box", "loss/obj", "loss/cls", "lr", "val/map50", "val/map50_95")


def test_the_same_seed_gives_the_same_run_bit_for_bit(tiny_run, train_tiny, recipe_text):
    variables = {"num_epochs": 3, "quantization_epochs": 1.5, "warmup_epochs": 0.5}
    again = train_tiny(recipe_text, variables)
    for first, second in zip(tiny_run.history, again.history, strict=True):
        assert {k: first[k] for k in DETERMINED} == {k: second[k] for k in DETERMINED}
    one, two = (read_checkpoint(run.weights / "last.pt").state_dict for run in (tiny_run, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("warmup", "factors"),
    [
        (1.5, [0.75 / 1.5, 0.05 + 0.95 * 0.5]),  # last steps at epochs 0.75 and 1.75 of 2
        (0.0, [0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2 for share in (0.375, 0.875)]),
    ],
)
def test_without_a_rate_in_the_recipe_the_trainer_warms_up_and_follows_a_cosine(train_tiny, warmup, factors):
    run = train_tiny(ONLY_EPOCHS.format(2.0), sparsity=0.0, lr=0.002, warmup=warmup)
    assert [r["lr"] for r in run.history] == pytest.approx([0.002 * factor for factor in factors])
    assert [r["phase"] for r in run.history] == ["dense", "dense"]


def test_averaging_starts_short_and_ends_at_the_decay():
    weights = [4.0, 2.0, -1.0, 0.5, 3.0]
    source = nn.Linear(1, 1, bias=False)
    nn.init.constant_(source.weight, 9.0)
    averaged = AveragedModel(source, multi_avg_fn=exponential(0.3))
    wanted = None
    for count, weight in enumerate(weights):
        nn.init.constant_(source.weight, weight)
        averaged.update_parameters(source)
        decay = min(0.3, (1 + count) / (10 + count))  # 1/10, 2/11, 3/12, then 0.3 instead of 4/13
        wanted = weight if wanted is None else decay * wanted + (1 - decay) * weight
        assert averaged.module.weight.item() == pytest.approx(wanted, rel=1e-6)


def test_averaging_takes_statistics_along_and_copies_counters():
    source = nn.BatchNorm2d(1)
    averaged = AveragedModel(source, multi_avg_fn=exponential(0.5), use_buffers=True)
    for mean, count in ((2.0, 7), (4.0, 8)):
        source.running_mean.fill_(mean)
        source.num_batches_tracked.fill_(count)
        averaged.update_parameters(source)
    decay = 2 / 11
    assert averaged.module.running_mean.item() == pytest.approx(decay * 2 + (1 - decay) * 4)
    assert averaged.module.num_batches_tracked.item() == 8


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_become_floats_in_0_to_1_and_the_batch_stays(memory_format):
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    kept = images.clone()
    floats = as_input(images, memory_format)
    torch.testing.assert_close(floats, kept.float() / 255)
    assert floats.dtype == torch.float32
    assert floats.is_contiguous(memory_format=memory_format)
    assert torch.equal(images, kept)


def test_evaluation_changes_nothing_in_a_model_that_still_observes(tiny_run, recipe_text):
    """The validation images must not move the quantization ranges."""
    model = YOLOv5("n", 10)
    Recipe(recipe_text).apply_structure(model)
    model.load_state_dict(read_checkpoint(tiny_run.weights / "last.pt").state_dict)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tiny_run.trainer._data.val.evaluate_model(model)
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert model.training


@pytest.mark.parametrize(
    ("precision", "has_bf16", "autocast"),
    [("auto", True, True), ("auto", False, False), ("bf16", False, True), ("fp32", True, False)],
)
@pytest.mark.parametrize(("layout", "last"), [("auto", True), ("on", True), ("off", False)])
def test_precision_follows_the_configuration_and_the_host(precision, has_bf16, autocast, layout, last):
    chosen = choose_precision(TrainerConfig(precision=precision, channels_last=layout), has_bf16=has_bf16)
    assert chosen == Precision(autocast=autocast, channels_last=last)
    assert ("bf16" in str(chosen)) is autocast
    assert ("channels_last" in str(chosen)) is last
    assert (chosen.memory_format is torch.channels_last) is last


def test_a_phase_shorter_than_a_step_is_refused_before_training(train_tiny, recipe_text):
    variables = {"num_epochs": 2, "quantization_epochs": 0.05, "warmup_epochs": 0.5}
    with pytest.raises(RecipeError, match=r"phase pruned_quant to be at least one step"):
        train_tiny(recipe_text, variables)

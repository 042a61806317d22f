"""Batch and length that follow from the data, held against what they are for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from sparse_exp.config.places import register_schema
from sparse_exp.config.plain import CONF_DIRECTORY, as_dict, recipe_path
from sparse_exp.config.schema import SIZES, Experiment
from sparse_exp.data import DetectionDataset
from sparse_exp.planning import rules, trial
from sparse_exp.planning.dry_run import show
from sparse_exp.planning.rules import Settled, batch_for, epochs_for, length_is_open, settle
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.resolve import resolve
from sparse_exp.training.precision import Precision

CPU, FP32 = torch.device("cpu"), Precision(autocast=False, channels_last=True)
TREES = 108  # images of its training split
# Of trainer, as version 0.2 trained the embedded data before batch and length had rules.
TRAINER = {
    "batch_size": 4, "lr": 0.001, "warmup": 0.5, "weight_decay": 0.0005, "max_grad_norm": 10.0,
    "ema_decay": 0.9999, "freeze": [], "precision": "auto", "channels_last": "auto", "momentum": 0.937,
    "monitor": "fitness", "patience": None, "quantize_from": "best", "val_batch_size": 8, "val_every": 1,
    "devices": 1, "threads": None,
    "loss": {"box": 0.05, "obj": 1.0, "cls": 0.5, "anchor_t": 4.0},
    "conf": 0.001, "iou": 0.6, "max_det": 300,
    "augment": {
        "mosaic": 0.5, "scale": 0.3, "translate": 0.1, "fliplr": 0.5, "flipud": 0.0, "transpose": 0.0,
        "jitter": 0.8, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.02,
    },
}  # fmt: skip
EPOCHS = {"n": 12, "s": 12, "m": 10, "l": 8, "x": 8}
TRAINED = ("dense", "distill", "prune", "prune_quant", "quant", "slim", "transfer", "transfer_quant")


@pytest.fixture
def composed():
    register_schema()

    def composed_of(*words: str) -> Experiment:
        with initialize_config_dir(str(CONF_DIRECTORY), version_base="1.3"):
            return resolve(compose("config", overrides=["sweep.name=x", *words]))

    return composed_of


def data_of(images: int) -> DetectionDataset:
    return DetectionDataset("x", Path(), ("tree",), {"train": (None,) * images, "val": ()}, "digest")


def settled(experiment: Experiment, images: int, device: torch.device = CPU) -> Settled:
    recipe = Recipe.from_file(recipe_path(experiment.recipe.file), experiment.recipe.variables)
    return settle(experiment, recipe, data_of(images), FP32, device)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", TRAINED)
def test_the_embedded_data_are_trained_as_before(composed, size, recipe):
    asked = composed(f"model=yolov5{size}", f"recipe={recipe}")
    found = settled(asked, TREES).applied(asked)
    trainer = as_dict(found)["trainer"]
    assert {key: trainer[key] for key in TRAINER if key != "augment"} == {
        key: value for key, value in TRAINER.items() if key != "augment"
    }
    assert {key: trainer["augment"][key] for key in TRAINER["augment"]} == TRAINER["augment"]
    path, before = recipe_path(asked.recipe.file), {**asked.recipe.variables, "num_epochs": EPOCHS[size]}
    assert Recipe.from_file(path, found.recipe.variables).text == Recipe.from_file(path, before).text


@given(images=st.integers(0, 10**6), most=st.sampled_from([16, 64]), devices=st.integers(1, 9))
def test_a_batch_is_shared_equally_and_leaves_enough_steps(images, most, devices):
    size = batch_for(images, most, devices)
    assert size % devices == 0
    assert size >= 4
    least = next(devices * 2**n for n in range(3) if devices * 2**n >= 4)
    assert size == least or (size <= most and math.ceil(images / size) >= 4 * size)
    larger = 2 * size
    assert larger > most or images / larger < 4 * larger


@pytest.mark.parametrize(
    ("images", "cpu", "gpu"),
    [(24, 4, 4), (TREES, 4, 4), (500, 8, 8), (2000, 16, 16), (5000, 16, 32), (50000, 16, 64)],
)
def test_thousands_of_images_have_larger_batches(images, cpu, gpu):
    assert (batch_for(images, 16), batch_for(images, 64)) == (cpu, gpu)


@given(images=st.integers(129, 10**6), most=st.sampled_from([8.0, 10.0, 12.0]))
def test_a_large_set_has_fewer_epochs_and_no_fewer_steps(images, most):
    epochs = epochs_for(images, most)
    assert 5 <= epochs <= most
    assert epochs == round(epochs)
    small = most * math.ceil(80 / batch_for(80, 16))
    assert epochs * math.ceil(images / batch_for(images, 16)) >= small
    assert epochs_for(4 * images, most) <= epochs


@pytest.mark.parametrize(("images", "epochs"), [(1, 12), (128, 12), (512, 6), (513, 6), (800, 5), (50000, 5)])
def test_epochs_go_down_with_the_root_of_the_images(images, epochs):
    assert epochs_for(images, 12.0) == epochs
    assert epochs_for(images, 2.0) == 2.0  # who wants fewer gets them


@pytest.mark.parametrize(
    "words",
    [
        ["recipe.variables.num_epochs=30"],
        ["model.num_epochs=30"],
        ["recipe.num_epochs=30"],
        ["recipe=published/transfer_pruned"],
        ["recipe=oneshot"],
    ],
)
def test_a_length_that_is_given_stays(composed, words):
    asked = composed(*words, "trainer.batch_size=2")
    assert not length_is_open(asked)
    found = settled(asked, 5000)
    assert found == Settled()
    assert found.applied(asked) == asked


def test_a_recipe_of_ones_own_keeps_its_length(composed, tmp_path):
    own = tmp_path / "own.md"
    own.write_text(recipe_path("transfer_quant.md").read_text().replace("num_epochs: 12.0", "num_epochs: 40"))
    asked = composed(f"recipe.file={own}", "trainer.batch_size=2")
    found = settled(asked, 5000)
    assert found == Settled()
    assert Recipe.from_file(own, found.applied(asked).recipe.variables).epochs == 40


@pytest.fixture
def memory(monkeypatch):
    """A function that lets each image of a step need so many bytes of those that are free."""
    monkeypatch.setattr(rules, "training_batch", lambda *_: None)
    rig = SimpleNamespace(enter=lambda **_: None, device=CPU)
    monkeypatch.setattr(trial, "_Rig", lambda *_: rig)
    monkeypatch.setattr(trial, "_first", lambda _, count: count)

    def needing(each: float, free: float, most: float = math.inf) -> None:
        monkeypatch.setattr(trial, "free_bytes", lambda _: free)
        monkeypatch.setattr(trial, "_bytes_per_image", lambda _, images: each if images <= most else None)

    return needing


@pytest.mark.parametrize(
    ("each", "free", "most", "wanted"),
    [
        (1.0, 100.0, 64, 16),
        (10.0, 100.0, 64, 8),
        (30.0, 100.0, 64, 4),
        (0.0, 0.0, 64, 16),
        (1.0, 100.0, 8, 8),
    ],
)
def test_the_batch_fits_into_memory(composed, memory, each, free, most, wanted):
    memory(each, free, most)
    found = settled(composed("trainer.devices=2"), 5000)
    assert found.batch_size == wanted
    assert ("would not fit into memory" in found.why["batch"]) == (wanted < 16)


def test_a_small_set_needs_no_trial_and_a_gpu_takes_more(composed, memory, monkeypatch):
    memory(1.0, 100.0)
    assert settled(composed(), 50000, torch.device("cuda", 1)).batch_size == 64
    monkeypatch.setattr(rules, "images_that_fit", None)
    assert settled(composed(), TREES).batch_size == 4


def test_rule_and_result_are_one_line_each(composed, memory):
    memory(1.0, 100.0)
    found = settled(composed(), 5000)
    assert found.why == {
        "length": "5 epochs, of at most 12, by the root of 128 in 5000 training images, at least 5 "
        "(model.num_epochs=null)",
        "batch": "16 images, 313 steps an epoch (trainer.batch_size=auto)",
    }
    assert Settled.of(found.as_data()) == found


def test_what_is_recorded_fills_only_what_is_open(composed):
    kept = Settled(8, 6.0)
    given_later = composed("trainer.batch_size=2")
    found = kept.applied(given_later)
    assert (found.trainer.batch_size, found.recipe.variables["num_epochs"]) == (2, 6.0)
    assert replace(found, recipe=given_later.recipe) == given_later


def test_a_dry_run_without_the_data_says_what_they_will_decide(composed, tmp_path, caplog):
    asked = composed("model=yolov5n", "dataset=coco128", f"paths.cache={tmp_path}", f"paths.zoo={tmp_path}")
    recipe = Recipe.from_file(recipe_path(asked.recipe.file), asked.recipe.variables)
    with caplog.at_level("INFO", logger="sparse_exp"):
        show(asked, recipe, read_recipe=lambda _: recipe)
    said = " ".join(caplog.text.split())
    assert "batch and length: follow from the training images, once they are on this machine" in said


def test_a_length_of_the_model_is_taken_where_a_record_no_longer_refers_to_it(composed):
    asked = composed("trainer.batch_size=2")
    asked.model.num_epochs = 7.0
    assert settled(asked, 5000) == Settled(None, 7.0, {"length": "7 epochs, model.num_epochs"})

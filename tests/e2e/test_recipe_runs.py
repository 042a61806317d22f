"""Each shipped recipe trains a tiny detector, with the zeros and the learning rates it asks for."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path

import pytest
import torch

from sparse_exp import cli
from sparse_exp.data.digits import materialize
from sparse_exp.quantization.quantizers import is_quantized
from sparse_exp.sparsity.prune import prune_by_magnitude
from sparse_exp.yolov5 import YOLOv5, read_checkpoint, save_checkpoint

TARGETS = dict(
    zip(("1 2", "3 4 14 17 18", "5 6 10 13 20 21", "7 8 9 23"), (0.21, 0.27, 0.35, 0.40), strict=True)
)
STEPS = 4  # of an epoch: 16 images in batches of 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return materialize(tmp_path_factory.mktemp("data") / "digits", imgsz=64, train=16, val=4, test=0)


def write_start(path: Path, sparsity: float) -> Path:
    torch.manual_seed(0)
    model = YOLOv5("n", 10)
    prune_by_magnitude(model.prunable_convolutions(), sparsity)
    save_checkpoint(
        path,
        model_state=model.state_dict(),
        size="n",
        num_classes=10,
        names=[str(digit) for digit in range(10)],
        imgsz=64,
        recipe="",
        phase="dense",
        epoch=0.0,
        metrics={},
    )
    return path


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("starts")
    return {
        "dense": write_start(folder / "dense.pt", 0.0),
        "pruned": write_start(folder / "pruned.pt", 0.6),
    }


@pytest.fixture
def train(data, tmp_path, monkeypatch):
    """Calls the command line up to the training; returns the history and the checkpoint that goes on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(tmp_path / "cache"))
    logger = logging.getLogger("sparse_exp")
    state = logger.handlers[:], logger.propagate, logger.level

    def call(*words: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
        common = [
            "model=yolov5n",
            "dataset=custom",
            f"dataset.path={data}",
            "dataset.imgsz=64",
            "tracker=none",
        ]
        common += ["trainer.batch_size=4", "stages=[fetch,plan,train]", "paths.run=run"]
        monkeypatch.setattr(sys, "argv", ["sparse-exp", *common, *words])
        cli.main()
        run = tmp_path / "run"
        manifest = json.loads((run / "manifest.json").read_text())
        checkpoint = read_checkpoint(run / manifest["stages"]["train"]["facts"]["checkpoint"])
        return json.loads((run / "history.json").read_text()), checkpoint.state_dict

    yield call
    logger.handlers[:], logger.propagate = state[0], state[1]
    logger.setLevel(state[2])


def weights_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convolution weights by their names."""
    return {name: value for name, value in state.items() if value.ndim == 4 and name.endswith("weight")}


def zeros(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())


def cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def rates(history: list[dict]) -> list[tuple[str, float, float]]:
    return [(record["phase"], record["epoch"], record["lr"]) for record in history]


# What the published schedules come to in as many epochs as they have phases, but two at least: (phase,
# end of the stretch, rate of its last step). The steps of an epoch are at 0, 0.25, 0.5 and 0.75 of it, so
# that the last one of a stretch is a quarter before its end.
WARM = 2 / 50  # of the phase before QAT: two epochs of fifty
PUBLISHED = {
    "transfer_pruned": [
        ("pruned", 1.0, cosine(0.0032, 0.000384, (0.75 - 2 * WARM) / (2 - 2 * WARM))),
        ("pruned", 2.0, cosine(0.0032, 0.000384, (1.75 - 2 * WARM) / (2 - 2 * WARM))),
    ],
    "transfer_pruned_quant": [
        ("pruned", 1.0, cosine(0.0032, 0.000384, (0.75 - WARM) / (1 - WARM))),
        ("pruned_quant", 2.0, 2e-6),
    ],
    "transfer_pruned_quant_v1_1": [
        ("pruned", 1.0, 0.01),  # the trainer's, as it is given below
        ("pruned_quant", 2.0, cosine(1e-5, 1e-9, 0.75)),
    ],
    "prune_quant": [
        ("pruning", 1.0, 0.05),
        ("pruned", 2.0, cosine(0.05, 0.001, 0.75)),
        ("pruned_quant", 3.0, 1e-5),
    ],
}


@pytest.mark.parametrize(
    "name",
    [
        "transfer_pruned",
        *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED if name != "transfer_pruned"),
    ],
)
def test_published_sets_give_the_masks_and_rates_of_the_file(train, starts, name):
    start = starts["dense" if name == "prune_quant" else "pruned"]
    epochs = f"recipe.num_epochs={PUBLISHED[name][-1][1]}"
    history, state = train(f"recipe=published/{name}", f"model.weights={start}", epochs, "trainer.lr=0.01")
    assert rates(history) == [(phase, end, pytest.approx(rate)) for phase, end, rate in PUBLISHED[name]]
    before, after = weights_of(read_checkpoint(start).state_dict), weights_of(state)
    assert set(after) == set(before)
    for layer, weight in after.items():
        if name == "prune_quant":  # every convolution, to 80 %
            assert zeros(weight) == pytest.approx(0.8, abs=1.5 / weight.numel()), layer
        else:
            assert torch.equal(weight == 0, before[layer] == 0), layer
            assert not torch.equal(weight, before[layer])


EXPECTED = {  # phases at two epochs
    "dense": ["dense"],
    "transfer": ["pruned"],
    "transfer_quant": ["pruned", "pruned_quant"],
    "transfer_quant_vnni": ["pruned", "pruned_quant"],
    "prune": ["pruning", "pruned"],
    "prune_quant": ["pruning", "pruned", "pruned_quant"],
    "quant": ["dense", "dense_quant"],
    "distill": ["pruned", "pruned_quant"],
    "distill_layers": ["pruned", "pruned_quant"],
}


@pytest.mark.parametrize(
    "name", ["prune", *(pytest.param(n, marks=pytest.mark.slow) for n in EXPECTED if n != "prune")]
)
def test_each_recipe_trains_through_its_phases(train, starts, name):
    teacher = [f"recipe.teacher={starts['dense']}"] if name.startswith("distill") else []
    words = [f"recipe={name}", "recipe.variables.num_epochs=2", f"model.weights={starts['dense']}", *teacher]
    history, state = train(*words)
    assert list(dict.fromkeys(record["phase"] for record in history)) == EXPECTED[name]
    assert history[-1]["epoch"] == 2.0
    assert all(math.isfinite(record["loss/box"]) for record in history)
    assert is_quantized(list(state)) == EXPECTED[name][-1].endswith("_quant")
    check_zeros(name, weights_of(state))
    if teacher:
        assert "loss/distill" in history[0]


def check_zeros(name: str, weights: dict[str, torch.Tensor]) -> None:
    inner = {layer: w for layer, w in weights.items() if layer.split(".")[1] not in ("0", "24")}
    if name.startswith("prune"):
        for layer, weight in inner.items():
            target = next(t for blocks, t in TARGETS.items() if layer.split(".")[1] in blocks.split())
            assert zeros(weight) == pytest.approx(target, abs=1.5 / weight.numel()), layer
    elif name in ("dense", "quant"):
        assert sum(zeros(weight) for weight in inner.values()) < 0.01
    else:  # the whole is pruned to yolov5n's 40 %
        total = sum(weight.numel() for weight in inner.values())
        assert sum(zeros(w) * w.numel() for w in inner.values()) / total == pytest.approx(0.4, abs=1e-3)
    if name == "transfer_quant_vnni":
        for layer, weight in inner.items():
            if weight.shape[1] % 4 == 0:
                blocks = (weight == 0).unflatten(1, (-1, 4)).float().mean(2)
                assert set(blocks.unique().tolist()) <= {0.0, 1.0}, layer


@pytest.mark.slow
def test_one_shot_trains_nothing(train, starts):
    history, state = train(
        "recipe=oneshot", f"model.weights={starts['dense']}", "recipe.calibration_images=8"
    )
    assert [(record["phase"], record["epoch"]) for record in history] == [("pruned_quant", 0.0)]
    before, after = weights_of(read_checkpoint(starts["dense"]).state_dict), weights_of(state)
    shares = {"1": 0.2, "2": 0.2, "4": 0.3, "6": 0.4, "8": 0.5, "23": 0.5}
    for layer, weight in after.items():
        kept = weight != 0
        assert torch.equal(weight[kept], before[layer][kept])  # what is not pruned is as it was
        if layer.split(".")[1] in shares:
            assert zeros(weight) == pytest.approx(shares[layer.split(".")[1]], abs=1.5 / weight.numel())

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch

from sparse_exp.benchmark.layer_times import SPARSITIES
from sparse_exp.config.plain import recipe_path
from sparse_exp.config.schema import Experiment, HardwareConfig, ModelConfig, RecipeConfig
from sparse_exp.errors import ConfigError
from sparse_exp.planning import speed
from sparse_exp.planning.plan import make_plan
from sparse_exp.planning.show import as_facts, labelled_lines, pruning_sentence
from sparse_exp.planning.speed import SpeedShares, choose, layer_harms, shape_of, speed_shares, table_of
from sparse_exp.recipes.distillation import detection_distillation
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sparsity.measure import layer_sparsity
from sparse_exp.stages.training import _prepare
from sparse_exp.training.precision import Precision
from sparse_exp.training.start import Start, prune_start
from sparse_exp.yolov5 import YOLOv5

TRANSFER = Recipe.from_file(recipe_path("transfer.md"), {})


def experiment(speedup: float = 1.5, engine: str = "mnn", **recipe) -> Experiment:
    return Experiment(
        name="x",
        model=ModelConfig(name="yolov5n", size="n", speedup=speedup),
        recipe=RecipeConfig(name="r", file="r.md", shares="speed", **recipe),
        hardware=HardwareConfig(name="cpu", engines=[engine], cores=[1], batch_sizes=[4, 1]),
    )


@pytest.fixture(scope="module")
def model() -> YOLOv5:
    torch.manual_seed(0)
    return YOLOv5("n", 1)


def test_shapes_are_those_of_the_maps_that_layers_read(model):
    seen = {}
    convolutions = model.prunable_convolutions()
    hooks = [
        conv.register_forward_hook(lambda _, given, __, name=name: seen.update({name: given[0].shape}))
        for name, conv in convolutions.items()
    ]
    model.eval()(torch.zeros(1, 3, 96, 160))
    for hook in hooks:
        hook.remove()
    for name, conv in convolutions.items():
        shape = shape_of(name, conv, (96, 160))
        assert (shape.inputs, shape.height, shape.width) == tuple(seen[name][1:])
        assert shape.kernel[0] // 2 == conv.padding[0]
        assert shape.outputs == conv.out_channels


@pytest.mark.slow
def test_harm_is_what_the_predictions_lose_by_one_layer_alone(model, monkeypatch):
    monkeypatch.setattr(speed, "SPARSITIES", (0.0, 0.5, 0.95))
    before = copy.deepcopy(model.state_dict())
    batches = [torch.rand(1, 3, 64, 64), torch.rand(2, 3, 64, 64)]
    model.train()
    harms = layer_harms(model, batches)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(harms) == list(model.prunable_convolutions())
    for harm in harms.values():
        assert harm[0] == 0.0
        assert harm == sorted(harm)
    name = "model.3.conv"
    pruned = copy.deepcopy(model).eval()
    weight = pruned.get_submodule(name).weight.data
    weight[weight.abs() <= weight.abs().flatten().quantile(0.95)] = 0.0
    with torch.no_grad():
        lost = [
            float(detection_distillation(pruned(b)[1], copy.deepcopy(model).eval()(b)[1], 1.0))
            for b in batches
        ]
    assert harms[name][2] == pytest.approx(max(harms[name][1], sum(lost) / 3), rel=1e-2)


def test_the_part_that_is_not_pruned_takes_its_time_all_the_same():
    times, harms = [[4.0, 2.0, 1.0], [3.0, 3.0, 1.0]], [[0.0, 1.0, 5.0], [0.0, 1.0, 2.0]]
    chosen, left = choose(10.0, times, harms, experiment(10 / 8.01))
    assert (chosen, left) == ([1, 0], 8.0)  # 3 of the rest, 2 and 3
    chosen, left = choose(10.0, times, harms, experiment(2.0))
    assert (chosen, left) == ([2, 2], 5.0)
    assert choose(10.0, times, harms, experiment(1.0)) == ([0, 0], 10.0)
    with pytest.raises(
        ConfigError, match=r"at most 2\.00 for yolov5n at 640 px in mnn, but got 2\.01"
    ) as error:
        choose(10.0, times, harms, experiment(2.01))
    assert "\n" not in str(error.value)


def test_layers_that_are_slower_alone_are_not_all_of_the_network():
    times, harms = [[8.0, 4.0], [8.0, 4.0]], [[0.0, 1.0], [0.0, 2.0]]
    chosen, left = choose(8.0, times, harms, experiment(4 / 3))
    assert (chosen, left) == ([1, 0], 6.0)


def test_the_first_engine_and_its_first_load_are_measured():
    table = table_of(experiment(pattern="block4"), quantized=False)
    assert (table.engine, table.batch_size, table.cores, table.block) == ("mnn", 4, 1, (1, 4))


def test_an_engine_that_is_left_on_this_host_and_skips_no_zeros_is_refused(model):
    with pytest.raises(ConfigError, match="skips zeros, but got 'onnxruntime'"):
        speed_shares(model, experiment(engine="onnxruntime"), TRANSFER, None)


def planned(model: YOLOv5) -> tuple[dict[str, float], dict]:
    """Shares of zeros, and the facts of the plan of a network that was pruned to them."""
    asked, pruned = experiment(), copy.deepcopy(model)
    names = list(model.prunable_convolutions())
    shares = {name: SPARSITIES[number % len(SPARSITIES)] for number, name in enumerate(names)}
    prune_start(pruned, 0.75, asked.recipe, shares=shares)
    precision = Precision(autocast=False, channels_last=True)
    found = SpeedShares(shares, "mnn 3.6.1", "fp32, batch 4, 1 core", 30.0, 20.0)
    plan = make_plan(asked, TRANSFER, Start("somewhere", 0.0), precision, pruned, found)
    assert labelled_lines(plan)["speed-up"].startswith("1.50 times as fast as dense is predicted: 20.0 inst")
    assert "zeros that make the network 1.5 times as fast as dense in mnn" in pruning_sentence(plan)
    return shares, as_facts(plan)


def test_the_training_prunes_to_what_the_plan_says(model):
    shares, facts = planned(model)
    assert facts["shares"] == shares
    trained = copy.deepcopy(model)
    context = SimpleNamespace(
        facts=lambda stage: facts,
        experiment=experiment(),
        recipe=TRANSFER,
        planned_sparsity=facts["sparsity"],
    )
    _prepare(context, trained)
    found = {layer.name: layer.sparsity for layer in layer_sparsity(trained.prunable_convolutions())}
    assert found == facts["layers"]
    assert found == pytest.approx(shares, abs=4 / 256)


def test_a_start_that_is_not_here_yet_promises_no_sparsity(model):
    precision = Precision(autocast=False, channels_last=True)
    plan = make_plan(experiment(), TRANSFER, Start("somewhere", None), precision, model)
    assert [phase.sparsity for phase in plan.phases] == [None]
    assert re.match("Should it be dense: .* 1.5 times as fast", pruning_sentence(plan))
    sparse = make_plan(experiment(), TRANSFER, Start("somewhere", 0.8), precision, model)
    assert "model.speedup=1.5 is not used: the start checkpoint is pruned already." in sparse.warnings

from __future__ import annotations

import pytest

from sparse_exp.config.resolve import recipe_path
from sparse_exp.config.schema import Experiment, HardwareConfig, ModelConfig, RecipeConfig
from sparse_exp.errors import ConfigError, RecipeError
from sparse_exp.plan import SPARSE_FROM, Start, check_host, make_plan, render
from sparse_exp.report.console import show_plan
from sparse_exp.sparsity.recipe import Recipe
from sparse_exp.training.precision import Precision

FP32 = Precision(autocast=False, channels_last=True)
BF16 = Precision(autocast=True, channels_last=True)


def experiment(*, prune_dense_start: bool = True) -> Experiment:
    result = Experiment(
        name="x",
        model=ModelConfig(name="yolov5l", size="l", sparsity=0.9),
        recipe=RecipeConfig(name="r", file="r.md", prune_dense_start=prune_dense_start),
    )
    result.dataset.name = "trees"
    return result


def recipe(name: str, **variables: float) -> Recipe:
    return Recipe.from_file(recipe_path(f"{name}.md"), variables)


def plan(name: str = "transfer_quant", start: Start | None = None, precision: Precision = FP32, **options):
    start = start or Start("somewhere", 0.0)
    lengths = {"num_epochs": 10, **({"quantization_epochs": 3} if name == "transfer_quant" else {})}
    return make_plan(experiment(**options), recipe(name, **lengths), start, precision)


def test_a_dense_start_is_pruned_to_the_models_sparsity():
    laid_out = plan()
    assert laid_out.prune_to == 0.9
    assert "dense" in laid_out.pruning
    assert "90%" in laid_out.pruning
    assert "before epoch 0" in laid_out.pruning


def test_a_sparse_start_is_left_as_it_is():
    laid_out = plan(start=Start("zoo", 0.65))
    assert laid_out.prune_to is None
    assert laid_out.pruning == ""
    assert [row["sparsity"] for row in laid_out.phases] == ["65.0%", "65.0%"]


@pytest.mark.parametrize(("share", "pruned"), [(SPARSE_FROM, False), (SPARSE_FROM - 0.001, True)])
def test_from_where_a_start_counts_as_sparse(share, pruned):
    assert (plan(start=Start("zoo", share)).prune_to is not None) is pruned


def test_a_dense_recipe_prunes_nothing():
    laid_out = plan("dense")
    assert laid_out.prune_to is None
    assert [(row["phase"], row["sparsity"]) for row in laid_out.phases] == [("dense", "0.0%")]


def test_a_transfer_that_would_stay_dense_is_refused():
    with pytest.raises(RecipeError) as raised:
        plan("transfer", prune_dense_start=False)
    message = str(raised.value)
    assert "would stay dense" in message
    assert "model.weights=PATH" in message
    assert "recipe.prune_dense_start=true" in message
    assert "\n" not in message
    assert plan("transfer", Start("zoo", 0.75), prune_dense_start=False).prune_to is None


def test_an_unknown_start_is_not_called_dense():
    laid_out = plan(start=Start("somewhere (to be fetched)", None))
    assert laid_out.prune_to == 0.9
    assert laid_out.pruning.startswith("Should it be dense")
    without = plan(start=Start("somewhere (to be fetched)", None), prune_dense_start=False)
    assert without.prune_to is None
    assert {row["sparsity"] for row in without.phases} == {"that of the start"}


def test_a_second_quantization_is_refused():
    start = Start("best_pruned_quant.pt", 0.75, quantized=True)
    with pytest.raises(RecipeError, match="quantized already") as raised:
        plan("transfer_quant", start)
    assert "best_pruned.pt" in str(raised.value)


def test_the_phases_with_what_holds_in_each():
    first, second = plan(precision=BF16).phases
    assert first == {
        "phase": "pruned",
        "epochs": "0 to 7",  # of 10 epochs the last 3 are QAT
        "learning rate": first["learning rate"],
        "EMA": "on",
        "precision": "bf16 autocast, channels_last",
        "sparsity": "90.0%",
    }
    assert second["epochs"] == "7 to 10"
    warm_up, cosine = (tuple(map(float, part.split(" to "))) for part in first["learning rate"].split(", "))
    assert warm_up[0] < warm_up[1] == cosine[0] > cosine[1]
    assert float(second["learning rate"].split(" to ")[0]) < cosine[0]
    assert second["EMA"] == "off"
    assert "bf16" not in second["precision"]


def test_the_facts_name_origin_data_and_engines():
    facts = plan(start=Start("https://x/y.pt", 0.0)).facts
    assert facts["model"] == "yolov5l from https://x/y.pt"
    assert "trees" in facts["data"]
    assert facts["recipe"] == "transfer_quant.md, 10 epochs of batch 8"
    assert facts["engines"] == "deepsparse, onnxruntime, openvino"
    assert facts["stages"].startswith("fetch -> plan -> train")


def test_what_is_printed_holds_everything(caplog):
    laid_out = plan()
    with caplog.at_level("INFO", logger="sparse_exp"):
        show_plan(laid_out)
    (text,) = [record.getMessage() for record in caplog.records]
    assert len(render(laid_out)) == len(laid_out.facts) + 2  # the pruning sentence and the table
    for row in laid_out.phases:
        assert all(value in text for value in row.values())
    for label, value in laid_out.facts.items():
        assert f"{label}: {value}" in " ".join(text.split())


def test_host_is_checked_only_for_stages_that_use_engines(monkeypatch):
    from sparse_exp import hardware

    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    checked = Experiment(hardware=HardwareConfig(name="cpu", engines=["openvino", "onnxruntime"]))
    with pytest.raises(ConfigError) as raised:
        check_host(checked)
    assert len(raised.value.problems) == 2  # both at once
    assert all("pip install" in problem for problem in raised.value.problems)
    checked.stages = ["fetch", "plan", "train", "evaluate", "export"]
    check_host(checked)

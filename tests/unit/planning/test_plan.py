from __future__ import annotations

import copy
import re

import pytest
import torch

from sparse_exp.config.plain import recipe_path
from sparse_exp.config.schema import Experiment, HardwareConfig, ModelConfig, RecipeConfig, TrainerConfig
from sparse_exp.errors import ConfigError, RecipeError
from sparse_exp.hardware.targets import fit_to_host
from sparse_exp.planning.dry_run import show
from sparse_exp.planning.plan import Data, make_plan, with_anchors, with_mismatch, with_trial
from sparse_exp.planning.show import (
    as_facts,
    duration,
    labelled_lines,
    phase_rows,
    pruning_sentence,
    render,
    show_plan,
)
from sparse_exp.planning.trial import Trial
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sparsity.measure import SPARSE_FROM, layer_sparsity, overall, work_sparsity
from sparse_exp.sparsity.prune import BLOCKS, prune_by_magnitude, prune_layer_adaptively
from sparse_exp.training.precision import Precision
from sparse_exp.training.start import Anchors, Start
from sparse_exp.yolov5 import YOLOv5
from sparse_exp.yolov5.model import output_stride

FP32 = Precision(autocast=False, channels_last=True)
BF16 = Precision(autocast=True, channels_last=True)
DENSE = Start("somewhere", 0.0)
GRADUAL = """modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 10.0
  - !GMPruningModifier
    start_epoch: 2.0
    end_epoch: 6.0
    update_frequency: 0.5
    init_sparsity: 0.05
    final_sparsity: 0.8
    params: [model.7.conv.weight, model.23.cv3.conv.weight]
"""
DISTILLING = """modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 2.0
  - !DistillationModifier
    start_epoch: 0.0
    hardness: 0.5
    temperature: 2.0
"""
NOTHING = "modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: 1.0\n"


def experiment(**recipe_options) -> Experiment:
    result = Experiment(
        name="x",
        model=ModelConfig(name="yolov5n", size="n", sparsity=0.9),
        recipe=RecipeConfig(name="r", file="r.md", **recipe_options),
        trainer=TrainerConfig(batch_size=8, lr=1e-3, warmup=0.5),
    )
    result.dataset.name = "trees"
    return result


def recipe(name: str, **variables: float) -> Recipe:
    return Recipe.from_file(recipe_path(f"{name}.md"), variables)


@pytest.fixture(scope="module")
def dense() -> YOLOv5:
    torch.manual_seed(0)
    return YOLOv5("n", 1)


@pytest.fixture
def sparse() -> YOLOv5:
    """Three quarters of the weights of each layer are 0, one by one."""
    torch.manual_seed(0)
    model = YOLOv5("n", 1)
    prune_by_magnitude(model.prunable_convolutions(), 0.75)
    return model


def late_zeros_plan(plan, dense, stages=None, engines=None):
    """A plan from a start with 90 % zeros in the layers whose maps are small, and none in the others."""
    model = copy.deepcopy(dense)
    late = {n: c for n, c in model.prunable_convolutions().items() if output_stride(n) >= 16}
    prune_by_magnitude(late, 0.9)
    changed = experiment()
    changed.model.sparsity, changed.stages = 0.5, stages or changed.stages
    changed.hardware.engines = engines or changed.hardware.engines
    share = overall(layer_sparsity(model.prunable_convolutions()))
    return make_plan(changed, recipe("transfer_quant"), Start("zoo", share), FP32, model)


@pytest.fixture
def plan(dense):
    """Lays out a run of a shipped recipe, or of the given one, on the given start."""

    def lay_out(name="transfer_quant", start=DENSE, precision=FP32, model=None, chosen=None, **options):
        lengths = {"num_epochs": 10, **({"quantization_epochs": 3} if name == "transfer_quant" else {})}
        used, asked = chosen or recipe(name, **lengths), experiment(**options)
        if start.is_sparse:
            asked.model.sparsity = start.sparsity
        return make_plan(asked, used, start, precision, model or dense)

    return lay_out


def test_a_dense_start_is_pruned_to_the_models_sparsity(plan):
    laid_out = plan()
    assert laid_out.prune_to == 0.9
    assert "dense" in pruning_sentence(laid_out)
    assert "90%" in pruning_sentence(laid_out)
    assert "before epoch 0" in pruning_sentence(laid_out)
    assert "blocks" not in pruning_sentence(laid_out)
    assert "in blocks of 4 input channels" in pruning_sentence(plan(pattern="block4"))
    assert "in blocks of 8 output channels" in pruning_sentence(plan(pattern="output_block8"))
    assert laid_out.sparsity == laid_out.final_sparsity == pytest.approx(0.9)


def test_when_mosaic_ends(plan):
    assert labelled_lines(plan())["mosaic"].startswith("up to epoch 6, quantization begins after 7 ")
    assert labelled_lines(plan("dense"))["mosaic"].startswith("up to epoch 9, the training ends after 10 ")
    kept = plan("dense")
    kept.experiment.trainer.close_mosaic = 0.0
    assert labelled_lines(kept)["mosaic"] == "until the end (trainer.close_mosaic=0)"
    kept.experiment.trainer.augment.mosaic = 0.0
    assert "mosaic" not in labelled_lines(kept)


def test_the_work_and_what_of_it_meets_zeros(plan, sparse):
    laid_out = plan(start=Start("zoo", 0.75), model=sparse)
    assert laid_out.macs == laid_out.dense_macs == pytest.approx(2.0, rel=0.1)  # published: 4.5 GFLOPs
    assert laid_out.final_work == work_sparsity(layer_sparsity(sparse.quantizable_convolutions()))
    assert f"{laid_out.final_work:.1%} of them meet a zero" in labelled_lines(laid_out)["work"]
    assert as_facts(laid_out)["final_work"] == laid_out.final_work
    unread = plan(start=Start("to be fetched", None))
    assert unread.final_work is None
    assert labelled_lines(unread)["work"].endswith(" G multiplications.")
    assert plan("dense").final_work == 0.0


def test_a_share_of_the_work_takes_the_place_of_a_sparsity(dense):
    asked = experiment(shares="work")
    asked.model.macs = 0.4
    laid_out = make_plan(asked, recipe("transfer"), DENSE, FP32, dense)
    assert "zeros that leave 40% of all work" in pruning_sentence(laid_out)
    assert laid_out.final_work == pytest.approx(0.6, abs=1e-3)
    asked.model.macs = 0.01
    with pytest.raises(ConfigError, match=r"model\.macs to be at least"):
        make_plan(asked, recipe("transfer"), Start("to be fetched", None), FP32, dense)
    (unused,) = make_plan(asked, recipe("dense"), DENSE, FP32, dense).warnings
    assert unused.startswith("model.macs=0.01 is not used: dense.md does not hold the zeros")


def test_how_many_channels_go_and_when(plan):
    laid_out = plan(chosen=recipe("slim", num_epochs=12, channels=0.4), teacher="parent")
    assert 0.35 < laid_out.macs / laid_out.dense_macs <= 0.4
    lines = labelled_lines(laid_out)
    wanted = "taken out; of the work stays 80% from epoch 3, 60% from epoch 4, 40% from epoch 5"
    assert lines["channels"] == wanted
    assert re.search(r"\((3[5-9]|40)% of the .* G of the dense network\)", lines["work"])
    assert laid_out.sizes.onnx_mb < plan("dense").sizes.onnx_mb / 1.5
    assert [row["phase"] for row in phase_rows(laid_out)] == ["dense", "slimming", "slim"]
    (unused,) = plan(chosen=recipe("slim"), teacher="parent", channels=0.3).warnings
    assert unused == "recipe.channels=0.3 is not used: slim.md itself says that 50% of the work stays."


def test_channels_that_cannot_go_are_refused(plan):
    quantized = Start("x.pt", 0.0, quantized=True)
    for name, options in (("slim", {"teacher": "parent"}), ("dense", {"channels": 0.5})):
        with pytest.raises(RecipeError, match=r"\(x\.pt\) is quantized, and channels are taken out") as error:
            plan(name, quantized, chosen=recipe(name), **options)
        assert "\n" not in str(error.value)
    with pytest.raises(
        ConfigError, match=r"the work of yolov5n that stays to be at least 0\.\d\d, but got 0\.01"
    ):
        plan(chosen=recipe("slim", channels=0.01), teacher="parent")
    with pytest.raises(RecipeError, match=r"parent is the network before its first channels go, and r takes"):
        plan(chosen=Recipe(DISTILLING, name="r"), teacher="parent")
    at_once = recipe("slim", dense_epochs=0, warmup_epochs=0.1)
    with pytest.raises(RecipeError, match=r"parent .* takes none out, or at once"):
        plan(chosen=at_once, teacher="parent")
    assert plan(chosen=at_once, teacher="self").slimming[0] == (0.0, pytest.approx(1 - 0.5 / 3))


def test_a_sparse_start_is_left_as_it_is(plan, sparse):
    laid_out = plan(start=Start("zoo", 0.75), model=sparse)
    assert laid_out.prune_to is None
    assert pruning_sentence(laid_out) == ""
    assert [row["sparsity"] for row in phase_rows(laid_out)] == ["75.0%", "75.0%"]
    assert laid_out.layers["model.1.conv"] == 0.75
    assert laid_out.warnings == ()


def test_zeros_that_are_worth_little_on_the_target_are_called_so(plan, sparse, dense):
    [warning] = late_zeros_plan(plan, dense).warnings
    assert re.fullmatch(r"The zeros are 8\d% of the weights, [1-6]\d% of the work: .*", warning)
    assert "deepsparse can skip" in warning
    assert late_zeros_plan(plan, dense, stages=["train"]).warnings == ()  # nothing is measured
    [warning] = late_zeros_plan(plan, dense, engines=["openvino"]).warnings
    assert "none of the target's engines (openvino) skips zeros" in warning
    assert plan("dense").warnings == ()


@pytest.mark.parametrize(("share", "pruned"), [(SPARSE_FROM, False), (SPARSE_FROM - 0.001, True)])
def test_from_where_a_start_counts_as_sparse(plan, share, pruned):
    assert (plan(start=Start("zoo", share)).prune_to is not None) is pruned


def test_a_dense_recipe_prunes_nothing(plan):
    laid_out = plan("dense")
    assert laid_out.prune_to is None
    assert [(row["phase"], row["sparsity"]) for row in phase_rows(laid_out)] == [("dense", "0.0%")]


def test_the_sparsity_of_gradual_pruning_is_that_at_each_phases_end(plan, dense):
    laid_out = plan(chosen=Recipe(GRADUAL))
    weights = {name: conv.weight.numel() for name, conv in dense.prunable_convolutions().items()}
    share = 0.8 * (weights["model.7.conv"] + weights["model.23.cv3.conv"]) / sum(weights.values())
    assert [row["phase"] for row in phase_rows(laid_out)] == ["dense", "pruning", "pruned"]
    assert [row["sparsity"] for row in phase_rows(laid_out)] == ["0.0%", f"{share:.1%}", f"{share:.1%}"]
    assert laid_out.prune_to is None
    assert laid_out.sparsity == 0.0
    assert laid_out.final_sparsity == pytest.approx(share, abs=1e-3)


def test_a_transfer_that_would_stay_dense_is_refused(plan, sparse):
    with pytest.raises(RecipeError) as raised:
        plan("transfer", prune_dense_start=False)
    message = str(raised.value)
    assert "would stay dense" in message
    assert "model.weights=PATH" in message
    assert "recipe.prune_dense_start=true" in message
    assert "\n" not in message
    assert plan("transfer", Start("zoo", 0.75), model=sparse, prune_dense_start=False).prune_to is None


def test_an_unknown_start_is_not_called_dense(plan):
    unknown = Start("somewhere (to be fetched)", None)
    laid_out = plan(start=unknown)
    assert laid_out.prune_to == 0.9
    assert pruning_sentence(laid_out).startswith("Should it be dense")
    assert [row["sparsity"] for row in phase_rows(laid_out)] == ["90.0%", "90.0%"]
    without = plan(start=unknown, prune_dense_start=False)
    assert without.prune_to is None
    assert {row["sparsity"] for row in phase_rows(without)} == {"that of the start"}


@pytest.mark.parametrize("name", ["transfer_quant", "dense"])
def test_a_quantized_start_is_a_float_one_with_its_zeros(plan, sparse, name):
    laid_out = plan(name, Start("best_pruned_quant.pt", 0.75, quantized=True), model=sparse)
    assert laid_out.prune_to is None
    assert laid_out.phases[0].quantized is False


def test_distillation_needs_a_teacher(plan):
    with pytest.raises(RecipeError, match="no teacher") as raised:
        plan(chosen=Recipe(DISTILLING))
    for way in ("recipe.teacher=PATH", "recipe.teacher=self", "recipe.teacher=baseline"):
        assert way in str(raised.value)
    assert labelled_lines(plan(chosen=Recipe(DISTILLING), teacher="self"))["teacher"] == "self"


def test_one_shot_needs_something_to_apply(plan):
    with pytest.raises(RecipeError, match=r"neither prunes nor quantizes.*recipe\.oneshot=false"):
        plan("dense", oneshot=True)


def test_one_shot_is_one_row_without_a_schedule(plan, sparse):
    chosen, start = recipe("oneshot"), Start("mine.pt", 0.75)
    laid_out = plan(chosen=chosen, start=start, model=sparse, oneshot=True, calibration_images=40)
    (row,) = phase_rows(laid_out)
    assert (row["phase"], row["epochs"], row["calibration"]) == ("pruned_quant", "none", "40 images")
    assert "without training" in labelled_lines(laid_out)["recipe"]
    assert "learning rate" not in labelled_lines(laid_out)


def test_what_is_probably_not_meant_is_warned_of(plan, sparse):
    start = Start("zoo", 0.75)
    (lost,) = plan("dense", start, model=sparse).warnings
    assert "75.0% zeros" in lost
    assert "does not hold them" in lost
    (scattered,) = plan("transfer", start, model=sparse, pattern="block4").warnings
    assert "not in blocks of 4" in scattered
    (unused,) = plan("transfer", start, model=sparse, teacher="self").warnings
    assert unused == "recipe.teacher=self is not used: transfer.md does not distill."


@pytest.mark.parametrize("pattern", ["block4", "output_block4", "output_block8"])
def test_zeros_in_blocks_are_seen_as_such(plan, dense, pattern):
    model = YOLOv5("n", 1)
    model.load_state_dict(dense.state_dict())
    prune_layer_adaptively(model.prunable_convolutions(), 0.75, block=BLOCKS[pattern])
    [warning] = plan("transfer", Start("zoo", 0.75), model=model, pattern=pattern).warnings
    assert "block" not in warning  # it is about their work
    other = "block4" if pattern != "block4" else "output_block8"
    scattered, _ = plan("transfer", Start("zoo", 0.75), model=model, pattern=other).warnings
    assert f"recipe.pattern={other}, but" in scattered


def test_the_phases_with_what_holds_in_each(plan):
    first, second = phase_rows(plan(precision=BF16))
    assert first == {
        "phase": "pruned",
        "epochs": "0 to 7",  # of 10 epochs the last 3 are QAT
        "learning rate": first["learning rate"],
        "EMA": "on",
        "precision": "bf16 autocast",
        "batch": "8",
        "sparsity": "90.0%",
    }
    assert second["epochs"] == "7 to 10"
    warm_up, cosine = (tuple(map(float, part.split(" to "))) for part in first["learning rate"].split(", "))
    assert warm_up[0] < warm_up[1] == cosine[0] > cosine[1]
    assert float(second["learning rate"].split(" to ")[0]) < cosine[0]
    assert second["EMA"] == "off"
    assert "bf16" not in second["precision"]


def test_the_facts_name_origin_data_layers_and_engines(plan):
    facts = labelled_lines(
        plan(start=Start("https://x/y.pt", 0.0, left=("model.24.m.0.bias", "b", "c", "d")))
    )
    assert facts["model"] == "yolov5n from https://x/y.pt"
    assert facts["left"] == "4 tensors keep initial class scores: model.24.m.0.bias, b, ... d"
    assert "trees" in facts["data"]
    assert facts["recipe"] == "transfer_quant.md, 10 epochs of batch 8, adamw"
    assert facts["ConstantPruningModifier"].startswith("60 layers: model.0.conv, model.1.conv, ... ")
    assert facts["QuantizationModifier"].startswith("60 layers: ")
    assert facts["engines"] == "deepsparse, onnxruntime, openvino"
    assert facts["stages"].startswith("fetch -> plan -> baseline -> train")
    assert "baseline" not in facts
    assert "left" not in labelled_lines(plan())


def test_what_the_dense_network_costs_is_stated(plan):
    def line(name="transfer_quant", wanted="auto", **options):
        laid_out = plan(name, **options)
        laid_out.experiment.recovery.baseline = wanted
        return labelled_lines(laid_out).get("baseline")

    assert line().startswith("the dense network, found among earlier runs or trained for 10 epochs as well")
    assert line(wanted="runs/dense") == "runs/dense (recovery.baseline)"
    assert line(wanted="none") is None
    assert line("dense") is None  # which is a baseline itself


def test_whose_learning_rate_holds_is_stated(plan):
    ours = labelled_lines(plan())["learning rate"]
    assert "set by the recipe (LearningRateFunctionModifier)" in ours
    assert "trainer.lr=0.001, trainer.warmup=0.5) is not used" in ours
    theirs = plan(chosen=Recipe(NOTHING))
    assert labelled_lines(theirs)["learning rate"].startswith(
        "the trainer's warm-up and cosine (trainer.lr=0.001"
    )
    assert phase_rows(theirs)[0]["learning rate"] == "trainer's"


def test_time_and_batch_come_from_the_trial(plan):
    trial = Trial({"float": 2.0, "quantized": 3.0}, {"float": 0.1, "quantized": 0.2}, {"float": 1500.0}, 3)
    used = recipe("transfer_quant", num_epochs=10, quantization_epochs=2.5)
    timed = with_trial(plan(chosen=used), trial, used, Data(train=32, val=10))
    # 4 steps an epoch: 30 of 2 s, with 8 evaluations (after epochs 1..7, and at 7.5) of 10 images in 0.1 s;
    # then 10 of 3 s, with 3 evaluations (8, 9, 10) in 0.2 s an image
    assert timed.seconds == pytest.approx(30 * 2 + 8 * 1 + 10 * 3 + 3 * 2)
    assert [row["time"] for row in phase_rows(timed)] == ["1 min 8 s", "36 s"]
    assert [row["batch"] for row in phase_rows(timed)] == ["8", "3 x 3"]
    assert labelled_lines(timed)["time"].startswith("about 1 min 44 s of training")
    assert labelled_lines(timed)["memory"] == "at most 1.5 GB (float steps)"
    facts = as_facts(timed)
    assert (facts["qat_split"], facts["estimated_s"]) == (3, timed.seconds)
    assert facts["seconds_per_step"] == {"float": 2.0, "quantized": 3.0}


def test_durations_as_words():
    assert [duration(s) for s in (0.4, 59.4, 59.6, 200, 3600, 7500)] == [
        "0 s", "59 s", "1 min 0 s", "3 min 20 s", "1 h 0 min", "2 h 5 min"
    ]  # fmt: skip


def test_what_is_printed_holds_everything(plan, sparse, caplog, monkeypatch):
    monkeypatch.setattr("sparse_exp.planning.show.console_width", lambda: 100)
    used = recipe("transfer_quant", num_epochs=12)
    laid_out = plan(chosen=used, start=Start("zoo", 0.75), model=sparse, teacher="self")
    trial = Trial({"float": 1.0, "quantized": 2.0}, {"float": 0.1, "quantized": 0.1}, {}, 2)
    laid_out = with_trial(laid_out, trial, used, Data(10000, 500))
    with caplog.at_level("INFO", logger="sparse_exp"):
        show_plan(laid_out)
    (text,) = [record.getMessage() for record in caplog.records]
    assert len(render(laid_out)) == len(labelled_lines(laid_out)) + 2  # the warning and the table
    assert max(map(len, text.splitlines())) <= 100
    for row in phase_rows(laid_out):
        assert all(part in text for value in row.values() for part in value.split(", "))
    lines = " ".join(text.split())
    for label, value in labelled_lines(laid_out).items():
        assert f"{label}: {value}" in lines
    assert f"Warning: {laid_out.warnings[0]}" in lines
    cells = text.splitlines()[-1].split("  ")  # no cell of the table is broken in two
    assert cells[0] == "pruned_quant"


def test_host_is_checked_only_for_stages_that_use_engines(monkeypatch):
    from sparse_exp.hardware import targets

    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    checked = Experiment(hardware=HardwareConfig(name="cpu", engines=["openvino", "onnxruntime"]))
    with pytest.raises(ConfigError) as raised:
        fit_to_host(checked)
    assert len(raised.value.problems) == 2  # both at once
    assert all("pip install" in problem for problem in raised.value.problems)
    assert all("hardware.strict=false" in problem for problem in raised.value.problems)
    checked.stages = ["fetch", "plan", "train", "evaluate", "export"]
    assert fit_to_host(checked) == (checked, ())


def test_what_does_not_fit_is_measured_all_the_same_where_that_is_asked_for(monkeypatch):
    from sparse_exp.hardware import targets

    monkeypatch.setattr(targets, "find_spec", lambda name: None if name == "openvino" else object())
    hardware = HardwareConfig(name="edge", engines=["openvino", "onnxruntime"], imgsz=320, cores=[10**6])
    asked = Experiment(hardware=hardware)
    assert asked.dataset.imgsz == 640
    with pytest.raises(ConfigError) as raised:
        fit_to_host(asked)
    assert len(raised.value.problems) == 3
    hardware.strict = False
    fitted, mismatch = fit_to_host(asked)
    assert fitted.hardware.engines == ["onnxruntime"]
    assert fitted.hardware.cores[0] < 10**6 == asked.hardware.cores[0]
    assert [clause.split(":")[0] for clause in mismatch[1:]] == [
        "without openvino",
        "640 px instead of 320 px",
    ]


def test_the_plan_names_what_does_not_fit_and_the_recipe_that_would_suit(dense):
    asked = experiment()
    asked.hardware = HardwareConfig(name="edge", engines=["onnxruntime"], recipes=["quant"], isa=["vnni"])
    plan = make_plan(asked, recipe("dense"), DENSE, FP32, dense)
    assert any("recipe=quant is the first of them" in warning for warning in plan.warnings)
    assert labelled_lines(plan)["target"].startswith("edge: sync on ")
    assert labelled_lines(plan)["target"].endswith("batch 1; recipes that suit it: quant")
    stated = with_mismatch(plan, "edge", ("2 of 8 cores", "no VNNI"))
    assert "hardware=edge does not fit here: 2 of 8 cores; no VNNI." in stated.warnings[0]
    assert stated.warnings[1:] == plan.warnings
    assert with_mismatch(plan, "edge", ()) == plan
    asked.stages = ["plan", "train"]
    assert make_plan(asked, recipe("dense"), DENSE, FP32, dense).warnings == ()


def test_a_random_start_is_warned_of(dense):
    plan = make_plan(experiment(), recipe("dense"), Start("scratch", 0.0), FP32, dense)
    assert any("random" in warning and "mean little" in warning for warning in plan.warnings)
    assert make_plan(experiment(), recipe("dense"), DENSE, FP32, dense).warnings == ()


def test_a_grown_start_says_what_from(dense):
    start = Start("grown:yolov5n(coco)", 0.0, grown_from="/zoo/n.pt (sha256 0123...)")
    lines = list(render(make_plan(experiment(), recipe("dense"), start, FP32, dense)))
    assert "model: yolov5n from grown:yolov5n(coco)" in lines
    assert any("grown: from /zoo/n.pt (sha256 0123...)" in str(line) for line in lines)
    assert "grown" not in labelled_lines(make_plan(experiment(), recipe("dense"), DENSE, FP32, dense))


def test_without_a_training_the_checkpoint_is_named_and_no_recipe(caplog):
    asked = experiment()
    asked.stages, asked.checkpoint = ["export", "benchmark"], "runs/a/weights/last.pt"
    with caplog.at_level("INFO", logger="sparse_exp"):
        show(asked, Recipe(NOTHING, name="nothing"), [])
    lines = caplog.text.splitlines()
    assert any("checkpoint: runs/a/weights/last.pt" in line for line in lines)
    assert "stages: export -> benchmark" in lines
    assert not [line for line in lines if line.startswith(("recipe:", "phase", "time:", "expected sizes:"))]


def test_pruning_of_all_layers_as_one_shows_its_target():
    """No layer is promised anything, and in sum all of them are."""
    text = GRADUAL.replace("GMPruningModifier", "GlobalMagnitudePruningModifier")
    recipe = Recipe(
        text.replace("[model.7.conv.weight, model.23.cv3.conv.weight]", "__ALL_PRUNABLE__"), name="g"
    )
    plan = make_plan(experiment(), recipe, DENSE, FP32, YOLOv5("n", 1))
    assert plan.final_sparsity == pytest.approx(0.8, abs=1e-3)
    assert [row["sparsity"] for row in phase_rows(plan)][-1] == "80.0%"
    assert plan.sparsity == 0.0
    # Of a few layers only, and together with others that are pruned by themselves.
    some = Recipe(text, name="some")
    model = YOLOv5("n", 1)
    sizes = {name: conv.weight.numel() for name, conv in model.prunable_convolutions().items()}
    share = 0.8 * (sizes["model.7.conv"] + sizes["model.23.cv3.conv"]) / sum(sizes.values())
    assert make_plan(experiment(), some, DENSE, FP32, model).final_sparsity == pytest.approx(share, abs=1e-3)
    dropped = Recipe(f"{text}    leave_enabled: False\n", name="dropped")
    assert make_plan(experiment(), dropped, DENSE, FP32, model).final_sparsity == 0.0


@pytest.mark.parametrize(("has", "warned"), [(0.12, True), (0.4, True), (0.895, False), (0.95, False)])
def test_a_start_with_fewer_zeros_than_asked_for_is_said(has, warned):
    hold = NOTHING + "  - !ConstantPruningModifier\n    start_epoch: 0.0\n    params: __ALL_PRUNABLE__\n"
    model = YOLOv5("n", 1)
    prune_by_magnitude(model.prunable_convolutions(), has)
    plan = make_plan(experiment(), Recipe(hold, name="hold"), Start("zoo", has), FP32, model)
    told = [warning for warning in plan.warnings if "model.sparsity=0.9" in warning]
    assert bool(told) is warned
    assert plan.final_sparsity == pytest.approx(has, abs=1e-3)
    if warned:
        assert f"has {has:.1%} zeros" in told[0]


@pytest.mark.parametrize(("recall", "warned"), [(0.97, True), (0.98, False)])
def test_boxes_without_an_anchor_are_said(plan, recall, warned):
    laid_out = with_anchors(plan(), Anchors(recall, recall, fitted=False))
    told = [warning for warning in laid_out.warnings if "model.anchors=auto" in warning]
    assert bool(told) is warned
    assert labelled_lines(laid_out)["anchors"] == f"answer for {recall:.1%} of the training boxes"
    fitted = labelled_lines(with_anchors(plan(), Anchors(0.5, 1.0, fitted=True)))["anchors"]
    assert fitted == "answer for 100.0% of the training boxes, fitted to them (the start's: 50.0%)"
    assert as_facts(laid_out)["anchors"] == {"before": recall, "recall": recall, "fitted": False}

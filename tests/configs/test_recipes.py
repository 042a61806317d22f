"""The recipes in ``conf/recipe``: what they do, when, and how that follows the number of epochs."""

from __future__ import annotations

import math
import re
from functools import cache

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from sparse_exp.config.places import register_schema
from sparse_exp.config.plain import CONF_DIRECTORY
from sparse_exp.config.schema import SIZES, RecipeConfig
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.resolve import resolve
from sparse_exp.yolov5 import YOLOv5

FOLDER = CONF_DIRECTORY / "recipe"
NAMES = sorted(p.relative_to(FOLDER).with_suffix("").as_posix() for p in FOLDER.rglob("*.md"))
OURS = [name for name in NAMES if not name.startswith("published/") and name != "oneshot"]
PARAMETERS = {"n": 1_867_405, "s": 7_225_885, "m": 21_172_173, "l": 46_533_693, "x": 86_705_005}  # published


@cache
def chosen(name: str, size: str = "s") -> RecipeConfig:
    register_schema()
    with initialize_config_dir(str(CONF_DIRECTORY), version_base="1.3"):
        return resolve(compose("config", overrides=[f"recipe={name}", f"model=yolov5{size}"])).recipe


def recipe_of(name: str, length: float | None = None, **variables: float) -> Recipe:
    """A shipped recipe with its option's values, as a run would have it (length: recipe.num_epochs)."""
    config = chosen(name)
    return Recipe.from_file(FOLDER / config.file, {**config.variables, **variables}, length)


def front_matter(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8").split("\n---\n")[0]


def spans(recipe: Recipe) -> list[tuple]:
    return [(phase.name, pytest.approx(phase.start), pytest.approx(phase.end)) for phase in recipe.phases()]


@pytest.mark.parametrize("name", NAMES)
def test_option_page_and_variables_belong_together(name):
    option = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert option["file"] == f"{name}.md"
    roots = dict(re.findall(r"^(\w+): (.+)$", front_matter(name), re.MULTILINE))
    assert set(option["variables"]) <= set(roots)
    for variable, value in option["variables"].items():
        if value is None:
            assert roots[variable].startswith("eval(")
        elif not isinstance(value, str):  # else it follows the model
            assert float(roots[variable]) == value
    numbers = {variable for variable, value in roots.items() if not value.startswith("eval(")}
    assert numbers <= set(option["variables"])  # each can be set on the command line, and is documented
    page = (FOLDER / f"{name}.md").read_text(encoding="utf-8").split("\n---\n")[1]
    assert page.strip().startswith("# ")
    assert len(page) > 100


def test_the_vnni_recipe_is_the_quantized_transfer_word_for_word():
    assert front_matter("transfer_quant_vnni") == front_matter("transfer_quant")
    assert chosen("transfer_quant_vnni").pattern == "block4"
    assert chosen("transfer_quant").pattern == "unstructured"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_suits_every_size(name):
    for size in ("n", "x") if name == "prune_quant" else ("n",):
        recipe_of(name).check(YOLOv5(size, 1))


TRANSFER = {
    12: [("pruned", 0, 10), ("pruned_quant", 10, 12)],
    2: [("pruned", 0, 1), ("pruned_quant", 1, 2)],
    1: [("pruned", 0, 0.5), ("pruned_quant", 0.5, 1)],
    30: [("pruned", 0, 25), ("pruned_quant", 25, 30)],
    7.5: [("pruned", 0, 6.25), ("pruned_quant", 6.25, 7.5)],
}
PRUNE = {
    12: [("pruning", 0, 7.2), ("pruned", 7.2, 12)],
    2: [("pruning", 0, 1), ("pruned", 1, 2)],
    1: [("pruning", 0, 0.5), ("pruned", 0.5, 1)],
    30: [("pruning", 0, 18), ("pruned", 18, 30)],
    7.5: [("pruning", 0, 4.5), ("pruned", 4.5, 7.5)],
}
PRUNE_QUANT = {
    12: [("pruning", 0, 6), ("pruned", 6, 10), ("pruned_quant", 10, 12)],
    3: [("pruning", 0, 1), ("pruned", 1, 2), ("pruned_quant", 2, 3)],
    2: [("pruning", 0, 2 / 3), ("pruned", 2 / 3, 4 / 3), ("pruned_quant", 4 / 3, 2)],
    1: [("pruning", 0, 1 / 3), ("pruned", 1 / 3, 2 / 3), ("pruned_quant", 2 / 3, 1)],
    30: [("pruning", 0, 15), ("pruned", 15, 25), ("pruned_quant", 25, 30)],
    7.5: [("pruning", 0, 3.75), ("pruned", 3.75, 6.25), ("pruned_quant", 6.25, 7.5)],
}
ONE_PHASE = (12, 2, 1, 30, 7.5)
SCHEDULES = {
    "dense": {n: [("dense", 0, n)] for n in ONE_PHASE},
    "transfer": {n: [("pruned", 0, n)] for n in ONE_PHASE},
    "quant": {n: [(name.replace("pruned", "dense"), *rest) for name, *rest in TRANSFER[n]] for n in TRANSFER},
    "transfer_quant": TRANSFER,
    "transfer_quant_vnni": TRANSFER,
    "distill": TRANSFER,
    "distill_layers": TRANSFER,
    "prune": PRUNE,
    "prune_distill": PRUNE,
    "prune_quant": PRUNE_QUANT,
}


@pytest.mark.parametrize(("name", "num_epochs"), [(name, n) for name in OURS for n in SCHEDULES[name]])
def test_phases_in_proportion(name, num_epochs):
    recipe = recipe_of(name, num_epochs=num_epochs)
    assert recipe.epochs == pytest.approx(num_epochs)
    assert spans(recipe) == SCHEDULES[name][num_epochs]


@pytest.mark.parametrize("name", OURS)
def test_the_length_of_a_recipe_may_be_set_from_outside_too(name):
    assert spans(recipe_of(name, 30)) == SCHEDULES[name][30]  # as with its own variable


def test_a_variable_that_is_derived_may_be_set():
    assert spans(recipe_of("transfer_quant", quantization_epochs=4)) == [
        ("pruned", 0, 8),
        ("pruned_quant", 8, 12),
    ]
    assert spans(recipe_of("quant", quantization_epochs=12)) == [("dense_quant", 0, 12)]  # QAT alone


def test_learning_rates_of_the_phases():
    warm, main, small = (1e-5, 1e-3), (1e-3, 5e-5), (1e-4, 1e-6)
    at_10 = 5e-5 + (1e-3 - 5e-5) * (1 + math.cos(math.pi * 9 / 11)) / 2  # of one cosine from epoch 1 to 12
    expected = {
        "dense": [[warm, main]],
        "transfer": [[warm, main]],
        "quant": [[warm, (1e-3, at_10)], [(at_10, 5e-5)]],
        "transfer_quant": [[warm, main], [small]],
        "prune": [[warm, (1e-3, 1e-3)], [main]],
        "prune_distill": [[warm, (1e-3, 1e-3)], [main]],
        "prune_quant": [[warm, (1e-3, 1e-3)], [main], [small]],
    }
    for name, rates in expected.items():
        recipe = recipe_of(name)
        found = [recipe.learning_rates(phase) for phase in recipe.phases()]
        assert found == [[pytest.approx(rate) for rate in phase] for phase in rates], name
        assert recipe.sets_learning_rate


@pytest.mark.parametrize("num_epochs", [0.5, 1, 2, 12, 30])
@pytest.mark.parametrize("name", OURS)
def test_warm_up_and_freezing_stay_inside_their_phases(name, num_epochs):
    recipe = recipe_of(name, num_epochs=num_epochs)
    first = recipe.phases()[0]
    modifiers = yaml.load(recipe.text, Loader=_Plain)["modifiers"] if "modifiers" in recipe.text else []
    warm = [m for m in modifiers if m.get("lr_func") == "linear" and m["start_epoch"] == 0.0]
    assert [0 < m["end_epoch"] <= first.end / 5 for m in warm] == [True]
    for quantizer in (m for m in modifiers if "freeze_bn_stats_epoch" in m):
        start, end = recipe.phases()[-1].start, recipe.phases()[-1].end
        frozen = quantizer["freeze_bn_stats_epoch"], quantizer["disable_quantization_observer_epoch"]
        assert [(moment - start) / (end - start) for moment in frozen] == pytest.approx([0.2, 0.4])


class _Plain(yaml.SafeLoader):
    pass


_Plain.add_multi_constructor("!", lambda loader, _, node: loader.construct_mapping(node, deep=True))


@pytest.mark.parametrize("size", ["n", "s", "m"])
def test_layer_groups_are_those_of_the_blocks_channels(size):
    """Counted from the model itself: a block's group follows from its output channels at size l."""
    group_of = {128: 1, 256: 2, 512: 3, 1024: 4}
    large, model = YOLOv5("l", 1), YOLOv5(size, 1)
    width: dict[str, int] = {}
    for name, convolution in large.prunable_convolutions().items():
        block = name.split(".")[1]  # its widest convolution gives its output
        width[block] = max(width.get(block, 0), convolution.out_channels)
    promised = recipe_of("prune", sparsity_1=0.1, sparsity_2=0.2, sparsity_3=0.3, sparsity_4=0.4)
    zeros = promised.expected_sparsity(
        model, promised.epochs, dict.fromkeys(model.prunable_convolutions(), 0.0)
    )
    assert set(zeros) >= set(model.prunable_convolutions())
    for name in model.prunable_convolutions():
        assert zeros[name] == pytest.approx(group_of[width[name.split(".")[1]]] / 10, abs=2e-3), name


def test_layer_targets_by_size():
    targets = {
        size: [chosen("prune", size).variables[f"sparsity_{i}"] for i in (1, 2, 3, 4)] for size in SIZES
    }
    assert targets["s"] == [0.40, 0.50, 0.65, 0.75]
    assert targets["l"] == targets["x"] == [0.50, 0.65, 0.77, 0.85]
    share = math.log(PARAMETERS["m"] / PARAMETERS["s"]) / math.log(PARAMETERS["l"] / PARAMETERS["s"])
    between = [a + share * (b - a) for a, b in zip(targets["s"], targets["l"], strict=True)]
    assert targets["m"] == pytest.approx(between, abs=0.006)
    assert targets["n"] == pytest.approx([a * 0.40 / 0.75 for a in targets["s"]], abs=0.006)


def test_what_makes_each_recipe_what_it_is():
    holds = {name for name in NAMES if recipe_of(name).holds_mask}
    assert holds == {
        "transfer", "transfer_quant", "transfer_quant_vnni", "distill", "distill_layers",
        "published/transfer_pruned", "published/transfer_pruned_quant",
        "published/transfer_pruned_quant_v1_1",
    }  # fmt: skip
    assert {name for name in NAMES if recipe_of(name).prunes_gradually} == {
        "prune", "prune_distill", "prune_quant", "oneshot", "published/prune_quant",
    }  # fmt: skip
    assert {name for name in NAMES if recipe_of(name).distills} == {
        "distill", "distill_layers", "prune_distill",
    }  # fmt: skip
    assert {name for name in NAMES if chosen(name).oneshot} == {"oneshot"}
    assert {name for name in NAMES if chosen(name).optimizer == "sgd"} == {
        name for name in NAMES if name.startswith("published/")
    }


# The columns of Neural Magic's documents, typed again here: phases and learning rates at their length.
WARM_UP = [(0.0, 0.0032), (0.05, 0.0032)]
PUBLISHED = {
    "transfer_pruned": (
        [("pruned", 0, 50)],
        [[*WARM_UP, (0.0032, 0.000384)]],
    ),
    "transfer_pruned_quant": (
        [("pruned", 0, 50), ("pruned_quant", 50, 52)],
        [[*WARM_UP, (0.0032, 0.000384)], [(2e-6, 2e-6)]],
    ),
    "transfer_pruned_quant_v1_1": (
        [("pruned", 0, 50), ("pruned_quant", 50, 55)],
        [[], [(1e-5, 1e-9)]],
    ),
    "prune_quant": (
        [("pruning", 0, 30), ("pruned", 30, 50), ("pruned_quant", 50, 55)],
        [[(0.05, 0.05)], [(0.05, 0.001)], [(1e-5, 1e-5)]],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_sets(name):
    recipe = recipe_of(f"published/{name}")
    phases, rates = PUBLISHED[name]
    assert spans(recipe) == phases
    found = [recipe.learning_rates(phase) for phase in recipe.phases()]
    assert found == [[pytest.approx(rate) for rate in phase] for phase in rates]


def test_published_warm_up_brings_biases_down_and_the_others_up():
    model = YOLOv5("n", 1)
    norms = [p for n, p in model.named_parameters() if p.ndim == 1 and n.endswith("weight")]
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    groups = [{"params": group} for group in (norms, weights, biases)]  # as YOLOv5 had them up to v6.0
    optimizer = torch.optim.SGD(groups, lr=1.0)
    sparsifier = recipe_of("published/transfer_pruned").attach(model, optimizer, 10)
    middle = (0.0032 + 0.000384) / 2
    for epoch, *expected in [(0.0, 0, 0, 0.05), (1.0, 0.0016, 0.0016, 0.0266), (26.0, *[middle] * 3)]:
        sparsifier.before_step(epoch)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)


def test_published_scopes_of_quantization():
    older, newer = (front_matter(f"published/transfer_pruned_quant{v}") for v in ("", "_v1_1"))
    scope = re.search(r"submodules: \[(.*?)\]", older, re.DOTALL)[1]
    assert re.findall(r"model\.\d+", scope) == [f"model.{i}" for i in range(24)]  # all but Detect
    assert "submodules: [model]" in newer
    for line in ("custom_quantizable_module_types: [SiLU]", "exclude_module_types: [SiLU]"):
        assert line in newer
    assert "quantize_conv_activations: False" in newer
    text = recipe_of("published/transfer_pruned_quant_v1_1").text
    assert re.search(r"freeze_bn_stats_epoch: 51\.0", text)
    assert re.search(r"disable_quantization_observer_epoch: 52\.0", text)

"""Hold the native recipe engine against SparseML 1.8.

A small network takes steps under each recipe: all shipped and published ones, and 200 that a seeded generator
writes. Its gradients are random whole numbers and its optimizer adds them up exactly, so that the weights
after every step are the same on every machine, and equal bit for bit where every mask, flag and moment is.
What SparseML did is recorded in a small file, which the test suite compares the native engine with. QAT and
distillation are left out.

    python benchmarks/recipe_parity.py --record tests/data/recipe_parity.npz    # needs SparseML
    python benchmarks/recipe_parity.py --check                                  # needs SparseML
    python benchmarks/recipe_parity.py --against tests/data/recipe_parity.npz   # does not
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparse_exp.command import Parser, run_command
from sparse_exp.config.plain import CONF_DIRECTORY
from sparse_exp.recipes.effects import Masks, effects_of
from sparse_exp.recipes.language import Tagged, body_of, to_yaml
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.recipes.sparsifier import NativeSparsifier, Sparsifier

GENERATED = 200
_UNIT = 2.0**-12  # of all weights and gradients
_LEFT_OUT = ("QuantizationModifier", "DistillationModifier", "PerLayerDistillationModifier")


@dataclass(frozen=True)
class Case:
    """A recipe, and on what it is tried.

    Attributes:
        text: YAML.
        steps_per_epoch: optimizer steps in an epoch.
        yolov5: on the layers of YOLOv5n with few channels; else on `Small`.
    """

    text: str
    steps_per_epoch: int
    yolov5: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a training under a recipe did.

    Attributes:
        digests: uint8 (steps, 8): of weights, masks, flags and weight decays after each step.
        rates: float64 (steps, 3): learning rate of each group.
        zeros: uint8: where the final weights are 0, as bits.
        facts: epochs, phases and final sparsities.
    """

    digests: np.ndarray
    rates: np.ndarray
    zeros: np.ndarray
    facts: dict[str, Any]

    def differs_from(self, other: Outcome) -> str:
        """In which respect two outcomes differ first; "" if they agree."""
        if self.facts != other.facts:
            return f"facts {self.facts} instead of {other.facts}"
        if self.digests.shape != other.digests.shape:
            return f"{len(self.digests)} steps instead of {len(other.digests)}"
        apart = (np.abs(self.rates - other.rates) > 1e-12).any(1).nonzero()[0]
        if len(apart):
            return f"learning rates {self.rates[apart[0]]}, not {other.rates[apart[0]]}, in step {apart[0]}"
        apart = (self.digests != other.digests).any(1).nonzero()[0]
        if len(apart):
            return f"weights, masks or flags in step {apart[0]}"
        return "" if np.array_equal(self.zeros, other.zeros) else "the final zeros"


class Small(nn.Module):
    """Layers of several shapes with some zeros; they are not connected."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 6, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 12, 3)
        self.b = nn.Conv2d(12, 16, 1, bias=False)
        self.c = nn.Conv2d(16, 10, 3, bias=False)
        self.d = nn.Conv2d(10, 6, 1)
        self.fc = nn.Linear(6, 5)


class Walk(torch.optim.Optimizer):
    """Adds up gradients, with some momentum, whatever the learning rate is."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.5, "weight_decay": 0.25})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    before = self.state[parameter].get("before", torch.zeros_like(parameter))
                    self.state[parameter]["before"] = parameter.grad.clone()
                    parameter.add_(parameter.grad + before)


def main() -> int:
    """Record or compare."""
    parser = Parser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, help="file to write what SparseML does to")
    what.add_argument("--check", action="store_true", help="run SparseML and the native engine, and compare")
    what.add_argument("--against", type=Path, help="compare the native engine with such a file")
    options = parser.parse_args()
    if options.against:
        recorded = read(options.against)
        return _report({name: native(case).differs_from(kept) for name, (case, kept) in recorded.items()})
    reference = dict(_references())
    if options.record:
        write(options.record, reference)
        return 0
    return _report({name: native(case).differs_from(kept) for name, (case, kept) in reference.items()})


def _report(differences: Mapping[str, str]) -> int:
    found = {name: difference for name, difference in differences.items() if difference}
    for name, difference in found.items():
        print(f"{name}: {difference}")
    print(f"{len(differences) - len(found)} of {len(differences)} recipes agree.")
    return 1 if found else 0


def _references() -> Iterator[tuple[str, tuple[Case, Outcome]]]:
    """What SparseML does with every recipe; those of the generator that it cannot run are left out."""
    for name, case in {**shipped(), **_filters()}.items():
        yield name, (case, sparseml(case))
    seed = taken = 0
    while taken < GENERATED:
        case, seed = generated(seed), seed + 1
        try:
            outcome = sparseml(case)
        except Exception as error:  # SparseML raises plain Exceptions of many kinds
            print(f"SparseML cannot run recipe {seed - 1}: {str(error).splitlines()[0]}")
            continue
        taken += 1
        yield f"generated/{seed - 1}", (case, outcome)


def shipped() -> dict[str, Case]:
    """The recipes in ``conf/recipe``, as their files are, but for those that SparseML does not know."""
    folder = CONF_DIRECTORY / "recipe"
    texts = {path: body_of(path.read_text("utf-8")) for path in sorted(folder.rglob("*.md"))}
    return {
        path.relative_to(folder).with_suffix("").as_posix(): Case(text, 2, True)
        for path, text in texts.items()
        if "SlimmingModifier" not in text
    }


def _filters() -> dict[str, Case]:
    """Recipes that prune whole filters, which SparseML only does in a modifier of its own."""
    return {
        f"filters/{curve}": Case(
            "modifiers:\n  - !MagnitudePruningModifier\n    start_epoch: 0.5\n    end_epoch: 2.0\n"
            "    init_sparsity: 0.1\n    final_sparsity: 0.7\n    update_frequency: 0.5\n"
            f"    params: ['re:[abcd].weight']\n    mask_type: filter\n    inter_func: {curve}\n",
            4,
        )
        for curve in ("linear", "cubic")
    }


def native(case: Case) -> Outcome:
    """What the native engine does."""
    recipe, (model, optimizer) = Recipe(case.text), _model(case)
    modifiers = [m for m in recipe.modifiers if m.kind not in _LEFT_OUT]
    effects = effects_of(modifiers, model, optimizer, case.steps_per_epoch, recipe.name)
    sparsifier = NativeSparsifier(effects, optimizer, case.steps_per_epoch)
    masks = [effect for effect in effects if isinstance(effect, Masks)]
    phases = [(p.name, p.start, p.end) for p in recipe.phases()]
    return _outcome(case, sparsifier, model, optimizer, recipe.epochs, phases, lambda: _masks(masks, "masks"))


def sparseml(case: Case) -> Outcome:
    """What SparseML does with the same text."""
    from sparse_exp.recipes.sparseml import SparsemlSparsifier, manager_of

    text = case.text.replace("MagnitudePruning", "StructuredPruning") if "filter" in case.text else case.text
    manager, (model, optimizer) = manager_of(text, "the recipe"), _model(case)
    modifiers = list(manager.iter_modifiers())
    epochs, phases = _length(modifiers), _phases(modifiers)
    kept = manager.modifiers
    for listed in [kept] if isinstance(kept, list) else kept.values():
        listed[:] = [m for m in listed if type(m).__name__ not in _LEFT_OUT]
    sparsifier = SparsemlSparsifier(manager, model, optimizer, case.steps_per_epoch)
    masks = [m.module_masks for m in manager.iter_modifiers() if hasattr(m, "module_masks")]
    return _outcome(case, sparsifier, model, optimizer, epochs, phases, lambda: _masks(masks, "param_masks"))


def _masks(owners: Sequence[Any], attribute: str) -> Iterator[torch.Tensor]:
    for owner in owners:
        for mask in getattr(owner, attribute):
            yield mask != 0


def _length(modifiers: Sequence[Any]) -> float:
    return max(max(float(m.start_epoch), float(m.end_epoch)) for m in modifiers)


def _phases(modifiers: Sequence[Any]) -> list[tuple[str, float, float]]:
    """Name, start and end of the phases that SparseML's modifiers make, seen between any two moments."""
    times = sorted(
        {0.0, *(t for m in modifiers for t in (float(m.start_epoch), float(m.end_epoch)) if t > 0)}
    )
    found: list[tuple[str, float, float]] = []
    for start, end in pairwise(times):
        begun = [m for m in modifiers if m.start_epoch <= start]
        pruning = [m for m in begun if "Pruning" in type(m).__name__]
        rising = any(start < m.end_epoch for m in pruning if not type(m).__name__.startswith("Constant"))
        quantized = any(type(m).__name__.endswith("QuantizationModifier") for m in begun)
        name = ("pruning" if rising else "pruned" if pruning else "dense") + ("_quant" if quantized else "")
        if found and found[-1][0] == name:
            start = found.pop()[1]
        found.append((name, start, end))
    return found


def _model(case: Case) -> tuple[nn.Module, Walk]:
    """A network with exact weights, some of them 0, and its optimizer."""
    model, stream = _yolov5() if case.yolov5 else Small(), np.random.RandomState(1)
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = stream.randint(-2000, 2000, tuple(parameter.shape))
            zero = stream.randint(0, 10, tuple(parameter.shape)) < stream.randint(0, 7)
            parameter.copy_(torch.from_numpy(np.where(zero, 0, numbers) * _UNIT))
    groups: list[list[nn.Parameter]] = [[], [], []]
    for name, parameter in model.named_parameters():
        groups[2 if name.endswith("bias") else 1 if parameter.ndim > 1 else 0].append(parameter)
    return model, Walk([{"params": group} for group in groups])


def _yolov5() -> nn.Module:
    """Layers with the names of YOLOv5n's, but with at most eight channels."""
    from sparse_exp.yolov5 import YOLOv5

    root = nn.Module()
    for name, module in YOLOv5("n", 1).named_modules():
        if isinstance(module, nn.Conv2d):
            channels = min(module.in_channels, 8), min(module.out_channels, 8)
            layer: nn.Module = nn.Conv2d(*channels, module.kernel_size, bias=module.bias is not None)
        elif isinstance(module, nn.BatchNorm2d):
            layer = nn.BatchNorm2d(min(module.num_features, 8))
        else:
            continue
        parent = root
        *path, last = name.split(".")
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, layer)
    return root


def _outcome(
    case: Case,
    sparsifier: Sparsifier,
    model: nn.Module,
    optimizer: Walk,
    epochs: float,
    phases: Sequence[tuple[str, float, float]],
    masks: Any,
) -> Outcome:
    """Train to the end, and look at everything after every step."""
    stream, digests, rates = np.random.RandomState(2), [], []
    for step in range(int(np.ceil(epochs * case.steps_per_epoch))):
        epoch = step / case.steps_per_epoch
        sparsifier.before_step(epoch)
        rates.append([max(0.0, float(group["lr"])) for group in optimizer.param_groups])
        optimizer.zero_grad()
        _give_gradients(list(model.parameters()), stream)
        sparsifier.step(epoch)
        digests.append(_digest(model, optimizer, masks()))
    sparsifier.finish()
    zeros = {name: (p == 0).numpy() for name, p in model.named_parameters()}
    facts = {
        "epochs": epochs,
        "phases": [list(phase) for phase in phases],
        "sparsity": {name: round(float(zero.mean()), 6) for name, zero in zeros.items() if zero.ndim > 1},
    }
    bits = np.packbits(np.concatenate([zero.ravel() for zero in zeros.values()]))
    return Outcome(np.stack(digests), np.array(rates), bits, facts)


def _give_gradients(parameters: Sequence[nn.Parameter], stream: np.random.RandomState) -> None:
    """Give every parameter that is trained a random gradient, by a backward pass."""
    sizes = [parameter.numel() for parameter in parameters]
    noise = torch.from_numpy(stream.randint(-40, 41, sum(sizes)) * _UNIT).float().split(sizes)
    trained = [(p, own.view_as(p)) for p, own in zip(parameters, noise, strict=True) if p.requires_grad]
    torch.autograd.backward([p for p, _ in trained], [own for _, own in trained])


def _digest(model: nn.Module, optimizer: Walk, masks: Iterator[torch.Tensor]) -> np.ndarray:
    """uint8 (8,) of all that a recipe can change."""
    made = hashlib.blake2b(digest_size=8)
    for parameter in model.parameters():
        made.update((parameter.detach() + 0.0).contiguous().numpy().tobytes())  # -0.0 becomes 0.0
        made.update(bytes([parameter.requires_grad]))
    for mask in masks:
        made.update(np.packbits(mask.contiguous().numpy()).tobytes())
    made.update(repr([float(group["weight_decay"]) for group in optimizer.param_groups]).encode())
    return np.frombuffer(made.digest(), np.uint8)


def write(path: Path, outcomes: Mapping[str, tuple[Case, Outcome]]) -> None:
    """Write recipes and what came of them into one compressed file."""
    index = [
        {
            "name": name,
            **vars(case),
            "steps": len(kept.digests),
            "bytes": len(kept.zeros),
            "facts": kept.facts,
        }
        for name, (case, kept) in outcomes.items()
    ]
    kept = [outcome for _, outcome in outcomes.values()]
    np.savez_compressed(
        path,
        index=np.frombuffer(json.dumps(index).encode(), np.uint8),
        digests=np.concatenate([outcome.digests for outcome in kept]),
        rates=np.concatenate([outcome.rates for outcome in kept]),
        zeros=np.concatenate([outcome.zeros for outcome in kept]),
    )
    steps = sum(len(outcome.digests) for outcome in kept)
    print(f"{len(kept)} recipes, {steps} steps, {path.stat().st_size} bytes in {path}")


def read(path: Path) -> dict[str, tuple[Case, Outcome]]:
    """Read what `write` wrote."""
    found, step, byte = {}, 0, 0
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    for entry in json.loads(arrays["index"].tobytes()):
        steps, zeros = slice(step, step + entry["steps"]), slice(byte, byte + entry["bytes"])
        step, byte = steps.stop, zeros.stop
        case = Case(entry["text"], entry["steps_per_epoch"], entry["yolov5"])
        outcome = Outcome(
            arrays["digests"][steps], arrays["rates"][steps], arrays["zeros"][zeros], entry["facts"]
        )
        found[entry["name"]] = case, outcome
    return found


def generated(seed: int) -> Case:
    """A recipe with modifiers of random kinds and arguments."""
    rng = random.Random(seed)
    epochs, steps = float(rng.choice([2, 3, 4])), rng.choice([3, 4, 5, 8])
    modifiers = [Tagged("EpochRangeModifier", {"start_epoch": 0.0, "end_epoch": "eval(num_epochs)"})]
    modifiers += _rates(rng, epochs, steps)
    modifiers += [_pruning(rng, epochs) for _ in range(rng.choice([0, 1, 1, 1, 2]))]
    if rng.random() < 0.4:
        modifiers.append(_held(rng, epochs))
    if rng.random() < 0.25:
        modifiers.append(_trainable(rng, epochs))
    if rng.random() < 0.25:
        decay = {"weight_decay": rng.choice([0.0, 0.01]), "start_epoch": _time(rng, epochs)}
        modifiers.append(
            Tagged("SetWeightDecayModifier", {**decay, "param_groups": rng.choice([[0], [1, 2]])})
        )
    if rng.random() < 0.15:
        values = [k * 0.25 for k in range(5)]
        start = rng.choice([0.0, 1.0])
        modifiers.append(
            Tagged("SetParamModifier", {"params": ["fc.bias"], "val": values, "start_epoch": start})
        )
    variables: dict[str, Any] = {"num_epochs": epochs, "half": "eval(num_epochs * 0.5)"}
    if rng.random() < 0.2:
        cut = rng.randint(1, len(modifiers))
        stages = {"first": modifiers[:cut], "second": modifiers[cut:]}
        content: dict[str, Any] = {name: {f"{name}_modifiers": m} for name, m in stages.items() if m}
    else:
        content = {"modifiers": modifiers}
    return Case(to_yaml({**variables, **content}), steps)


def _time(rng: random.Random, epochs: float) -> float:
    return rng.choice([0.0, 0.5, 1.0, round(rng.uniform(0.0, epochs * 0.6), 2)])


def _rates(rng: random.Random, epochs: float, steps: int) -> list[Tagged]:
    """Modifiers of the learning rate."""
    kind = rng.choice(
        ["none", "set", "curves", "groups", "cyclic", "StepLR", "MultiStepLR", "ExponentialLR", "restarts"]
    )
    rate, low = rng.choice([0.1, 0.032, 0.5]), rng.choice([0.0, 0.001, 0.7])
    middle = rng.choice([0.5, 1.0, round(rng.uniform(0.2, epochs - 0.2), 2)])
    if kind == "none":
        return []
    if kind == "set":
        first = {"start_epoch": 0.0, "learning_rate": rate, "param_groups": rng.choice([None, [0, 2]])}
        second = {"start_epoch": middle, "learning_rate": rate / 2}
        return [Tagged("SetLearningRateModifier", arguments) for arguments in (first, second)]
    if kind in ("curves", "groups"):
        groups = [None] if kind == "curves" else [[0, 1], [2]]
        return [
            _curve(rng, first, last, start, end, chosen)
            for chosen in groups
            for first, last, start, end in ((low, rate, 0.0, middle), (rate, low, middle, epochs))
        ]
    if kind == "cyclic":
        end = rng.choice([epochs, epochs - 0.5 if steps == 8 else epochs])
        curve = _curve(rng, rate, low, 0.0, end, None)
        return [Tagged(curve.kind, {**curve, "lr_func": "cyclic_linear", "cycle_epochs": 1.0})]
    options: dict[str, Any] = {"gamma": rng.choice([0.5, 0.9])}
    start, end = rng.choice([(0.0, -1.0), (0.0, epochs), (0.5, -1.0), (middle, epochs)])
    if kind == "StepLR":
        options["step_size"] = rng.choice([0.5, 1.0])
    elif kind == "MultiStepLR":
        start = 0.0
        options["milestones"] = [epochs * 0.4, epochs * 0.75]
    elif kind == "restarts":
        options = {"lr_min": 0.001, "cycle_epochs": 1, **rng.choice([{}, {"T_mult": 2}])}
    name = "CosineAnnealingWarmRestarts" if kind == "restarts" else kind
    arguments = {"lr_class": name, "lr_kwargs": options, "init_lr": rate}
    return [Tagged("LearningRateModifier", {**arguments, "start_epoch": start, "end_epoch": end})]


def _curve(rng: random.Random, first: float, last: float, start: float, end: float, groups: Any) -> Tagged:
    shape = {"lr_func": rng.choice(["linear", "cosine"]), "init_lr": first, "final_lr": last}
    return Tagged(
        "LearningRateFunctionModifier",
        {**shape, "start_epoch": start, "end_epoch": end, "param_groups": groups},
    )


def _pruning(rng: random.Random, epochs: float) -> Tagged:
    """A modifier that prunes by magnitude."""
    kind = rng.choice(["GMPruningModifier", "MagnitudePruningModifier", "GlobalMagnitudePruningModifier"])
    together = kind.startswith("Global") or (kind.startswith("GM") and rng.random() < 0.15)
    mask = rng.choice(["unstructured", "unstructured", "unstructured", "block4", [1, 4], [2, 1], [2, 4]])
    params = rng.choice(
        ["__ALL_PRUNABLE__", "__ALL__", ["re:[abcd]\\..*weight"], ["b.weight", "re:fc.*"], []]
    )
    if isinstance(mask, list):
        params = ["a.weight", "b.weight", "c.weight"]
    start = _time(rng, epochs)
    arguments = {
        "start_epoch": rng.choice([start, start, start, -1.0]),
        "end_epoch": rng.choice(
            ["eval(num_epochs)", round(rng.uniform(start + 0.3, epochs), 2), start + 0.5]
        ),
        "update_frequency": rng.choice([-1.0, 0.1, 0.25, 0.5, 1.0, 5.0]),
        "init_sparsity": rng.choice([0.0, 0.05, 0.3] if together else [0.05, 0.3, "__FROM_PARAM__"]),
        "final_sparsity": rng.choice([0.5, 0.8, 0.93]),
        "params": params,
        "inter_func": rng.choice(["linear", "cubic", "inverse_cubic"]),
        "mask_type": mask,
        "leave_enabled": rng.random() < 0.8,
    }
    if not together and not isinstance(mask, list) and rng.random() < 0.3:
        arguments["params"] = []
        arguments["final_sparsity"] = {0.6: ["a.weight", "re:c.*weight"], 0.85: ["re:[abd].weight"]}
    if together and kind.startswith("GM"):
        arguments["global_sparsity"] = True
    return Tagged(kind, arguments)


def _held(rng: random.Random, epochs: float) -> Tagged:
    """A modifier that keeps zeros."""
    params = rng.choice(["__ALL_PRUNABLE__", "__ALL__", ["stem.weight"], ["re:.*weight"]])
    times = {
        "start_epoch": rng.choice([-1.0, 0.0, _time(rng, epochs)]),
        "end_epoch": rng.choice([-1.0, epochs]),
    }
    return Tagged("ConstantPruningModifier", {**times, "params": params})


def _trainable(rng: random.Random, epochs: float) -> Tagged:
    """A modifier that keeps parameters as they are for a while."""
    arguments = {
        "params": rng.choice([["a.bias"], ["re:norm.*"], ["re:.*bias"]]),
        "trainable": False,
        "params_strict": rng.random() < 0.5,
        "start_epoch": rng.choice([-1.0, 0.0, _time(rng, epochs)]),
        "end_epoch": rng.choice([-1.0, epochs * 0.7, epochs]),
    }
    return Tagged("TrainableParamsModifier", arguments)


if __name__ == "__main__":
    run_command(main)

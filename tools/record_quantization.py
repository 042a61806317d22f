"""Record which layers SparseML 1.8.0 quantizes, and how, for tests/unit/quantization/test_scheme.py.

    python tools/record_quantization.py         writes tests/data/quantization-schemes.json.xz

It runs where SparseML is installed. The arguments of the QuantizationModifier are those of every recipe below
conf/, and some that are drawn at random in both of its dialects. The test compares `layer_schemes` with the
record, and needs no SparseML.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import re
import warnings
from pathlib import Path
from typing import Any

os.environ["NM_DISABLE_ANALYTICS"] = "True"
warnings.simplefilter("ignore")

import torch  # noqa: E402
import yaml  # noqa: E402
from sparseml.pytorch.optim import ScheduledModifierManager  # type: ignore[import-untyped]  # noqa: E402
from sparseml.pytorch.sparsification.quantization import quantization_scheme  # noqa: E402
from sparseml.pytorch.utils import LambdaLogger, LoggerManager  # type: ignore[import-untyped]  # noqa: E402
from torch import nn  # noqa: E402

from sparse_exp.recipes.schedule import Tagged, to_yaml  # noqa: E402
from sparse_exp.yolov5.model import Add, YOLOv5  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "data" / "quantization-schemes.json.xz"
SIZE, CLASSES, DRAWN = "n", 2, 60
IGNORED = ["SiLU", "BatchNorm2d", "MaxPool2d", "Upsample", "Concat"]


class _QConfig(torch.ao.quantization.QConfig):
    """A QConfig with settable attributes: SparseML sets its scheme on it, which torch's no longer allows."""


def _qconfig(activation: Any, weight: Any) -> _QConfig:
    observers = [args.get_observer() if args else nn.Identity for args in (activation, weight)]
    return _QConfig(activation=observers[0], weight=observers[1])  # type: ignore[no-untyped-call]


quantization_scheme._get_qconfig = _qconfig


def main() -> None:
    """Write the record."""
    cases = [*_of_recipes(), *_drawn(random.Random(0))]
    groups: list[list[str]] = []
    records = []
    for arguments in cases:
        layers = record(arguments)
        by_scheme: dict[str, list[str]] = {}
        for name, scheme in layers.items():
            by_scheme.setdefault(scheme, []).append(name)
        for names in by_scheme.values():
            groups += [] if names in groups else [names]
        found = {scheme: groups.index(names) for scheme, names in by_scheme.items()}
        records.append({"arguments": arguments, "schemes": found})
    content = {"sparseml": "1.8.0", "size": SIZE, "classes": CLASSES, "groups": groups, "records": records}
    RECORD.write_bytes(lzma.compress(json.dumps(content).encode()))
    print(f"{len(records)} records in {RECORD.stat().st_size} bytes")


def _of_recipes() -> list[dict[str, Any]]:
    """The arguments of each QuantizationModifier below conf/recipe."""
    yaml.SafeLoader.add_multi_constructor(
        "!", lambda loader, tag, node: (tag, loader.construct_mapping(node, deep=True))
    )
    found = []
    for path in sorted((ROOT / "conf" / "recipe").rglob("*.md")):
        body = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8"), re.DOTALL)
        for tag, arguments in _tagged(yaml.safe_load(body[1])) if body else []:
            if tag == "QuantizationModifier":
                found.append({k: v for k, v in arguments.items() if not k.endswith("epoch")})
    return found


def _tagged(tree: Any) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(tree, tuple):
        return [tree]  # type: ignore[list-item]
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return [found for item in inside for found in _tagged(item)]


def _drawn(rng: random.Random) -> list[dict[str, Any]]:
    return [_draw_newer(rng) if number % 2 else _draw_older(rng) for number in range(DRAWN)]


def _draw_newer(rng: random.Random) -> dict[str, Any]:
    arguments: dict[str, Any] = {"ignore": ["Concat", *rng.sample(IGNORED[:-1], rng.randrange(5))]}
    if rng.random() < 0.3:
        arguments["ignore"] += rng.sample(
            ["model.3", "model.24", "model.2.m", "model.9.cv1.conv", "model.1", "Add"], 2
        )
    if rng.random() < 0.8:
        arguments["scheme"] = rng.choice([_draw_scheme(rng), "default", "deepsparse"])
    if rng.random() < 0.6:
        keys = ["model.4", "model.24.m.1", "model.17.cv", "Conv2d", "ConvBn2d", "Add", "model.6.m.0.add"]
        arguments["scheme_overrides"] = {
            key: rng.choice([_draw_scheme(rng), "default"]) for key in rng.sample(keys, rng.randrange(1, 4))
        }
    if rng.random() < 0.2:
        arguments["strict"] = False
        arguments["ignore"].append("Linear")
    return arguments


def _draw_scheme(rng: random.Random) -> dict[str, Any]:
    scheme: dict[str, Any] = {
        "input_activations": _draw_tensor(rng),
        "weights": _draw_tensor(rng, weights=True),
    }
    if rng.random() < 0.3:
        scheme["output_activations"] = _draw_tensor(rng)
    elif rng.random() < 0.2:
        scheme[rng.choice(["input_activations", "weights"])] = None
    if rng.random() < 0.2:
        del scheme["weights"]
    return scheme


def _draw_tensor(rng: random.Random, *, weights: bool = False) -> dict[str, Any]:
    tensor: dict[str, Any] = {"num_bits": rng.choice([8, 8, 7, 6, 4, 2])}
    if rng.random() < 0.7:
        tensor["symmetric"] = rng.random() < (0.9 if weights else 0.2)
    if weights and rng.random() < 0.5:
        tensor["strategy"] = rng.choice(["tensor", "channel"])
    if rng.random() < 0.2:
        tensor["kwargs"] = rng.choice(
            [{"reduce_range": tensor["num_bits"] > 2}, {"averaging_constant": 0.05}]
        )
    return tensor


def _draw_older(rng: random.Random) -> dict[str, Any]:
    choices: dict[str, list[Any]] = {
        "submodules": [
            ["model"],
            [f"model.{i}" for i in range(24)],
            ["model.2", "model.24"],
            ["model.6.m", "model.8.cv3"],
        ],
        "quantize_conv_activations": [False, True],
        "activation_bits": [8, 7, 6, 4],
        "weight_bits": [8, 7, 4],
        "reduce_range": [True, False],
        "custom_quantizable_module_types": [["SiLU"], ["MaxPool2d", "Upsample"], ["Linear"]],
        "exclude_module_types": [["SiLU"], ["Conv2d"], ["ConvBn2d"], ["QuantStub"], ["Add", "Linear"]],
        "activation_qconfig_kwargs": [{"averaging_constant": 0.1}],
        "weight_qconfig_kwargs": [{"averaging_constant": 0.5}, {"reduce_range": True}],
        "exclude_batchnorm": [True, False],
        "quantize_linear_activations": [False],
    }
    names = ["quantize_conv_activations", *rng.sample(list(choices), rng.randrange(1, 6))]
    return {name: rng.choice(choices[name]) for name in names}


def record(arguments: dict[str, Any]) -> dict[str, str]:
    """How SparseML quantizes each layer: its inputs, weights and outputs, in words such as ``8as 0.01``."""
    model = YOLOv5(SIZE, CLASSES).train()
    for module in [module for module in model.modules() if isinstance(module, Add)]:
        module.functional = torch.ao.nn.quantized.FloatFunctional()  # as SparseML wants to find an addition
    modifier = {"start_epoch": 0.0, **arguments}
    text = to_yaml({"modifiers": [Tagged("QuantizationModifier", modifier)]})
    silent = LoggerManager(
        [LambdaLogger(lambda *_: True, enabled=False)], log_frequency=None, log_python=False
    )
    ScheduledModifierManager.from_yaml(text).apply_structure(model, epoch=float("inf"), loggers=silent)
    found: dict[str, dict[str, str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.ao.quantization.FakeQuantize):
            layer, part = _place(name)
            found.setdefault(layer, {})[part] = _in_words(module)
    parts = ("inputs", "weights", "outputs")
    return {layer: ", ".join(own.get(part, "-") for part in parts) for layer, own in found.items()}


def _place(name: str) -> tuple[str, str]:
    """Published name of the layer and part of it, of the name of a quantizer."""
    for pattern, part in {
        r"\.input_quant_stubs\.\d\.activation_post_process$": "inputs",
        r"\.quant\.activation_post_process$": "inputs",
        r"(\.module)?\.weight_fake_quant$": "weights",
        r"\.forward_fn\.functional\.activation_post_process$": "outputs",
        r"\.functional\.activation_post_process$": "outputs",
        r"(\.module)?\.activation_post_process$": "outputs",
    }.items():
        if re.search(pattern, name):
            return re.sub(pattern, "", name), part
    raise ValueError(name)


def _in_words(quantizer: Any) -> str:
    observer = quantizer.activation_post_process
    bits = (quantizer.quant_max - quantizer.quant_min).bit_length()
    symmetric = "symmetric" if "symmetric" in str(quantizer.qscheme) else "affine"
    scope = "channel" if quantizer.is_per_channel else "tensor"
    return f"{bits} {symmetric} {scope} {observer.averaging_constant:g}"


if __name__ == "__main__":
    main()

"""Record what SparseML 1.8.0 does when it quantizes, for the tests of sparse_exp.quantization.

    python benchmarks/qat_parity.py         writes two files into tests/data

It runs where SparseML is installed. The tests compare with the records, and need no SparseML:

- ``quantization-schemes.json.xz``: which layers are quantized, and how. The arguments of the
  QuantizationModifier are those of every recipe below conf/, and some that are drawn at random in both
  dialects.
- ``quantized-by-sparseml.pt.xz``: a checkpoint as our versions before 0.2 wrote them, one as Neural Magic's
  fork did, and what the two models predict; and the scales and zero points of all quantizers after some steps
  of training on the digits. There weights and sums are float64: in float32 the order of a sum decides where a
  value near a tie is rounded to, and one step in an early layer moves all behind it.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import random
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["NM_DISABLE_ANALYTICS"] = "True"
warnings.simplefilter("ignore")

import torch  # noqa: E402
import yaml  # noqa: E402
from sparseml.pytorch.optim import ScheduledModifierManager  # type: ignore[import-untyped]  # noqa: E402
from sparseml.pytorch.sparsification.quantization import quantization_scheme  # noqa: E402
from sparseml.pytorch.utils import LambdaLogger, LoggerManager  # type: ignore[import-untyped]  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.ao.nn.intrinsic.qat import freeze_bn_stats  # noqa: E402

from sparse_exp.config.schema import LossConfig  # noqa: E402
from sparse_exp.data.detection import load_dataset  # noqa: E402
from sparse_exp.data.digits import materialize  # noqa: E402
from sparse_exp.data.loader import make_loader  # noqa: E402
from sparse_exp.recipes.language import Tagged, to_yaml  # noqa: E402
from sparse_exp.yolov5 import DetectionLoss  # noqa: E402
from sparse_exp.yolov5.model import Add, YOLOv5  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
SIZE, CLASSES, DRAWN, STEPS = "n", 2, 60, 7
IGNORED = ["SiLU", "BatchNorm2d", "MaxPool2d", "Upsample", "Concat"]


class _QConfig(torch.ao.quantization.QConfig):
    """A QConfig with settable attributes: SparseML sets its scheme on it, which torch's no longer allows."""


def _qconfig(activation: Any, weight: Any) -> _QConfig:
    observers = [args.get_observer() if args else nn.Identity for args in (activation, weight)]
    return _QConfig(activation=observers[0], weight=observers[1])  # type: ignore[no-untyped-call]


quantization_scheme._get_qconfig = _qconfig


def main() -> None:
    """Write the records."""
    _write("quantization-schemes.json.xz", json.dumps(_schemes()).encode())
    buffer = io.BytesIO()
    torch.save(_trained(), buffer)
    _write("quantized-by-sparseml.pt.xz", buffer.getvalue())


def _write(name: str, content: bytes) -> None:
    path = DATA / name
    path.write_bytes(lzma.compress(content, preset=9))
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} KB")


def _schemes() -> dict[str, Any]:
    """The layers that are quantized, and how, for each set of arguments; equal lists of layers only once."""
    groups: list[list[str]] = []
    records = []
    for arguments in [*_of_recipes(), *_drawn(random.Random(0))]:
        by_scheme: dict[str, list[str]] = {}
        for name, scheme in record(arguments).items():
            by_scheme.setdefault(scheme, []).append(name)
        for names in by_scheme.values():
            groups += [] if names in groups else [names]
        found = {scheme: groups.index(names) for scheme, names in by_scheme.items()}
        records.append({"arguments": arguments, "schemes": found})
    print(f"{len(records)} sets of arguments")
    return {"sparseml": "1.8.0", "size": SIZE, "classes": CLASSES, "groups": groups, "records": records}


def _trained() -> dict[str, Any]:
    """Weights, what SparseML makes of them in some steps, and what the models that it makes predict."""
    start, images, targets = _start(), *_digits()
    checkpoints, outputs = {}, {}
    for kind, arguments in KINDS.items():
        model = _quantized(start, arguments)
        for _ in range(2):
            model(images.float() / 255)
        model.apply(torch.ao.quantization.disable_observer).eval()
        text = to_yaml({"modifiers": [Tagged("QuantizationModifier", {"start_epoch": 0.0, **arguments})]})
        checkpoints[kind] = _checkpoint(kind, model.state_dict(), text)
        with torch.no_grad():
            outputs[kind] = model(images[:1].float() / 255)[0]
    found = scales(_quantized(start, KINDS["0.1"]), images, targets)
    train = {"start": start, "images": images, "targets": targets, "steps": STEPS, "scales": found}
    return {**train, **checkpoints, "outputs": outputs}


KINDS = {
    "0.1": {"scheme": {"weights": {"num_bits": 8, "symmetric": True}}, "ignore": IGNORED},
    "fork": {
        "submodules": [f"model.{index}" for index in range(24)],
        "custom_quantizable_module_types": ["SiLU"],
        "exclude_module_types": ["SiLU"],
        "weight_bits": 7,
    },
}


def _start() -> dict[str, Tensor]:
    """Weights of a detector that is lively and small to store: few weights, of few values."""
    torch.manual_seed(0)
    model = YOLOv5(SIZE, CLASSES)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                kept = torch.rand_like(module.weight) < 0.02
                spread = 2.0 / (0.02 * kept[0].numel()) ** 0.5
                values = spread * torch.randint_like(module.weight, -3, 4) / 3
                module.weight.copy_(torch.where(kept, values, 0.0))
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.randint_like(module.weight, 4, 12) / 8)
                module.bias.copy_(torch.randint_like(module.bias, -4, 5) / 8)
    return model.state_dict()


def _digits() -> tuple[Tensor, Tensor]:
    """Two images, uint8 (2, 3, 64, 64), and their boxes (M, 6)."""
    with tempfile.TemporaryDirectory() as folder:
        data = load_dataset(materialize(Path(folder) / "digits", imgsz=64, train=2, val=1, test=1), "digits")
        loader = make_loader(data.splits["train"], len(data.names), imgsz=64, batch_size=2, train=False)
        images, targets = next(iter(loader))
    targets[:, 1] %= CLASSES
    return images, targets


def _quantized(start: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> Any:
    """A detector with SparseML's QAT modules, its input range fixed as in deployed files."""
    model = YOLOv5(SIZE, CLASSES)
    model.load_state_dict(start)
    apply_sparseml(model.train(), arguments)
    quantizer = model.get_submodule("model.0.conv.quant.activation_post_process")
    quantizer.scale.fill_(1.0 / 255.0)
    quantizer.zero_point.fill_(quantizer.quant_min)
    quantizer.activation_post_process.min_val.fill_(0.0)
    quantizer.activation_post_process.max_val.fill_(1.0)
    quantizer.observer_enabled[0] = 0
    return model


def _checkpoint(kind: str, state: Mapping[str, Tensor], recipe: str) -> dict[str, Any]:
    state = {name: value.clone() for name, value in state.items()}
    if kind == "fork":
        return {"epoch": -1, "model": state, "checkpoint_recipe": recipe, "names": ["a", "b"]}
    return {
        "format": "sparse_exp/1", "size": SIZE, "num_classes": CLASSES, "names": ["a", "b"], "imgsz": 64,
        "state_dict": state, "recipe": recipe, "phase": "dense_quant", "epoch": 1.0, "metrics": {},
    }  # fmt: skip


def scales(model: Any, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The scales of all quantizers after `STEPS` steps, batch norms and then ranges frozen on the way."""
    model.double()
    for module in model.modules():
        if isinstance(module, torch.ao.quantization.FakeQuantizeBase):
            module.float()
    loss_of = DetectionLoss(model.anchors, CLASSES, LossConfig(), 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(STEPS):
        if step == 3:
            model.apply(freeze_bn_stats)
        if step == 5:
            model.apply(torch.ao.quantization.disable_observer)
        optimizer.zero_grad()
        loss_of(model(images.double() / 255), targets.double())[0].backward()
        optimizer.step()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.ao.quantization.FakeQuantize):
            layer, part = _place(name)
            which = re.search(r"input_quant_stubs\.(\d)", name)
            own = f"input_quantizers.{which[1]}" if which else f"{part.removesuffix('s')}_quantizer"
            found[f"{layer}.{own}"] = torch.cat([module.scale, module.zero_point.to(module.scale.dtype)])
    return found


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


def apply_sparseml(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Quantize a detector with SparseML, in place."""
    for module in [module for module in model.modules() if isinstance(module, Add)]:
        module.functional = torch.ao.nn.quantized.FloatFunctional()  # as SparseML wants to find an addition
    text = to_yaml({"modifiers": [Tagged("QuantizationModifier", {"start_epoch": 0.0, **arguments})]})
    silent = LoggerManager(
        [LambdaLogger(lambda *_: True, enabled=False)], log_frequency=None, log_python=False
    )
    ScheduledModifierManager.from_yaml(text).apply_structure(model, epoch=float("inf"), loggers=silent)


def record(arguments: dict[str, Any]) -> dict[str, str]:
    """How SparseML quantizes each layer: its inputs, weights and outputs, in words such as ``8as 0.01``."""
    model = YOLOv5(SIZE, CLASSES).train()
    apply_sparseml(model, arguments)
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

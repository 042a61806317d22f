"""Compare the time of a step of quantization-aware training (QAT) with that of a step of dense training.

The dense step computes in fp32, and where the CPU multiplies bfloat16 in hardware, also in that, as a run
does there. QAT computes in fp32: with scales per tensor and per output channel, and with ranges and batch
norms that move, or are frozen as in the later part of the phase. A step is forward pass, loss, backward pass,
clipping and AdamW on one fixed batch, channels_last. Masks, averaged weights and the loading of batches are
left out. All steps are measured in turns; what counts is CPU time, of all threads of this process, which
other work on the machine hardly changes.

    python benchmarks/qat.py --size s --imgsz 320 --batch 8
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from sparse_exp.command import Parser, run_command, whole
from sparse_exp.config.schema import TrainerConfig
from sparse_exp.hardware import has_bf16, host_facts
from sparse_exp.locks import default_lock_path, measuring_alone
from sparse_exp.progress import progress
from sparse_exp.quantization.quantizers import begin, freeze_batch_norms, freeze_quantizers, prepare
from sparse_exp.quantization.scheme import layer_schemes
from sparse_exp.training.precision import Precision, choose_precision
from sparse_exp.yolov5 import DetectionLoss, YOLOv5

_CLASSES, _BOXES = 10, 8  # per image
_SEED = 0

Step = Callable[[], None]


def main() -> int:
    """Measure and print a table."""
    options = _options()
    precision = choose_precision(TrainerConfig(channels_last=options.channels_last), has_bf16=has_bf16())
    conditions = _conditions(options, precision)
    print("\n".join(f"{name}: {value}" for name, value in conditions.items()), flush=True)
    seconds = measure(_steps(options, precision), options.repeats)
    rows = summarize(seconds)
    print(_table(rows))
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions, "steps": rows}, indent=2) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="s", choices=list("nsmlx"), help="of YOLOv5")
    parser.add_argument("--imgsz", type=whole, default=320, help="side of the images, px, a multiple of 32")
    parser.add_argument("--batch", type=whole, default=8, help="images of a step")
    parser.add_argument("--repeats", type=whole, default=7, help="measured steps of each kind, in turns")
    parser.add_argument("--channels-last", default="auto", choices=["auto", "off"], help="memory layout")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the measurements here")
    return parser.parse_args()


def _steps(options: argparse.Namespace, precision: Precision) -> dict[str, Step]:
    """One step of each kind; the others are compared with the first."""
    plain = Precision(autocast=False, channels_last=precision.channels_last)
    steps = {f"dense, {plain}": _step(_model(options), options, plain)}
    if precision.autocast:
        steps[f"dense, {precision}"] = _step(_model(options), options, precision)
    for strategy in ("tensor", "channel"):
        for frozen in (False, True):
            name = f"QAT per {strategy}{', frozen' if frozen else ''}"
            steps[name] = _step(_quantized(options, plain, strategy, frozen=frozen), options, plain)
    return steps


def _model(options: argparse.Namespace) -> YOLOv5:
    torch.manual_seed(_SEED)
    return YOLOv5(options.size, _CLASSES).train()


def _quantized(options: argparse.Namespace, precision: Precision, strategy: str, *, frozen: bool) -> YOLOv5:
    """A model in QAT, whose ranges and batch norms move, or are frozen."""
    model = _model(options)
    weights = {"num_bits": 8, "symmetric": True, "strategy": strategy}
    ignore = ["SiLU", "BatchNorm2d", "MaxPool2d", "Upsample", "Concat"]
    begin(prepare(model, layer_schemes({"scheme": {"weights": weights}, "ignore": ignore}, model)))
    if frozen:
        with torch.no_grad():
            model(_batch(options, precision)[0])  # observers need some values before they are frozen
        freeze_batch_norms(freeze_quantizers(model))
    return model


def _step(model: YOLOv5, options: argparse.Namespace, precision: Precision) -> Step:
    model.to(memory_format=precision.memory_format)
    config = TrainerConfig()
    loss_of = DetectionLoss(model.anchors, model.num_classes, config.loss, options.imgsz)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    images, targets = _batch(options, precision)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision.autocast):
            raw = model(images)
        loss, _parts = loss_of(raw, targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()

    return step


def _batch(options: argparse.Namespace, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    """Float images (N, 3, H, W) in 0..1, and targets (M, 6): image, class, xywh in 0..1."""
    random = torch.Generator().manual_seed(_SEED)
    images = torch.rand(options.batch, 3, options.imgsz, options.imgsz, generator=random)
    owners = torch.arange(options.batch).repeat_interleave(_BOXES)
    classes = torch.randint(_CLASSES, (len(owners),), generator=random)
    boxes = 0.1 + 0.4 * torch.rand(len(owners), 4, generator=random)
    targets = torch.cat([owners[:, None].float(), classes[:, None].float(), boxes], 1)
    return images.to(memory_format=precision.memory_format), targets


def measure(steps: Mapping[str, Step], repeats: int) -> dict[str, list[float]]:
    """Measure the steps in turns, after two warm-up steps each; returns the CPU seconds of each step."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with (
        measuring_alone(default_lock_path()),
        progress("QAT", (2 + repeats) * len(steps), "steps") as bar,
    ):
        for turn in range(-2, repeats):
            for name, step in steps.items():
                started = time.process_time()
                step()
                if turn >= 0:
                    seconds[name].append(time.process_time() - started)
                bar.advance()
    return seconds


def summarize(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """The median seconds of each kind of step, and their ratio to those of the first kind."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    return {
        name: {"median_s": medians[name], "over_dense": medians[name] / first, "seconds": list(values)}
        for name, values in seconds.items()
    }


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["", "| step | CPU s/step (smallest to largest) | times dense |", "|---|---|---|"]
    for name, row in rows.items():
        low, high = min(row["seconds"]), max(row["seconds"])
        lines.append(
            f"| {name} | {row['median_s']:.3f} ({low:.3f} to {high:.3f}) | {row['over_dense']:.2f} |"
        )
    return "\n".join(lines)


def _conditions(options: argparse.Namespace, precision: Precision) -> dict[str, Any]:
    host = host_facts()
    bf16 = "multiplied in hardware" if has_bf16() else "not in this CPU: the dense step is fp32"
    return {
        "model": f"YOLOv5{options.size}, {options.imgsz} px, batch {options.batch}",
        "repeats": options.repeats,
        "cpu": f"{host.cpu}, {torch.get_num_threads()} threads, {' '.join(host.isa) or 'no AVX2'}",
        "bf16": bf16 if precision.autocast or not has_bf16() else f"{bf16}, but switched off",
        "torch": f"{torch.__version__}, Python {host.python}",
        "busy with other work before": f"{psutil.cpu_percent(1.0):.0f} %",
    }


if __name__ == "__main__":
    run_command(main)

"""Compare the images per second of the training loop with plain eager training of the same model.

Both train the same detector with the same loss and optimizer on the same augmented batches. *Plain* is the
loop that one would write first: fp32, contiguous memory, nothing but forward, backward and AdamW. *Ours* is
`sparse_exp.training.loop.Trainer` as a run uses it: its precision and memory layout, masks held by the
recipe, averaged weights, clipped gradients. Both are measured in turns, so that a drift of the machine
affects both.

    python benchmarks/training.py --size s --imgsz 320 --batch 8
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import yaml

from sparse_exp.command import Parser, run_command, share, whole
from sparse_exp.config.plain import CONF_DIRECTORY
from sparse_exp.config.schema import DatasetConfig, SourceConfig, TrainerConfig
from sparse_exp.data import DetectionDataset, digits, load_dataset, prepare
from sparse_exp.data.loader import Batch, DetectionLoader, make_loader
from sparse_exp.hardware import has_bf16, host_facts
from sparse_exp.locks import default_lock_path, measuring_alone
from sparse_exp.progress import progress
from sparse_exp.quantization.quantizers import freeze_batch_norms, freeze_quantizers
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sources.cache import cache_directory
from sparse_exp.sparsity.prune import prune_by_magnitude
from sparse_exp.training.loop import Trainer, TrainingData
from sparse_exp.training.precision import Precision, choose_precision
from sparse_exp.yolov5 import DetectionLoss, YOLOv5

_EPOCHS, _BEFORE_QAT = 1000.0, 10.0  # long enough that no phase ends while it is measured
_WARMUP_STEPS = 2
_SEED = 0

# A function that runs a number of training steps.
Steps = Callable[[int], None]


class Stretch(NamedTuple):
    """A part of the training in which all steps take the same time.

    Attributes:
        quantized: whether it is QAT.
        frozen: whether batch norm statistics and observers are frozen, as in the later part of QAT.
    """

    quantized: bool
    frozen: bool = False


PHASES = {
    "sparse": Stretch(quantized=False),
    "qat": Stretch(quantized=True),
    "qat_frozen": Stretch(quantized=True, frozen=True),
}


def main() -> int:
    """Measure and print a table."""
    options = _options()
    print(f"CPU busy with other work before: {psutil.cpu_percent(1.0):.0f} %", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        data = _dataset(options, Path(scratch))
        print(_conditions(options), flush=True)
        print("\n| phase | plain images/s | ours images/s | ours / plain | ours is |")
        print("|---|---|---|---|---|", flush=True)
        for phase in options.phases:
            print(_compare(phase, options, data, Path(scratch)), flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="s", choices=list("nsmlx"), help="of YOLOv5")
    parser.add_argument("--imgsz", type=whole, default=320, help="side of the images, px, a multiple of 32")
    parser.add_argument("--batch", type=whole, default=8, help="images of a step")
    parser.add_argument("--steps", type=whole, default=4, help="of one measurement")
    parser.add_argument("--repeats", type=whole, default=5, help="measurements of each loop, in turns")
    parser.add_argument(
        "--dataset", default="digits", choices=["digits", "trees"], help="trees: fetched once"
    )
    parser.add_argument("--phases", nargs="+", default=["sparse", "qat"], choices=list(PHASES))
    parser.add_argument("--sparsity", type=share, default=0.75, help="share of zeros in the pruned layers")
    return parser.parse_args()


def _compare(phase: str, options: argparse.Namespace, data: DetectionDataset, scratch: Path) -> str:
    """Measure one phase and return its row of the table."""
    config = TrainerConfig(batch_size=options.batch)
    precision = choose_precision(config, has_bf16=has_bf16())
    plain = plain_steps(PHASES[phase], _model(options, data), _loader(options, data, config), config, options)
    ours = our_steps(PHASES[phase], options, data, config, precision, scratch)
    rates: dict[str, list[float]] = {"plain": [], "ours": []}
    with measuring_alone(default_lock_path()), progress(phase, 2 * options.repeats, "measurements") as bar:
        for steps in (plain, ours):
            steps(_WARMUP_STEPS)
        for _ in range(options.repeats):
            for name, steps in (("plain", plain), ("ours", ours)):
                started = time.perf_counter()
                steps(options.steps)
                rates[name].append(options.steps * options.batch / (time.perf_counter() - started))
                bar.advance()
    ratio = statistics.median(rates["ours"]) / statistics.median(rates["plain"])
    how = "fp32, " + str(precision).split(", ")[1] if PHASES[phase].quantized else str(precision)
    return f"| {phase} | {_spread(rates['plain'])} | {_spread(rates['ours'])} | {ratio:.2f} | {how} |"


def _spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})"


def plain_steps(
    stretch: Stretch,
    model: YOLOv5,
    loader: DetectionLoader,
    config: TrainerConfig,
    options: argparse.Namespace,
) -> Steps:
    """Eager training as one would write it first; in QAT with the quantizers that the recipe puts in."""
    if stretch.quantized:
        _recipe(stretch).apply_structure(model)
    model.train()
    loss_of = DetectionLoss(model.anchors, model.num_classes, config.loss, options.imgsz)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    batches = _endless(loader)

    def steps(count: int) -> None:
        for _ in range(count):
            images, targets = next(batches)
            loss, _parts = loss_of(model(images.float() / 255), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    if stretch.frozen:
        steps(_WARMUP_STEPS)  # observers need some values before they are frozen
        freeze_batch_norms(freeze_quantizers(model))
    return steps


def our_steps(
    stretch: Stretch,
    options: argparse.Namespace,
    data: DetectionDataset,
    config: TrainerConfig,
    precision: Precision,
    scratch: Path,
) -> Steps:
    """The loop of a run: `Trainer`, between two of its evaluations."""
    model, recipe, loader = _model(options, data), _recipe(stretch), _loader(options, data, config)
    prune_by_magnitude(model.prunable_convolutions(), options.sparsity)
    batches = TrainingData(loader, loader, data.names, options.imgsz)
    trainer = Trainer(model, recipe, batches, config, precision, weights=scratch, seed=_SEED)
    per_epoch = len(loader)
    sparsifier = recipe.attach(trainer._model, trainer._optimizer, per_epoch)
    phase, source = recipe.phases()[1 if stretch.quantized else 0], _endless(loader)
    done = round(phase.start * per_epoch)
    trainer._begin_phase(phase, sparsifier, phase.start)

    def steps(count: int) -> None:
        nonlocal done
        with progress("", count, "steps") as bar:
            trainer._train(phase, range(done, done + count), per_epoch, source, sparsifier, bar)
        done += count

    if stretch.frozen:
        steps(_WARMUP_STEPS)
        done = round((phase.start + phase.end) / 2 * per_epoch)  # here statistics and observers are frozen
    return steps


def _recipe(stretch: Stretch) -> Recipe:
    """The default recipe, with epochs so long that the phase does not end during the measurement."""
    quantization = _EPOCHS - _BEFORE_QAT if stretch.quantized else 1.0
    variables = {"num_epochs": _EPOCHS, "quantization_epochs": quantization}
    return Recipe.from_file(CONF_DIRECTORY / "recipe" / "transfer_quant.md", variables)


def _model(options: argparse.Namespace, data: DetectionDataset) -> YOLOv5:
    torch.manual_seed(_SEED)
    return YOLOv5(options.size, len(data.names))


def _loader(options: argparse.Namespace, data: DetectionDataset, config: TrainerConfig) -> DetectionLoader:
    samples = data.splits["train"]
    samples = samples[: len(samples) // options.batch * options.batch]  # no smaller last batch
    return make_loader(
        samples,
        len(data.names),
        imgsz=options.imgsz,
        batch_size=options.batch,
        train=True,
        seed=_SEED,
        augment=config.augment,
    )


def _endless(loader: DetectionLoader) -> Iterator[Batch]:
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def _dataset(options: argparse.Namespace, scratch: Path) -> DetectionDataset:
    if options.dataset == "digits":
        train = max(24, options.batch)
        return load_dataset(
            digits.materialize(scratch / "digits", imgsz=options.imgsz, train=train), "digits"
        )
    values = yaml.safe_load((CONF_DIRECTORY / "dataset" / "trees.yaml").read_text(encoding="utf-8"))
    sources = [SourceConfig(**source) for source in values.pop("sources")]
    return prepare(DatasetConfig(**values, sources=sources), cache_directory(None))


def _conditions(options: argparse.Namespace) -> str:
    host = host_facts()
    return (
        f"YOLOv5{options.size}, {options.imgsz} px, batch {options.batch}, {options.dataset}; "
        f"median (smallest to largest) of {options.repeats} measurements of {options.steps} steps\n"
        f"{host.cpu}, {torch.get_num_threads()} threads, {' '.join(host.isa) or 'no AVX2'}; "
        f"torch {torch.__version__}, Python {host.python}"
    )


if __name__ == "__main__":
    run_command(main)

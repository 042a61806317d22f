"""Compare the loader's images per second, with augmentation, with those of a naive loader.

*Naive* is torch's own `DataLoader` over a data set that opens, decodes and letterboxes every image anew, and
augments it with torchvision's ready-made transforms: mosaic, zoom and shift, flips, colour jitter, of the
same sizes and probabilities. *Ours* is `sparse_exp.data.loader` as a run uses it. Both are measured in turns,
so that a drift of the machine affects both. The last column compares ours with training steps of YOLOv5n on
the same cores, since a loader must be faster than these.

    python benchmarks/data.py                  # tiles of 320 px that fit into memory, photos that do not
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from sparse_exp.command import Parser, run_command, whole
from sparse_exp.config.schema import AugmentConfig, DatasetConfig, LossConfig, SourceConfig, TrainerConfig
from sparse_exp.data import DetectionDataset, load_dataset, prepare
from sparse_exp.data.detection import Sample
from sparse_exp.data.labels import read_boxes
from sparse_exp.data.letterbox import PADDING
from sparse_exp.data.loader import make_loader
from sparse_exp.data.trees import PHOTOS
from sparse_exp.data.writing import write_yaml
from sparse_exp.hardware import has_bf16, host_facts
from sparse_exp.locks import default_lock_path, measuring_alone
from sparse_exp.sources.cache import cache_directory, fetch
from sparse_exp.training.precision import choose_precision
from sparse_exp.yolov5 import DetectionLoss, YOLOv5

_WHEEL = SourceConfig(
    uri="index:deepforest==2.1.0", sha256="8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
)
_PHOTO = (1280, 960)  # px
_BATCH = 8

# A function that processes a number of batches.
Work = Callable[[int], None]


class LoaderCase(NamedTuple):
    """The settings of one comparison.

    Attributes:
        name: name of the images in the table.
        imgsz: side of the loaded images, px.
        in_memory: whether our loader may keep decoded images.
        workers: number of processes of either loader.
    """

    name: str
    imgsz: int
    in_memory: bool
    workers: int


CASES = (
    LoaderCase("tiles, PNG 320 px", 320, in_memory=True, workers=0),
    LoaderCase("tiles, PNG 320 px", 640, in_memory=True, workers=0),
    LoaderCase("photos, JPEG 1280 x 960", 640, in_memory=True, workers=0),
    LoaderCase("photos, JPEG 1280 x 960", 640, in_memory=False, workers=1),
    LoaderCase("photos, JPEG 1280 x 960", 640, in_memory=False, workers=2),
)


def main() -> int:
    """Measure and print a table."""
    options = _options()
    print(f"CPU busy with other work before: {psutil.cpu_percent(1.0):.0f} %")
    facts = host_facts()
    print(f"{facts.cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"torchvision {torchvision.__version__}, {options.repeats} measurements in turns\n")
    print(
        "| images | imgsz | kept in memory | workers | naive images/s | ours images/s | ours / naive | ",
        end="",
    )
    print("YOLOv5n trains images/s | ours / training |\n|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch, measuring_alone(default_lock_path()):
        trees = DatasetConfig(name="trees", generator="trees", sources=[_WHEEL])
        tiles = prepare(trees, cache_directory())
        data = {"tiles": tiles, "photos": _photos(Path(scratch), options.photos)}
        for case in CASES:
            print(_compare(case, data[case.name.partition(",")[0]], options), flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=whole, default=12, help=f"of {_BATCH} images, in one measurement")
    parser.add_argument("--steps", type=whole, default=3, help="of training, in one measurement")
    parser.add_argument("--repeats", type=whole, default=5, help="measurements of each, in turns")
    parser.add_argument("--photos", type=whole, default=96, help="photos that are cut and written as JPEG")
    return parser.parse_args()


def _compare(case: LoaderCase, data: DetectionDataset, options: argparse.Namespace) -> str:
    """Measure one case and return its row of the table."""
    config = AugmentConfig()
    naive = _endless(naive_loader(data.splits["train"], case, config))
    loader = make_loader(
        data.splits["train"], 1, imgsz=case.imgsz, batch_size=_BATCH, train=True, workers=case.workers,
        augment=config, cache="ram" if case.in_memory else "none",
    )  # fmt: skip
    ours, train = _endless(loader), training(case.imgsz)
    rates: dict[str, list[float]] = {"naive": [], "ours": [], "training": []}
    works = (
        ("naive", _draw(naive), options.batches),
        ("ours", _draw(ours), options.batches),
        ("training", train, options.steps),
    )
    for turn in range(options.repeats + 1):
        for name, work, count in works:
            started = time.perf_counter()
            work(count)
            if turn:  # the first turn warms up
                rates[name].append(count * _BATCH / (time.perf_counter() - started))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    kept = "yes" if case.in_memory else "no"
    cells = [case.name, case.imgsz, kept, case.workers, _spread(rates["naive"]), _spread(rates["ours"]),
             f"{middle['ours'] / middle['naive']:.1f}", _spread(rates["training"]),
             f"{middle['ours'] / middle['training']:.1f}"]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


def _draw(batches: Iterator[object]) -> Work:
    def work(count: int) -> None:
        for _ in range(count):
            next(batches)

    return work


def _endless(loader: DataLoader) -> Iterator[object]:
    epoch = 0
    while True:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def training(imgsz: int) -> Work:
    """Training steps of YOLOv5n on one batch in memory, with bf16 where the CPU has it in hardware."""
    precision = choose_precision(TrainerConfig(), has_bf16=has_bf16())
    model = YOLOv5("n", 1).train().to(memory_format=torch.channels_last)
    loss_of = DetectionLoss(model.anchors, 1, LossConfig(), imgsz)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images = torch.rand(_BATCH, 3, imgsz, imgsz).to(memory_format=torch.channels_last)
    targets = torch.tensor([[i, 0, 0.5, 0.5, 0.1, 0.1] for i in range(_BATCH)])

    def work(count: int) -> None:
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
                raw = model(images)
            loss, _parts = loss_of([one.float() for one in raw], targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return work


def naive_loader(samples: tuple[Sample, ...], case: LoaderCase, config: AugmentConfig) -> DataLoader:
    """The loader that one would write first."""
    return DataLoader(
        NaiveImages(samples, case.imgsz, config),
        batch_size=_BATCH,
        shuffle=True,
        num_workers=case.workers,
        persistent_workers=case.workers > 0,
        collate_fn=_stack,
    )


def _stack(items: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    images, boxes, labels = zip(*items, strict=True)
    return torch.stack(images), list(boxes), list(labels)


class NaiveImages(Dataset):
    """Augmented images, each read from its file every time.

    Args:
        samples: images and labels.
        imgsz: side of the images, px.
        config: sizes and probabilities of the augmentation.
    """

    def __init__(self, samples: tuple[Sample, ...], imgsz: int, config: AugmentConfig) -> None:
        self._samples, self._imgsz, self._mosaic = samples, imgsz, config.mosaic
        sizes = asdict(config)
        colours = {name: sizes[name] for name in ("brightness", "contrast", "saturation", "hue")}
        shift, scale = (config.translate, config.translate), (1 - config.scale, 1 + config.scale)
        self._augment = v2.Compose(
            [
                v2.RandomAffine(0, translate=shift, scale=scale, fill=PADDING),
                v2.RandomHorizontalFlip(config.fliplr),
                v2.RandomApply([v2.ColorJitter(**colours)], config.jitter),
                v2.SanitizeBoundingBoxes(min_size=2),
            ]
        )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, boxes, labels = self._read(index) if torch.rand(()) >= self._mosaic else self._four(index)
        framed = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:])
        item = self._augment({"image": tv_tensors.Image(image), "boxes": framed, "labels": labels})
        return item["image"], item["boxes"], item["labels"]

    def _read(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        sample, side = self._samples[index], self._imgsz
        image = v2.functional.pil_to_tensor(Image.open(sample.image).convert("RGB"))
        height, width = image.shape[-2:]
        scale = min(side / height, side / width)
        h, w = round(height * scale), round(width * scale)
        image = v2.functional.resize(image, [h, w], antialias=True)
        left, top = (side - w) // 2, (side - h) // 2
        image = v2.functional.pad(image, [left, top, side - w - left, side - h - top], fill=PADDING)
        rows = torch.from_numpy(read_boxes(sample.label, 1))
        centre, half = rows[:, 1:3] * torch.tensor([w, h]), rows[:, 3:] * torch.tensor([w, h]) / 2
        boxes = torch.cat([centre - half, centre + half], 1) + torch.tensor([left, top, left, top])
        return image, boxes, rows[:, 0]

    def _four(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        side = self._imgsz
        chosen = [index, *torch.randint(len(self), (3,)).tolist()]
        plane = torch.full((3, 2 * side, 2 * side), PADDING, dtype=torch.uint8)
        boxes, labels = [], []
        for number, picked in enumerate(chosen):
            image, own, classes = self._read(picked)
            left, top = number % 2 * side, number // 2 * side
            plane[:, top : top + side, left : left + side] = image
            boxes.append(own + torch.tensor([left, top, left, top]))
            labels.append(classes)
        left, top = torch.randint(side + 1, (2,)).tolist()
        framed = tv_tensors.BoundingBoxes(torch.cat(boxes), format="XYXY", canvas_size=plane.shape[-2:])
        window = (top, left, side, side)
        return v2.functional.crop(plane, *window), v2.functional.crop(framed, *window), torch.cat(labels)


def _photos(folder: Path, count: int) -> DetectionDataset:
    """Parts of the larger photo as JPEG, with random boxes, since their places do not affect the speed."""
    draw = np.random.default_rng(0)
    with zipfile.ZipFile(fetch(_WHEEL, cache_directory()).path) as wheel:
        photo = Image.open(io.BytesIO(wheel.read(f"deepforest/data/{PHOTOS[0].stem}.png"))).convert("RGB")
    for split, images in (("train", count), ("val", 1)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(images):
            x, y = (int(draw.integers(0, full - part)) for full, part in zip(photo.size, _PHOTO, strict=True))
            part = photo.crop((x, y, x + _PHOTO[0], y + _PHOTO[1]))
            part.save(folder / "images" / split / f"{index:03}.jpg", quality=90)
            lines = (f"0 {cx:.4f} {cy:.4f} 0.04 0.05\n" for cx, cy in draw.uniform(0.1, 0.9, (15, 2)))
            (folder / "labels" / split / f"{index:03}.txt").write_text("".join(lines), encoding="utf-8")
    write_yaml(folder, ["tree"], ["train", "val"])
    return load_dataset(folder / "data.yaml")


if __name__ == "__main__":
    run_command(main)

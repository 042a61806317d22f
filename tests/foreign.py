"""Writes checkpoints as others write them, from their documented formats."""

from __future__ import annotations

import argparse
import copy
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparse_exp.yolov5 import YOLOv5

_CLASSES = {
    "models.yolo": ("Model", "DetectionModel", "Detect"),
    "models.common": ("Conv", "C3", "Bottleneck", "SPPF", "Concat"),
}


@contextmanager
def ultralytics_modules() -> Iterator[Callable[..., Any]]:
    """Modules named as in Ultralytics' repository, importable within the block only.

    Yields:
        A function that makes one of our detectors over into a module of those classes.
    """
    modules = {name: types.ModuleType(name) for name in ("models", *_CLASSES)}
    for name, members in _CLASSES.items():
        for member in members:
            setattr(modules[name], member, type(member, (nn.Module,), {"__module__": name}))
    sys.modules.update(modules)

    def imitate(ours: nn.Module, name: str = "DetectionModel") -> Any:
        home = next((m for m, members in _CLASSES.items() if name in members), None)
        theirs = getattr(modules[home], name)() if home else type(ours).__new__(type(ours))
        if not home:
            theirs.__dict__.update(ours.__dict__)
        children = {k: imitate(c, type(c).__name__) for k, c in ours.named_children() if k != "add"}
        theirs.__dict__.update(_parameters=ours._parameters, _buffers=ours._buffers, _modules=children)
        return theirs

    try:
        yield imitate
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def save_ultralytics(path: Path, model: YOLOv5, names: Any, **more: Any) -> Path:
    """``last.pt`` of a training with Ultralytics YOLOv5 v7: models in half precision, averages, optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    with ultralytics_modules() as imitate:
        averaged = imitate(copy.deepcopy(model).half())
        averaged.names, averaged.nc = names, model.num_classes
        averaged.yaml = {"nc": model.num_classes, "depth_multiple": 0.33, "anchors": [[10, 13]] * 3}
        averaged.hyp = {"lr0": 0.01, "anchor_t": 4.0}
        averaged.class_weights = torch.ones(model.num_classes)
        content = {
            "epoch": 7,
            "best_fitness": np.array([np.float64(0.5)]),
            "model": imitate(YOLOv5(model.size, model.num_classes).half()),
            "ema": averaged,
            "updates": 800,
            "optimizer": optimizer.state_dict(),
            "opt": vars(argparse.Namespace(weights="yolov5n.pt", imgsz=320, save_dir=str(path.parent))),
            "hyp": argparse.Namespace(lr0=0.01),
            "git": {"remote": None, "branch": None, "commit": None},
            "date": "2026-01-01T00:00:00.000000",
            **more,
        }
        torch.save(content, path)
    return path


def save_fork(
    path: Path, model: nn.Module, size: str, names: Sequence[str], *, recipe: str | None, **more: Any
) -> Path:
    """A checkpoint of Neural Magic's fork of YOLOv5 after its last epoch, optimizer stripped."""
    content = {
        "epoch": -1,
        "best_fitness": None,
        "model": model.state_dict(),
        "ema": None,
        "updates": None,
        "optimizer": None,
        "yaml": {"nc": len(names), "names": list(names), "yaml_file": f"yolov5{size}.yaml"},
        "nc": len(names),
        "hyp": {"lr0": 0.01},
        "checkpoint_recipe": str(recipe),
        "date": "2023-01-01T00:00:00.000000",
        **more,
    }
    torch.save(content, path)
    return path

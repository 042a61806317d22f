"""The detector: its modules, loss and checkpoints, and detections from its predictions.

The names below are imported when they are asked for: `non_max_suppression` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_exp.yolov5.checkpoint import (
        Checkpoint,
        TransferReport,
        read_checkpoint,
        save_checkpoint,
        transfer_weights,
    )
    from sparse_exp.yolov5.loss import DetectionLoss
    from sparse_exp.yolov5.model import YOLOv5
    from sparse_exp.yolov5.postprocess import non_max_suppression

__all__ = [
    "Checkpoint",
    "DetectionLoss",
    "TransferReport",
    "YOLOv5",
    "non_max_suppression",
    "read_checkpoint",
    "save_checkpoint",
    "transfer_weights",
]
_FILES = {"DetectionLoss": "loss", "YOLOv5": "model", "non_max_suppression": "postprocess"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES.get(name, 'checkpoint')}"), name)

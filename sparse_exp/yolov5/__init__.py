"""The detector: its modules, loss and checkpoints, and detections from its predictions."""

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

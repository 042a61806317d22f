"""Configuration-driven sparse transfer learning of YOLOv5.

from sparse_exp import load

detector = load("model.onnx")
for found in detector("photo.jpg"):
    print(found.class_name, found.score, found.box)
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_exp.predict.detections import Detection, Detections
    from sparse_exp.predict.detector import Detector, load

__all__ = ["Detection", "Detections", "Detector", "__version__", "load"]
__version__ = "0.1.0"

# SparseML, SparseZoo, DeepSparse, MLflow and Ray report usage to servers of their makers unless told
# not to before they are imported. Nothing here phones home.
os.environ.setdefault("NM_DISABLE_ANALYTICS", "True")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

_DETECTIONS = ("Detection", "Detections")


def __getattr__(name: str) -> Any:
    """Import the runtime when a name of it is asked for, so that ``import sparse_exp`` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(
        import_module(f"{__name__}.predict.{'detections' if name in _DETECTIONS else 'detector'}"), name
    )

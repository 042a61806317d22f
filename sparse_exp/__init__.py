"""Configuration-driven sparse transfer learning of YOLOv5."""

import os

__version__ = "0.1.0"

# SparseML, SparseZoo, DeepSparse, MLflow and Ray report usage to servers of their makers unless told
# not to before they are imported. Nothing here phones home.
os.environ.setdefault("NM_DISABLE_ANALYTICS", "True")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

"""What verification saw each file put out for the first images, for the benchmark to be held against.

A benchmark loads the same files with other batches and with options of its own. One batch that is computed
exactly so must say the same as what was verified: then the accuracy that was measured there holds here, and
an engine that computes nonsense quickly is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_exp.config.schema import ExportConfig
from sparse_exp.errors import EngineError
from sparse_exp.export.differences import CONFIDENT, Differences
from sparse_exp.files import landing

FILE = "first_outputs.npz"
_IMAGES = 4
_LEAST, _MOST = 0.05, 100  # objectness from which predictions are kept, and how many are in any case
Predict = Callable[[Tensor], Tensor]


class FirstOutputs:
    """Predictions for the first images of the validation split, by engine and variant.

    Of each image the predictions with an objectness of 0.05 and more are kept, and the 100 with the largest
    one in any case: thousands of others are near 0, and would hide a difference.
    """

    def __init__(self, kept: Mapping[str, NDArray[Any]] | None = None) -> None:
        self._kept = dict(kept or {})

    def watching(self, engine: str, variant: str, predict: Predict) -> Predict:
        """A function that predicts, and keeps what comes out of its first call.

        Args:
            engine: one of `sparse_exp.config.schema.ENGINES`.
            variant: one of `sparse_exp.config.schema.VARIANTS`.
            predict: of uint8 (N, 3, H, W), the split's first images at first, float32 (N, A, 5 + nc).
        """
        name = f"{engine}/{variant}"

        def run(images: Tensor) -> Tensor:
            predictions = predict(images)
            if f"{name}/shape" not in self._kept:
                first = predictions[:_IMAGES].numpy()
                index = np.argwhere(_worth_keeping(first[..., 4])).astype(np.int32)
                self._kept |= {
                    f"{name}/shape": np.asarray(first.shape),
                    f"{name}/index": index,
                    f"{name}/rows": first[tuple(index.T)],
                }
            return predictions

        return run

    def write(self, path: Path) -> Path:
        """Write them, whole or not at all; returns the path."""
        with landing(path) as temporary:
            np.savez_compressed(temporary, **self._kept)  # type: ignore[arg-type]
        return path

    @classmethod
    def read(cls, path: Path) -> FirstOutputs:
        """What was written; nothing where there is no such file."""
        if not path.is_file():
            return cls()
        with np.load(path, allow_pickle=False) as kept:
            return cls({name: kept[name] for name in kept.files})

    def compare(
        self, engine: str, variant: str, predictions: NDArray[np.float32], limits: ExportConfig
    ) -> dict[str, float]:
        """Hold a batch that was computed in another setting against what was verified.

        Args:
            engine: one of `sparse_exp.config.schema.ENGINES`.
            variant: one of `sparse_exp.config.schema.VARIANTS`.
            predictions: for the split's first images, float32 (N, A, 5 + nc).
            limits: box_atol and score_atol.

        Returns:
            See `Differences.result`; empty where nothing was verified.

        Raises:
            EngineError: the predictions are others.
        """
        name = f"{engine}/{variant}"
        if f"{name}/shape" not in self._kept:
            return {}
        now, then = predictions.shape[1:], tuple(map(int, self._kept[f"{name}/shape"][1:]))
        if now != then:
            raise EngineError(f"It puts out {now} for an image, and {then} were verified.")
        index, rows = self._kept[f"{name}/index"], self._kept[f"{name}/rows"]
        count = min(len(predictions), int(self._kept[f"{name}/shape"][0]))
        here = index[:, 0] < count
        reference = np.zeros((count, *then), np.float32)
        reference[tuple(index[here].T)] = rows[here]
        found, looked_at = predictions[:count].copy(), ~(predictions[:count, :, 4] < CONFIDENT)
        looked_at[tuple(index[here].T)] = True
        found[~looked_at] = 0
        differences = Differences()
        differences.update(torch.from_numpy(found), torch.from_numpy(reference))
        result = differences.result()
        scores, boxes = result["score_mean"], result["box_mean_px"]
        if not (scores <= limits.score_atol and boxes <= limits.box_atol):
            raise EngineError(
                f"It puts out something else than was verified: scores differ by {scores:.3f} and boxes by "
                f"{boxes:.2f} px in the mean. Do not deploy it with these settings."
            )
        return result


def _worth_keeping(objectness: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which predictions are kept, of objectnesses (N, A)."""
    kept = ~(objectness < _LEAST)  # NaN stays, too
    best = np.argpartition(-objectness, min(_MOST, objectness.shape[1] - 1), axis=1)[:, :_MOST]
    np.put_along_axis(kept, best, True, axis=1)
    return kept

"""torch as an engine, for those who do not deploy; it is imported when a checkpoint is loaded."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_exp.config.imgsz import imgsz_of
from sparse_exp.engines.base import Execute, LocalEngine, Options, Setup
from sparse_exp.engines.profile import RUNS, Profile, merged
from sparse_exp.engines.signature import Signature
from sparse_exp.errors import EngineError, expected

if TYPE_CHECKING:
    from torch import Tensor

    from sparse_exp.yolov5 import YOLOv5

_GRAPHS = (".onnx", ".xml")


class TorchEngine(LocalEngine):
    """torch on the CPU, in fp32; see `sparse_exp.engines.base.Engine`.

    It takes a checkpoint (.pt) instead of an ONNX file, and images whose sides are any multiples of 32. Batch
    norms are folded into their convolutions. A quantized checkpoint runs as it was trained, with fake
    quantization in floating point: its predictions are those of the quantized network, its speed is not.

    Until it is closed it sets the number of threads of the whole process.

    Options: ``channels_last`` is the memory layout; ``frozen`` traces the model into a graph with folded
    constants and convolutions in oneDNN's layout.
    """

    name = "torch"
    choices = MappingProxyType({"channels_last": (False, True), "frozen": (False, True)})

    def __init__(self, *, quiet: bool = True) -> None:
        super().__init__(quiet=quiet)
        self._threads_before: int | None = None

    @classmethod
    def search_space(cls, *, batch_size: int, cores: int, streams: int) -> list[dict[str, Any]]:
        """See `sparse_exp.engines.search_space`."""
        return [{}, {"channels_last": True}, {"frozen": True}]

    def _library(self) -> tuple[Any, str]:
        import torch

        return torch, str(torch.__version__).split("+")[0]

    def _read(self, model: Path) -> Signature | None:
        if model.suffix in _GRAPHS:
            do = "Take a checkpoint of the run's weights directory, or another engine."
            raise EngineError(expected("the model of torch", "a checkpoint (.pt)", str(model), do))
        return None

    def _compile(self, library: Any, setup: Setup) -> Sequence[Execute]:
        if self._threads_before is None:
            self._threads_before = library.get_num_threads()
        library.set_num_threads(max(1, setup.cores // setup.lanes))
        return [_Network(library, setup).execute] * setup.lanes

    def _profile(self, library: Any, setup: Setup, batch: np.ndarray) -> Profile:
        """By torch's profiler, operators; see `sparse_exp.engines.IsolatedEngine.profile`."""
        network = _Network(library, setup)
        network.execute(batch)
        with library.profiler.profile(activities=[library.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(RUNS):
                network.execute(batch)
        events = [
            (e.key, e.key.removeprefix("aten::"), e.self_cpu_time_total / 1e3)
            for e in profiler.key_averages()
        ]
        note = "torch's profiler, by operator and not by layer, one stream"
        return Profile(merged((event for event in events if event[2] > 0), RUNS), None, note)

    def close(self) -> None:
        """See `Engine.close`."""
        super().close()
        if self._threads_before is not None:
            import torch

            torch.set_num_threads(self._threads_before)
            self._threads_before = None


class _Network:
    """A detector that takes pixels; it is prepared for a size of images when that is first seen."""

    def __init__(self, library: Any, setup: Setup) -> None:
        self._torch, self._options = library, setup.options
        self._model = _detector(library, setup.model, setup.options)
        self._ready: dict[tuple[int, ...], Any] = {}
        self._preparing = threading.Lock()

    def execute(self, batch: np.ndarray) -> list[np.ndarray]:
        with self._torch.inference_mode():
            images = self._torch.from_numpy(batch).float() * (1.0 / 255.0)
            if self._options.get("channels_last", False):
                images = images.contiguous(memory_format=self._torch.channels_last)
            with self._preparing:
                if images.shape not in self._ready:
                    self._ready[images.shape] = self._prepared(images)
            return [self._ready[images.shape](images).numpy()]

    def _prepared(self, images: Tensor) -> Any:
        """The module for images of that shape."""
        with self._model.export_mode(imgsz_of(tuple(images.shape[-2:]))) as model:
            if not self._options.get("frozen", False):
                return copy.deepcopy(model)  # stays in that mode
            jit = self._torch.jit
            with warnings.catch_warnings():
                # Tracing is deprecated, but torch.compile needs a C++ compiler.
                warnings.simplefilter("ignore")
                return jit.optimize_for_inference(jit.freeze(jit.trace(model, images, check_trace=False)))


def _detector(library: Any, path: Path, options: Options) -> YOLOv5:
    """The detector of a checkpoint, ready to run."""
    model = _restored(path)
    with library.no_grad():
        _fold(model)
    layout = library.channels_last if options.get("channels_last", False) else library.contiguous_format
    return model.to(memory_format=layout)


def _restored(path: Path) -> YOLOv5:
    """The model of a checkpoint, with its weights, in evaluation mode."""
    from sparse_exp.yolov5 import read_checkpoint
    from sparse_exp.yolov5.channels import build_detector

    checkpoint = read_checkpoint(path)
    model = build_detector(checkpoint.size, checkpoint.num_classes, checkpoint.widths)
    if model.state_dict().keys() == checkpoint.state_dict.keys():
        model.load_state_dict(checkpoint.state_dict)
        return model.eval()
    # Quantized weights have other names and need SparseML, which takes seconds and 200 MB.
    from sparse_exp.recipes.checkpoints import restore

    return restore(path)[0]


def _fold(model: YOLOv5) -> None:
    """Fold batch norms into the convolutions before them, but not where SparseML has wrapped them."""
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    from sparse_exp.yolov5.model import Conv

    for module in model.modules():
        if isinstance(module, Conv) and type(module.conv) is nn.Conv2d and type(module.bn) is nn.BatchNorm2d:
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()  # type: ignore[assignment]

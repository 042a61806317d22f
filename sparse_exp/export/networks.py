"""The networks that a run's files are made of: deployed, dense, and sparse before quantization."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_exp.errors import CheckpointError
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.recipes.recipe import is_quantized
from sparse_exp.runs.directory import Run
from sparse_exp.sparsity.measure import SPARSE_FROM, layer_sparsity, overall
from sparse_exp.yolov5 import YOLOv5
from sparse_exp.yolov5.channels import build_detector

_log = logging.getLogger(__name__)
INITIAL = "initial weights"
_AS_SPARSE = 0.01  # share of zeros that an earlier checkpoint may lack of those that are deployed


@dataclass(frozen=True)
class Network:
    """A detector in floating point.

    Attributes:
        model: in evaluation mode.
        origin: where its weights come from, in words.
        checkpoint: its file; None where it has none of its own.
        trained: whether its weights mean something.
    """

    model: YOLOv5
    origin: str
    checkpoint: Path | None = None
    trained: bool = True


def dense_network(run: Run, checkpoint: Path, deployed: YOLOv5) -> Network:
    """The dense network in fp32 of the run's architecture and classes, with all the channels of its size.

    It is the run's dense counterpart, or what the run itself trained in floating point where that has no
    zeros, or failing both the architecture with initial weights: speed and size do not depend on their
    values, and no accuracy is claimed for it.

    Args:
        run: its training is finished.
        checkpoint: what it deploys.
        deployed: the same, restored.
    """
    for file, origin in _dense_candidates(run, checkpoint, deployed):
        try:
            model, _ = restore(file)
        except CheckpointError as error:  # of a start that was published elsewhere, or deleted meanwhile
            _log.warning("Not used as dense baseline: %s", error)
            continue
        alike = (model.size, model.num_classes) == (deployed.size, deployed.num_classes) and not model.widths
        if alike and not _is_quantized(model) and zeros(model) < SPARSE_FROM:
            return Network(model, origin, file)
    return Network(initial_network(deployed), INITIAL, trained=False)


def initial_network(alike: YOLOv5) -> YOLOv5:
    """A detector of the same size and classes with initial weights, always the same."""
    torch.manual_seed(0)
    return YOLOv5(alike.size, alike.num_classes).eval()


def _dense_candidates(run: Run, checkpoint: Path, deployed: YOLOv5) -> Iterator[tuple[Path, str]]:
    if baseline := run.baseline_checkpoint:
        yield baseline, f"the dense baseline {baseline}"
    own = run.before_quantization(checkpoint) if _is_quantized(deployed) else checkpoint
    if own:
        yield own, f"the run's own {own.name}"


def sparse_network(deployed: YOLOv5, before: Path | None) -> Network | str:
    """The sparse network as it was before it was quantized.

    It is the best checkpoint of the last phase in floating point; where there is none, as after a recipe
    that was applied at once, it is the deployed network without its quantizers.

    Args:
        deployed: what the run deploys.
        before: that checkpoint, see `sparse_exp.runs.directory.Run.before_quantization`.

    Returns:
        The network, or why there is none.
    """
    if not _is_quantized(deployed):
        return "The run does not quantize: its network in fp32 is the variant sparse."
    wanted = zeros(deployed)
    if wanted < SPARSE_FROM and not deployed.widths:
        return "The run's network has no zeros: in fp32 it is the variant dense."
    if before:
        model, _ = restore(before)
        alike = model.widths == deployed.widths
        if alike and not _is_quantized(model) and zeros(model) >= wanted - _AS_SPARSE:
            return Network(model, f"the run's own {before.name}", before)
    return Network(without_quantizers(deployed), "the deployed weights without quantizers")


@torch.no_grad()
def without_quantizers(model: YOLOv5) -> YOLOv5:
    """The same weights in floating point.

    Args:
        model: a detector after quantization has begun; left as it is.

    Returns:
        A detector in evaluation mode.
    """
    plain = build_detector(model.size, model.num_classes, model.widths).eval()
    state = model.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain


def zeros(model: YOLOv5) -> float:
    """Share of zeros in the prunable convolutions, 0..1."""
    return overall(layer_sparsity(model.prunable_convolutions()))


def _is_quantized(model: YOLOv5) -> bool:
    return is_quantized(list(model.state_dict()))

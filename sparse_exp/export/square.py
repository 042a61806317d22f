"""The square of a run: which file stands for each variant of the network in each engine.

====================================  =============================================================
file in ``deployment/``               what it is
====================================  =============================================================
``model.onnx``                        what the run deploys to DeepSparse: of a quantized network the
                                      graph of integer convolutions
``model.qdq.onnx``                    the same quantized network for the other engines, with quantize
                                      and dequantize nodes
``dense.onnx``                        the dense network in fp32: trained where the run has a dense
                                      counterpart or is dense itself, else with initial weights
``dense.int8.deepsparse.onnx``        the dense network calibrated through SparseML, as integer graph
``dense.int8.onnxruntime.onnx``       the same by ONNX Runtime's own static quantization
``dense.int8.openvino.xml, .bin``     the same by NNCF, as OpenVINO's own format
``sparse.fp32.onnx``                  the sparse network as it was before it was quantized
``dense.pt``, ``sparse.fp32.pt``      checkpoints of two of these networks, for torch
====================================  =============================================================

The export stage makes the files that ``hardware.variants`` and ``hardware.engines`` ask for, and notes
why others cannot be. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_exp.errors import Impossible, expected
from sparse_exp.sources.layout import BEFORE_QAT

if TYPE_CHECKING:
    from sparse_exp.runs.directory import StageRecord
    from sparse_exp.stages.base import Context

FOLDER = "deployment"
MODEL, QDQ, DENSE, SPARSE_FP32 = "model.onnx", "model.qdq.onnx", "dense.onnx", "sparse.fp32.onnx"
TORCH = "torch"
TORCH_INT8 = (
    "torch has no int8 convolutions for a network that was quantized in training or by another engine: "
    "it would simulate them in fp32"
)
_FLOATING_POINT = ("pruned", "pruning", "dense")  # phases, the last of a training first


def dense_int8(engine: str) -> str:
    """Name of the file of the dense network in int8 that an engine's own tool makes."""
    return f"dense.int8.{engine}.{'xml' if engine == 'openvino' else 'onnx'}"


def file_name(engine: str, variant: str) -> str:
    """Name below ``deployment/`` of the file of a cell; of the variant ``sparse`` see `Context.deployed`.

    Args:
        engine: one of `sparse_exp.config.schema.ENGINES`.
        variant: ``dense``, ``dense_int8`` or ``sparse_fp32``.
    """
    if variant == "dense_int8":
        return dense_int8(engine)
    onnx = {"dense": DENSE, "sparse_fp32": SPARSE_FP32}[variant]
    return onnx.replace(".onnx", ".pt") if engine == TORCH else onnx


def wanted_files(engines: Iterable[str], variants: Sequence[str]) -> list[str]:
    """Files that the export stage is asked for, beside those that it always makes: the deployed, the dense.

    Args:
        engines: of the hardware target.
        variants: likewise.

    Returns:
        Their names, sorted. Some of them may turn out to be impossible.
    """
    cells = [(engine, variant) for engine in engines for variant in variants if variant != "sparse"]
    files = {file_name(*cell) for cell in cells if cell != (TORCH, "dense_int8")}
    return sorted(files - {DENSE})


def model_for(context: Context, engine: str, variant: str) -> Path:
    """The file that a cell of the square runs.

    Args:
        context: of a run whose export stage is finished.
        engine: one of `sparse_exp.config.schema.ENGINES`.
        variant: one of `sparse_exp.config.schema.VARIANTS`.

    Returns:
        An ONNX file; ``.xml`` of OpenVINO's own format; for torch a checkpoint.

    Raises:
        Impossible: there can be no such file, or the export stage was not asked for it; says why.
    """
    if engine == TORCH:
        _require_possible_in_torch(context, variant)
    reasons = context.facts("export").get("impossible", {})
    name = context.deployed(engine).name if variant == "sparse" else file_name(engine, variant)
    if reason := reasons.get(name):
        raise Impossible(str(reason))
    file = context.deployed(engine) if variant == "sparse" else context.run.path / FOLDER / name
    if not file.is_file():
        do = f"Run the export stage with {variant} in hardware.variants and {engine} in hardware.engines."
        raise Impossible(expected(name, f"in {FOLDER}", "no such file", do))
    return file


def _require_possible_in_torch(context: Context, variant: str) -> None:
    quantized = (context.run.path / FOLDER / QDQ).is_file()
    if variant == "dense_int8" or (variant == "sparse" and quantized):
        raise Impossible(TORCH_INT8)


def before_quantization(checkpoint: Path, records: Mapping[str, StageRecord]) -> Path | None:
    """The best checkpoint of the last phase in floating point, which lies beside what is deployed.

    Args:
        checkpoint: what the run deploys: of its own training, or what ``checkpoint=`` names.
        records: of the run's stages, by name. Where it trained itself only what that training wrote counts.

    Returns:
        The file of a run's ``weights`` or of a published model; None where there is none.
    """
    names = [*(f"best_{phase}.pt" for phase in _FLOATING_POINT), BEFORE_QAT]
    if "train" in records:
        names = [name for name in names if f"weights/{name}" in records["train"].outputs]
    return next((file for file in map(checkpoint.with_name, names) if file.is_file()), None)


def weights_are_trained(context: Context, variant: str) -> bool:
    """Whether a variant's weights mean something: those of the dense baseline may be initial ones."""
    trained = bool(context.facts("export").get("dense", {}).get("trained"))
    return trained or not variant.startswith("dense")


def size_prefix(file: str) -> str | None:
    """What the names of a file's sizes begin with after ``size/``; None of a file whose sizes have none.

    Args:
        file: name of an exported file.
    """
    if file.startswith("dense.int8."):
        return f"dense_int8/{file.split('.')[2]}/"
    return {MODEL: "", QDQ: "qdq/", DENSE: "dense_", SPARSE_FP32: "sparse_fp32/"}.get(file)


def accuracy_prefix(engine: str, variant: str) -> str:
    """What the names of a cell's accuracies begin with; what the run deploys is named by its engine alone."""
    return f"deployed/{engine}/" if variant == "sparse" else f"deployed/{engine}/{variant}/"

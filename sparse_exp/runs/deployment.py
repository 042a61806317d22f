"""The files of a deployment directory: which file stands for each variant of the network in each engine.

====================================  =============================================================
file in ``deployment/``               what it is
====================================  =============================================================
``model.onnx``                        what the run deploys to DeepSparse: of a quantized network the
                                      graph of integer convolutions
``model.qdq.onnx``                    the same quantized network for OpenVINO and others, with quantize and
                                      dequantize nodes at the inputs of convolutions and additions
``model.onnxruntime.onnx``            the same for ONNX Runtime, with such nodes behind every operator but
                                      the head's
``dense.onnx``                        the dense network in fp32: trained where the run has a dense
                                      counterpart or is dense itself, else with initial weights
``dense.int8.deepsparse.onnx``        the dense network calibrated by this project, as integer graph
``dense.int8.onnxruntime.onnx``       the same by ONNX Runtime's own static quantization
``dense.int8.openvino.xml, .bin``     the same by NNCF, as OpenVINO's own format
``sparse.fp32.onnx``                  the sparse network as it was before it was quantized
``dense.pt``, ``sparse.fp32.pt``      checkpoints of two of these networks, for torch
``class_names.json``                  names of the classes; of published models only
====================================  =============================================================

No other module spells these names. The export stage makes the files that ``hardware.variants`` and
``hardware.engines`` ask for, and notes why others cannot be made. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparse_exp.config.runtimes import RUNTIMES
from sparse_exp.errors import Impossible, expected
from sparse_exp.files import parse_json

FOLDER = "deployment"
MODEL, QDQ, ONNXRUNTIME = "model.onnx", "model.qdq.onnx", "model.onnxruntime.onnx"
DENSE, SPARSE_FP32 = "dense.onnx", "sparse.fp32.onnx"
CLASS_NAMES = "class_names.json"
TORCH = "torch"
# Of the deployed network, which file an engine runs fast; where that is missing, the next.
_CHOICES = {"deepsparse": (MODEL, QDQ), "onnxruntime": (ONNXRUNTIME, QDQ, MODEL), "openvino": (QDQ, MODEL)}
CHECKPOINTS = {"dense": "dense.pt", "sparse_fp32": "sparse.fp32.pt"}  # for torch, by variant
_NO_INT8 = {
    "torch": "torch has no int8 convolutions for a network that was quantized in training or by another "
    "engine: it would simulate them in fp32",
    "mnn": "mnn runs no quantized ONNX file: deploy a network in fp32, as recipe=transfer does",
}


@dataclass(frozen=True)
class Deployment:
    """The exported files of a run or of a published model, or a directory with an ONNX file of ours.

    Attributes:
        folder: where they lie; it need not exist.
        checkpoint: what they were exported from, which torch runs; None where that is not known.
        impossible: why a file could not be made, by its name.
        dense_is_trained: whether the weights of the dense network mean something; initial ones do not.
    """

    folder: Path
    checkpoint: Path | None = None
    impossible: Mapping[str, str] = field(default_factory=dict)
    dense_is_trained: bool = False

    @property
    def model(self) -> Path:
        """``model.onnx``: what the run deploys to DeepSparse."""
        return self.folder / MODEL

    @property
    def qdq(self) -> Path:
        """``model.qdq.onnx``, which only a quantized network has."""
        return self.folder / QDQ

    @property
    def onnxruntime(self) -> Path:
        """``model.onnxruntime.onnx``, which a quantized network has that images could be shown to."""
        return self.folder / ONNXRUNTIME

    @property
    def dense(self) -> Path:
        """``dense.onnx``: the dense network in fp32."""
        return self.folder / DENSE

    @property
    def class_names(self) -> Path:
        """``class_names.json``: a JSON list."""
        return self.folder / CLASS_NAMES

    @property
    def quantized(self) -> bool:
        """Whether the deployed network was quantized."""
        return self.qdq.is_file()

    @property
    def files(self) -> list[Path]:
        """All files of exported graphs but OpenVINO's ``.bin``, by name."""
        paths = (self.folder / name for name in _OURS if name.endswith((".onnx", ".xml")))
        return sorted(path for path in paths if path.is_file())

    @property
    def deployed_files(self) -> list[Path]:
        """Those of them that the run deploys: ``model.onnx`` and, of a quantized network, the QDQ graphs."""
        return [path for path in (self.model, self.qdq, self.onnxruntime) if path.is_file()]

    @property
    def names(self) -> tuple[str, ...]:
        """The class names in ``class_names.json``; empty where there is no such list."""
        try:
            names = parse_json(self.class_names.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ()
        return tuple(map(str, names)) if isinstance(names, list) else ()

    def deployed(self, engine: str) -> Path:
        """The file of the variant ``sparse`` that an engine runs fast; it may not be there.

        Args:
            engine: one of `sparse_exp.config.schema.ENGINES`. Each takes the graph that was made for it, or
                another where that is missing; torch takes the checkpoint.
        """
        if engine == TORCH and self.checkpoint is not None:
            return self.checkpoint
        choices = [self.folder / name for name in _CHOICES.get(engine, (QDQ, MODEL))]
        return next((path for path in choices if path.is_file()), self.model)

    def file(self, engine: str, variant: str) -> Path:
        """The file of a variant that an engine runs.

        Args:
            engine: one of `sparse_exp.config.schema.ENGINES`.
            variant: one of `sparse_exp.config.schema.VARIANTS`.

        Returns:
            An ONNX file; ``.xml`` of OpenVINO's own format; for torch a checkpoint.

        Raises:
            Impossible: there can be no such file, or the export stage was not asked for it; says why.
        """
        needs_int8 = variant == "dense_int8" or (variant == "sparse" and self.quantized)
        if needs_int8 and engine in _NO_INT8:
            raise Impossible(_NO_INT8[engine])
        path = self.deployed(engine) if variant == "sparse" else self.folder / file_name(engine, variant)
        if reason := self.impossible.get(path.name):
            raise Impossible(str(reason))
        if not path.is_file():
            do = f"Run the export stage with {variant} in hardware.variants and {engine} in hardware.engines."
            raise Impossible(expected(path.name, f"in {FOLDER}", "no such file", do))
        return path

    def is_trained(self, variant: str) -> bool:
        """Whether a variant's weights mean something: those of the dense network may be initial ones."""
        return self.dense_is_trained or not variant.startswith("dense")

    def clear(self) -> None:
        """Remove the files of an earlier export, some of which may no longer be made, and no others."""
        for name in _OURS:
            (self.folder / name).unlink(missing_ok=True)


def dense_int8(engine: str) -> str:
    """Name of the file of the dense network in int8 that an engine's own tool makes."""
    return f"dense.int8.{engine}.{'xml' if engine == 'openvino' else 'onnx'}"


_DENSE_INT8 = [dense_int8(engine) for engine in RUNTIMES]
_OURS = (
    MODEL, QDQ, ONNXRUNTIME, DENSE, SPARSE_FP32, *CHECKPOINTS.values(), *_DENSE_INT8,
    *(f"{name.removesuffix('.xml')}.bin" for name in _DENSE_INT8 if name.endswith(".xml")),
)  # fmt: skip


def file_name(engine: str, variant: str) -> str:
    """Name of the file of a variant in an engine; for the variant ``sparse`` see `Deployment.deployed`.

    Args:
        engine: one of `sparse_exp.config.schema.ENGINES`.
        variant: ``dense``, ``dense_int8`` or ``sparse_fp32``.
    """
    if variant == "dense_int8":
        return dense_int8(engine)
    return CHECKPOINTS[variant] if engine == TORCH else {"dense": DENSE, "sparse_fp32": SPARSE_FP32}[variant]


def wanted_files(engines: Iterable[str], variants: Sequence[str]) -> list[str]:
    """Files that the export stage is asked for, beside those that it always makes: the deployed, the dense.

    Args:
        engines: of the hardware target.
        variants: likewise.

    Returns:
        Their names, sorted. Some of them may turn out to be impossible.
    """
    pairs = [(engine, variant) for engine in engines for variant in variants if variant != "sparse"]
    files = {file_name(*pair) for pair in pairs if pair[0] not in _NO_INT8 or pair[1] != "dense_int8"}
    return sorted(files - {DENSE})


def size_prefix(file: str) -> str | None:
    """The part between ``size/`` and the last part of the names of a file's sizes; None if it has none.

    Args:
        file: name of an exported file.
    """
    if file.startswith("dense.int8."):
        return f"dense_int8/{file.split('.')[2]}/"
    names = {
        MODEL: "",
        QDQ: "qdq/",
        ONNXRUNTIME: "onnxruntime/",
        DENSE: "dense_",
        SPARSE_FP32: "sparse_fp32/",
    }
    return names.get(file)


def accuracy_prefix(engine: str, variant: str) -> str:
    """The beginning of the names of accuracies; for the deployed variant it names the engine alone."""
    return f"deployed/{engine}/" if variant == "sparse" else f"deployed/{engine}/{variant}/"

"""The engines' own post-training quantization of a dense network: the fair int8 baseline of each.

The one door to the quantizers of ONNX Runtime and OpenVINO (NNCF). Both look at images of the training
split to find the ranges of activations. What follows the last convolutions, the decoding of boxes, stays
in floating point: rounded to 8 bits, boxes would be off by pixels.

Settings are those that keep accuracy at full speed. On 24 validation tiles mAP50 of the trees' dense yolov5s
(320 px) is 0.599 in fp32, 0.601 by ONNX Runtime's quantization and 0.599 by NNCF's; it is 0.570 without ONNX
Runtime's moving averages and with its head in int8, and 0.583 with NNCF's without the exception.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from sparse_exp.engines.base import silence
from sparse_exp.engines.openvino import import_openvino
from sparse_exp.export.graph import decoding_nodes
from sparse_exp.files import full_disk_told, landing
from sparse_exp.runs.metadata import write_metadata

Images = Sequence[NDArray[np.uint8]]


def quantize_onnxruntime(dense: Path, destination: Path, images: Images, metadata: dict[str, str]) -> None:
    """Quantize by ONNX Runtime's static quantization.

    As its documentation advises for CPUs: pairs of quantize and dequantize nodes, uint8 activations, int8
    weights per output channel, and these to 7 bits: without VNNI its kernels add two products in 16 bits,
    which 8-bit weights overflow. Ranges are moving averages over the batches. All operators are quantized
    but the head's convolutions and the decoding, since ONNX Runtime computes a convolution on integers only
    where its output is quantized too, and what the head puts out is too coarse in 8 bits.

    Args:
        dense: ONNX file in fp32.
        destination: ONNX file to write.
        images: batches, uint8 (N, 3, S, S), to calibrate with.
        metadata: entries of the file; the quantizer drops those of ``dense``.
    """
    with (
        silence(),
        tempfile.TemporaryDirectory() as folder,
        landing(destination) as temporary,
        full_disk_told(2 * dense.stat().st_size, Path(folder), temporary.parent),
    ):
        from onnxruntime import quantization
        from onnxruntime.quantization import shape_inference

        prepared = Path(folder) / "prepared.onnx"
        shape_inference.quant_pre_process(str(dense), str(prepared), skip_symbolic_shape=True)
        graph = onnx.load(str(prepared)).graph
        name = graph.input[0].name
        quantization.quantize_static(
            str(prepared),
            str(temporary),
            _reader(quantization, [{name: batch} for batch in images]),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            extra_options={"CalibMovingAverage": True},
            nodes_to_exclude=[node.name for node in decoding_nodes(graph, with_head=True)],
        )
        write_metadata(temporary, metadata)


def quantize_openvino(dense: Path, destination: Path, images: Images) -> None:
    """Quantize by NNCF, into OpenVINO's own format.

    Its MIXED preset, which is meant for activations with negative values such as those of SiLU: symmetric
    weights, asymmetric activations. The entries of ``dense`` go along (see `sparse_exp.runs.metadata`).

    Args:
        dense: ONNX file in fp32.
        destination: ``.xml`` to write; the weights go beside it, as ``.bin``.
        images: as of `quantize_onnxruntime`.
    """
    with silence(), landing(destination.with_suffix(".bin")) as weights, landing(destination) as graph:
        openvino = import_openvino()  # before NNCF, which imports it too
        import nncf

        logging.getLogger("nncf").setLevel(logging.ERROR)
        decoding = [node.name for node in decoding_nodes(onnx.load(str(dense)).graph)]
        quantized = nncf.quantize(
            openvino.Core().read_model(str(dense)),
            nncf.Dataset([image[None] for batch in images for image in batch]),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            subset_size=sum(map(len, images)),
            ignored_scope=nncf.IgnoredScope(names=decoding, validate=False),
        )
        with full_disk_told(dense.stat().st_size, graph.parent):
            openvino.serialize(quantized, str(graph), str(weights))


def _reader(quantization: Any, feeds: list[dict[str, NDArray[np.uint8]]]) -> Any:
    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter(feeds)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            return next(self._feeds, None)

    return Reader()

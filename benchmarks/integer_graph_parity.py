"""Record the integer graphs that SparseML 1.8.0 makes, for tests/unit/export/test_integer.py.

    python benchmarks/integer_graph_parity.py         writes tests/data/integer-graph/

It runs where SparseML is installed. Of a small network with each kind of layer that a detector has, once
with scales per tensor and once per channel, it writes two files: ``*.pairs.onnx``, the graph of
quantize-dequantize pairs as PyTorch exports it, and ``*.sparseml.onnx``, what SparseML makes of it. The test
makes an integer graph of the first, holds it against the second, and needs no SparseML.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

os.environ["NM_DISABLE_ANALYTICS"] = "True"
warnings.simplefilter("ignore")

import onnx  # noqa: E402
import torch  # noqa: E402
from onnx import TensorProto  # noqa: E402
from sparseml.exporters.onnx_to_deepsparse import ONNXToDeepsparse  # type: ignore[import-untyped]  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import conv2d, interpolate, max_pool2d, silu  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "data" / "integer-graph"
SIDE, OPSET = 16, 13


class Quantizer(nn.Module):
    """Rounds to 8 bits as PyTorch's quantized layers do: -128 stands for ``low``, 127 for ``high``."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        scale = (high - low) / 255
        self.register_buffer("scale", torch.tensor([scale]))
        self.register_buffer("zero", torch.tensor([round(-128 - low / scale)], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape."""
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, -128, 127)


class Convolution(nn.Module):
    """A convolution with a rounded weight and a bias; half of the weights are 0."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, *, per_channel: bool) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs, size, size) * (2 / (inputs * size**2)) ** 0.5
        self.weight = nn.Parameter(weight * (torch.rand_like(weight) > 0.5))
        self.bias = nn.Parameter(torch.randn(outputs) / 4)
        largest = self.weight.detach().abs().amax((1, 2, 3) if per_channel else (0, 1, 2, 3)).reshape(-1)
        self.register_buffer("scale", largest / 127.5)
        self.register_buffer("zero", torch.zeros(len(largest), dtype=torch.int32))
        self.stride, self.padding = stride, size // 2

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, inputs, H, W), rounded."""
        if len(self.scale) > 1:
            weight = torch.fake_quantize_per_channel_affine(self.weight, self.scale, self.zero, 0, -128, 127)
        else:
            weight = torch.fake_quantize_per_tensor_affine(self.weight, self.scale, self.zero, -128, 127)
        return conv2d(x, weight, self.bias, self.stride, self.padding)


class Network(nn.Module):
    """A stem, a residual block, pooling, upsampling, a concatenation and a head."""

    def __init__(self, *, per_channel: bool) -> None:
        super().__init__()
        self.pixels, self.stem = Quantizer(0.0, 1.0), Convolution(3, 8, 5, 2, per_channel=per_channel)
        self.left, self.first = Quantizer(-0.3, 2.0), Convolution(8, 8, 3, 1, per_channel=per_channel)
        self.right, self.second = Quantizer(-0.3, 1.5), Convolution(8, 8, 1, 1, per_channel=per_channel)
        self.joined, self.head = Quantizer(-0.5, 3.0), Convolution(16, 6, 1, 1, per_channel=per_channel)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, 16, 16) in 0..1 to (N, 64, 6)."""
        x = silu(self.stem(self.pixels(images)))
        x = self.left(x) + self.right(silu(self.first(self.left(x))))
        y = silu(self.second(self.right(x)))
        y = interpolate(max_pool2d(y, 3, 2, 1), scale_factor=2, mode="nearest")
        maps: Tensor = self.head(self.joined(torch.cat([x, y], 1)))
        return maps.flatten(2).transpose(1, 2).sigmoid()


class Pixels(nn.Module):
    """Reads uint8 images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (N, 3, 16, 16)."""
        predictions: Tensor = self.network(images.float() * (1.0 / 255.0))
        return predictions


def main() -> None:
    """Write the record."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, per_channel in (("tensor", False), ("channel", True)):
        torch.manual_seed(0)
        network, images = Network(per_channel=per_channel).eval(), torch.zeros(1, 3, SIDE, SIDE)
        export(Pixels(network), images.to(torch.uint8), FOLDER / f"{name}.pairs.onnx")
        path = FOLDER / f"{name}.sparseml.onnx"
        export(network, images, path)
        model = ONNXToDeepsparse(skip_input_quantize=True, inplace=True).apply(onnx.load(str(path)))
        if model.graph.input[0].type.tensor_type.elem_type != TensorProto.UINT8:
            raise RuntimeError("SparseML kept the quantizer of the input")
        onnx.save(model, str(path))


def export(module: nn.Module, images: Tensor, path: Path) -> None:
    """Write a graph of pairs, with any batch."""
    torch.onnx.export(
        module,
        (images,),
        str(path),
        dynamo=False,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["predictions"],
        dynamic_axes={"images": {0: "batch"}, "predictions": {0: "batch"}},
    )


if __name__ == "__main__":
    main()

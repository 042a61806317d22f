"""How long an engine takes for a convolution alone, by its share of zeros: measured once, then looked up.

Each layer is measured in a network of its own, which makes an input of the layer's size, convolves it, and
sums the output up; what such a network without the layer takes is taken off. Layers of one shape share a
measurement. The times are kept in a file for each host, engine, load and form of the layers; one that holds
those of another version of the engine is not used.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_exp.benchmark.host_state import free_cpus
from sparse_exp.engines import IsolatedEngine
from sparse_exp.files import fingerprint, read_json, remove_left_parts, write_json
from sparse_exp.hardware import host_facts, physical_cpus
from sparse_exp.locks import default_lock_path, measuring_alone
from sparse_exp.progress import progress

if TYPE_CHECKING:
    from onnx import ModelProto

    from sparse_exp.sparsity.prune import Block

SPARSITIES = (0.0, 0.5, 0.65, 0.75, 0.85, 0.9, 0.95)
"""Shares of zeros that layers are measured with."""

_log = logging.getLogger(__name__)
_FORMAT = 1
_PIXELS = 32  # side of the image, of which only the mean counts
_COPIES = 4  # of the layer in its network: what one of them takes is little disturbed by what is around
_SCALE = np.float32(1 / 127)
_OPSET, _IR_VERSION = 13, 8
_TURNS, _SECONDS, _WARMUP, _MAX_WARMUP = 3, 0.1, 0.02, 0.3


@dataclass(frozen=True)
class LayerShape:
    """What a convolution's time depends on, beside its zeros. Its padding is half the kernel's size.

    Attributes:
        inputs: channels.
        outputs: channels.
        kernel: height and width.
        stride: in both directions.
        groups: of channels.
        height: of the input map.
        width: of the input map.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: int
    groups: int
    height: int
    width: int

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel))
        groups = f" groups {self.groups}" if self.groups > 1 else ""
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.inputs}->{self.outputs} {kernel}{stride}{groups} on {self.height}x{self.width}"


@dataclass(frozen=True)
class Table:
    """Where and how layers are measured.

    Attributes:
        engine: one of `sparse_exp.config.schema.ENGINES`.
        batch_size: images of one inference.
        cores: physical cores, one thread on each.
        block: output and input channels whose zeros stand together, as in `sparse_exp.sparsity.prune.blocks`.
        quantized: whether layers compute in int8, between pairs that quantize; else in fp32.
        pinning: as ``hardware.pinning``.
    """

    engine: str
    batch_size: int
    cores: int
    block: Block = (1, 1)
    quantized: bool = False
    pinning: bool = True

    def file(self, folder: Path) -> Path:
        """The file that keeps its times on this host."""
        facts = host_facts()
        return folder / f"{fingerprint(asdict(self), facts.cpu, facts.isa, facts.usable_cores, _FORMAT)}.json"


class LayerTimes:
    """The times of layers and networks on this host: kept in a file, or measured now and kept.

    Args:
        table: where and how they are measured.
        folder: of such files.

    Raises:
        SparseExpError: the engine cannot be had, or does not run here.
    """

    def __init__(self, table: Table, folder: Path) -> None:
        self._table, self._file = table, table.file(folder)
        with tempfile.TemporaryDirectory() as probe:
            file = _write(_network(LayerShape(8, 8, (1, 1), 1, 1, 8, 8), None, table), Path(probe) / "0.onnx")
            with closing(self._opened(file, None)) as engine:
                self.version = engine.version

    def layers(self, shapes: Collection[LayerShape]) -> dict[LayerShape, list[float]]:
        """The times of layers in ms for a batch, each a list in the order of `SPARSITIES`.

        Args:
            shapes: of the layers; those of which nothing is known are measured.

        Raises:
            SparseExpError: the engine cannot run such a layer.
        """
        distinct, known = list(dict.fromkeys(shapes)), self._kept("layers")
        missing = [shape for shape in distinct if str(shape) not in known]
        if missing:
            message = "Measuring layers of %d shapes with 0 to %.0f %% zeros in %s %s, once for this host."
            _log.info(message, len(missing), 100 * SPARSITIES[-1], self._table.engine, self.version)
        with progress("Measuring layers", total=len(missing), unit="shapes") as bar:
            for shape in missing:
                bar.advance(0, note=str(shape))
                known[str(shape)] = self._measured(shape)
                self._keep("layers", str(shape), known[str(shape)])
                bar.advance()
        return {shape: known[str(shape)] for shape in distinct}

    def network(self, kind: str, make: Callable[[Path], None], images: np.ndarray) -> float:
        """The time of a whole network in ms for a batch.

        Args:
            kind: what networks have in common that take the same time.
            make: writes the ONNX file of such a network; called where it is to be measured.
            images: uint8 (N, 3, H, W); a batch is taken from them.

        Raises:
            SparseExpError: the engine cannot run it.
        """
        known = self._kept("networks")
        if kind not in known:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "network.onnx"
                make(file)
                known[kind] = self._timed([file], images)[0]
            self._keep("networks", kind, known[kind])
        return float(known[kind])

    def _measured(self, shape: LayerShape) -> list[float]:
        """The time with each share of zeros, less that of what is around the layer."""
        images = np.random.default_rng(0).integers(0, 256, (1, 3, _PIXELS, _PIXELS), np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            files = [
                _write(_network(shape, sparsity, self._table), Path(folder) / f"{number}.onnx")
                for number, sparsity in enumerate((None, *SPARSITIES))
            ]
            around, *times = self._timed(files, images)
        return [max(0.0, time - around) / _COPIES for time in times]

    def _timed(self, files: Sequence[Path], images: np.ndarray) -> list[float]:
        """Milliseconds for a batch, of each file the least of a few turns: what disturbs only adds time."""
        batch = np.resize(images, (self._table.batch_size, *images.shape[1:]))
        with measuring_alone(default_lock_path()), ExitStack() as stack:
            cpus = free_cpus(physical_cpus(), self._table.cores) if self._table.pinning else None
            engines = [stack.enter_context(closing(self._opened(file, cpus))) for file in files]
            turns = [
                [_milliseconds(engine, batch, first=turn == 0) for engine in engines]
                for turn in range(_TURNS)
            ]
        return [min(times) for times in zip(*turns, strict=True)]

    def _opened(self, file: Path, cpus: Sequence[int] | None) -> IsolatedEngine:
        engine = IsolatedEngine(self._table.engine)
        engine.load(file, batch_size=self._table.batch_size, cores=self._table.cores, pin=cpus)
        return engine

    def _kept(self, what: str) -> dict[str, Any]:
        """What the file holds of this version of the engine."""
        kept = read_json(self._file)
        found = kept.get(what) if kept.get("version") == self.version else None
        return dict(found) if isinstance(found, dict) else {}

    def _keep(self, what: str, name: str, value: Any) -> None:
        """Add to the file; another process may have done so meanwhile."""
        both = {each: self._kept(each) for each in ("layers", "networks")}
        both[what][name] = value
        facts = {"cpu": host_facts().cpu, **asdict(self._table), "version": self.version}
        remove_left_parts(self._file.parent)
        write_json(self._file, {**facts, "sparsities": SPARSITIES, **both})


def _milliseconds(engine: IsolatedEngine, batch: np.ndarray, *, first: bool) -> float:
    timing = engine.measure(batch, _SECONDS, warmup=_WARMUP, max_warmup=_MAX_WARMUP if first else None)
    return 1e3 * float(np.median(timing.latencies))


def _write(model: ModelProto, file: Path) -> Path:
    import onnx  # not at the top: benchmarks need it nowhere else

    onnx.save(model, str(file))
    return file


def _network(shape: LayerShape, sparsity: float | None, table: Table) -> ModelProto:
    """A network around one layer, which engines take for a detector: uint8 images in, float32 (N, 1, O) out.

    Args:
        shape: of the layer.
        sparsity: its share of zeros; None: the network without the layer.
        table: batch and form.
    """
    from onnx import TensorProto, helper, numpy_helper  # type: ignore[attr-defined]

    random, batch = np.random.default_rng(0), table.batch_size
    features = random.standard_normal((1, shape.inputs, shape.height, shape.width)).astype(np.float32)
    arrays: dict[str, np.ndarray] = {"features": features}
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Add", ["mean", "features"], ["input"]),
    ]
    last, outputs = "input", shape.inputs
    if sparsity is not None:
        form: dict[str, Any] = {
            "kernel_shape": list(shape.kernel),
            "pads": [side // 2 for side in shape.kernel] * 2,
            "strides": [shape.stride] * 2,
            "group": shape.groups,
        }
        arrays |= {"zero": np.array(128, np.uint8), "no": np.array(0, np.int8), "scale": np.array(_SCALE)}
        if table.quantized:
            nodes.append(helper.make_node("QuantizeLinear", [last, "scale", "zero"], ["steps"]))
        for copy in range(_COPIES):
            weights, name = f"weights{copy}", f"output{copy}"
            arrays[weights] = _weights(shape, sparsity, table.block, random)
            if table.quantized:
                arrays[weights] = np.rint(arrays[weights] * 63).astype(np.int8)
                nodes += [
                    helper.make_node(
                        "ConvInteger", ["steps", weights, "zero", "no"], [f"sums{copy}"], **form
                    ),
                    helper.make_node("Cast", [f"sums{copy}"], [f"floats{copy}"], to=TensorProto.FLOAT),
                    helper.make_node("Mul", [f"floats{copy}", "scale"], [name]),
                ]
            else:
                nodes.append(helper.make_node("Conv", ["input", weights], [name], **form))
            if copy:
                nodes.append(helper.make_node("Add", [last, name], [f"sum{copy}"]))
            last = f"sum{copy}" if copy else name
        outputs = shape.outputs
    arrays["sizes"] = np.array([batch, 1, outputs], np.int64)
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Reshape", ["pooled", "sizes"], ["predictions"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 3, _PIXELS, _PIXELS])
    given = helper.make_tensor_value_info("predictions", TensorProto.FLOAT, [batch, 1, outputs])
    used = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used]
    graph = helper.make_graph(nodes, "layer", [images], [given], constants)
    opset = helper.make_opsetid("", _OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION)


def _weights(shape: LayerShape, sparsity: float, block: Block, random: np.random.Generator) -> np.ndarray:
    """Random weights (O, I, height, width) without a zero but those of a share of their blocks."""
    channels = shape.inputs // shape.groups
    whole = shape.outputs % block[0] == 0 and channels % block[1] == 0
    rows, columns = block if whole else (1, 1)
    kept = np.ones((shape.outputs // rows, channels // columns, *shape.kernel), bool)
    pruned = random.permutation(kept.size)[: round(sparsity * kept.size)]
    kept.reshape(-1)[pruned] = False
    weights = random.choice([-1.0, 1.0], (shape.outputs, channels, *shape.kernel))
    weights *= random.uniform(0.1, 2.0, weights.shape)
    return np.where(kept.repeat(rows, 0).repeat(columns, 1), weights, 0.0).astype(np.float32)

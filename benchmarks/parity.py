"""Compare our items per second for one ONNX file with those of the runtimes' own benchmark programs.

``deepsparse.benchmark`` and OpenVINO's ``benchmark_app`` run with the same settings as ours: the same file,
batch, cores (the process is kept to the same CPUs), streams, warm-up and seconds; threads are bound to cores
where the program binds them. They run in turns, each time in a new process. Our inputs are those of the
programs: deepsparse.benchmark rounds its random numbers down to pixels that are all 0, benchmark_app takes
random pixels.

    python benchmarks/parity.py                                  # YOLOv5n, 640 px, made on the fly; 7 minutes
    python benchmarks/parity.py --model RUN/deployment/model.onnx --tools deepsparse --batches 1 32

The exit code is 1 if a ratio is not within 5 % of 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_exp.command import Parser, run_command, whole
from sparse_exp.engines import IsolatedEngine
from sparse_exp.engines.signature import read_signature
from sparse_exp.errors import ConfigError, EngineError, expected, first_line
from sparse_exp.files import write_json
from sparse_exp.hardware import host_facts, physical_cpus
from sparse_exp.hardware.deepsparse import require_python
from sparse_exp.locks import default_lock_path, measuring_alone

_WITHIN = 0.05
_WARMUP_S = 2
# Does what the programs' console scripts do, on the given CPUs. The package `without` seems to be missing:
# openvino_telemetry, which would report to OpenVINO's maker, or torch, which would be imported for nothing.
_RUN = """
import os, sys
cpus, without, module, *sys.argv[1:] = sys.argv[1:]
os.sched_setaffinity(0, map(int, cpus.split(",")))
sys.modules[without] = None
from importlib import import_module
sys.exit(import_module(module).main())
"""


@dataclass
class ParityCase:
    """One comparison.

    Attributes:
        tool: engine whose program it is: deepsparse or openvino.
        scenario: sync or async.
        batch: images of one inference.
        streams: inferences at once.
        theirs: items/s of the program, round by round.
        ours: items/s of `IsolatedEngine.measure`, round by round.
    """

    tool: str
    scenario: str
    batch: int
    streams: int
    theirs: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Ours over theirs, of the medians."""
        return float(np.median(self.ours) / np.median(self.theirs))

    @property
    def close(self) -> bool:
        """Whether both are equal within `_WITHIN`."""
        return abs(self.ratio - 1) <= _WITHIN


def main() -> int:
    """Measure and print a table; 1 if a case differs."""
    options = _options()
    cpus = physical_cpus()[: options.cores]
    if options.cores and len(cpus) < options.cores:
        do = "Leave it out to use them all."
        raise ConfigError(expected("--cores", f"at most the {len(cpus)} of this host", options.cores, do))
    cases = list(_cases(options, len(cpus)))
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or _yolov5n(Path(scratch) / "yolov5n.onnx", options.imgsz)
        with measuring_alone(default_lock_path()):
            for turn in range(options.rounds):
                for case in cases:
                    _measure(case, model, cpus, options.seconds, Path(scratch), ours_first=turn % 2 == 0)
                    print(f"round {turn + 1}: {_row(case)}", file=sys.stderr, flush=True)
    cpu = f"{len(cpus)} cores of {host_facts().cpu}"
    print(f"{model.name}, {cpu}, {options.seconds} s, {options.rounds} rounds\n")
    print("| program | scenario | batch | streams | its items/s | our items/s | ours / its | within 5 % |")
    print("\n".join(["|---|---|---|---|---|---|---|---|", *map(_row, cases)]))
    if options.json:
        write_json(
            options.json, [{**vars(case), "ratio": case.ratio, "within": case.close} for case in cases]
        )
    return 0 if all(case.close for case in cases) else 1


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="ONNX file; by default YOLOv5n with random weights")
    parser.add_argument("--imgsz", type=whole, default=640, help="side of YOLOv5n's images, px")
    parser.add_argument(
        "--tools", nargs="+", default=["deepsparse", "openvino"], choices=["deepsparse", "openvino"]
    )
    parser.add_argument("--scenarios", nargs="+", default=["sync", "async"], choices=["sync", "async"])
    parser.add_argument("--batches", nargs="+", type=whole, default=[1], help="batch sizes")
    parser.add_argument("--cores", type=whole, help="physical cores; by default all")
    parser.add_argument("--streams", type=whole, help="of async; by default one per core")
    parser.add_argument("--seconds", type=whole, default=5, help="of one measurement")
    parser.add_argument("--rounds", type=whole, default=5, help="measurements of each, in turns")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the measurements here")
    return parser.parse_args()


def _cases(options: argparse.Namespace, cores: int) -> Iterator[ParityCase]:
    for tool in options.tools:
        for scenario in options.scenarios:
            for batch in options.batches:
                yield ParityCase(tool, scenario, batch, 1 if scenario == "sync" else options.streams or cores)


def _yolov5n(path: Path, imgsz: int) -> Path:
    """Export a YOLOv5n with random weights. Torch is imported here, since ``--model`` does without it."""
    import torch

    from sparse_exp.export.onnx import FileForm, export_float
    from sparse_exp.yolov5 import YOLOv5

    torch.manual_seed(0)
    export_float(YOLOv5("n", 80).eval(), path, FileForm(imgsz, opset=13))
    return path


def _measure(
    case: ParityCase, model: Path, cpus: Sequence[int], seconds: int, scratch: Path, *, ours_first: bool
) -> None:
    program = _deepsparse_benchmark if case.tool == "deepsparse" else _benchmark_app
    for ours in (ours_first, not ours_first):
        if ours:
            case.ours.append(_ours(case, model, cpus, seconds))
        else:
            case.theirs.append(program(case, model, cpus, seconds, scratch))


def _ours(case: ParityCase, model: Path, cpus: Sequence[int], seconds: int) -> float:
    images = _images(case, model)
    options: dict[str, Any] = {"bind_threads": True} if case.tool == "deepsparse" else {}
    with closing(IsolatedEngine(case.tool)) as engine:
        engine.load(
            model, batch_size=case.batch, cores=len(cpus), streams=case.streams, options=options, pin=cpus
        )
        engine.run(images)
        warmup = _WARMUP_S if case.tool == "deepsparse" else 0  # benchmark_app runs once
        timing = engine.measure(images, seconds, warmup=warmup, streams=case.streams)
    return case.batch * len(timing.latencies) / timing.wall


def _images(case: ParityCase, model: Path) -> NDArray[np.uint8]:
    """One batch, uint8 (N, 3, H, W), of the same kind of pixels as the program's."""
    shape = (case.batch, 3, *(read_signature(model).size or (0, 0)))
    if case.tool == "deepsparse":
        return np.zeros(shape, np.uint8)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _deepsparse_benchmark(
    case: ParityCase, model: Path, cpus: Sequence[int], seconds: int, scratch: Path
) -> float:
    report = scratch / "deepsparse.json"
    arguments = [
        *(model, "--batch_size", case.batch, "--num_cores", len(cpus), "--scenario", case.scenario),
        *("--num_streams", case.streams, "--time", seconds, "--warmup_time", _WARMUP_S),
        *("--thread_pinning", "core", "--export_path", report, "--quiet"),
    ]
    _run(require_python(), "deepsparse.benchmark.benchmark_model", "torch", cpus, arguments)
    result = json.loads(report.read_text(encoding="utf-8"))["benchmark_result"]
    return float(result["items_per_sec"])


def _benchmark_app(case: ParityCase, model: Path, cpus: Sequence[int], seconds: int, scratch: Path) -> float:
    height, width = read_signature(model).size or (0, 0)
    arguments = [
        *("-m", model, "-d", "CPU", "-shape", f"[{case.batch},3,{height},{width}]"),
        *("-infer_precision", "f32"),
        *("-hint", "none", "-nthreads", len(cpus), "-nstreams", case.streams, "-nireq", case.streams),
        *("-api", case.scenario, "-t", seconds),
    ]
    output = _run(sys.executable, "openvino.tools.benchmark.main", "openvino_telemetry", cpus, arguments)
    found = re.search(r"Throughput:\s*([\d.]+) FPS", output)
    if found is None:
        raise EngineError(f"benchmark_app printed no throughput: {first_line(ValueError(output[-200:]))}")
    return float(found[1])


def _run(
    python: Path | str, module: str, without: str, cpus: Sequence[int], arguments: Sequence[object]
) -> str:
    command = [str(python), "-c", _RUN, ",".join(map(str, cpus)), without, module, *map(str, arguments)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ended.returncode:
        lines = ended.stdout.strip().splitlines() or ["nothing"]
        raise EngineError(f"{module} ended with exit code {ended.returncode} and printed: {lines[-1]}")
    return ended.stdout


def _row(case: ParityCase) -> str:
    """A row of the table, with the median and in brackets smallest and largest of the rounds."""
    program = {"deepsparse": "deepsparse.benchmark", "openvino": "benchmark_app"}[case.tool]
    words = [program, case.scenario, case.batch, case.streams, _spread(case.theirs), _spread(case.ours)]
    words += [f"{case.ratio:.3f}", "yes" if case.close else "no"]
    return f"| {' | '.join(map(str, words))} |"


def _spread(rates: Sequence[float]) -> str:
    return f"{np.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


if __name__ == "__main__":
    run_command(main)

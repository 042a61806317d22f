"""Every engine, in this process and in one of its own, keeps the promises of the Protocol."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from available import each_engine, needs
from onnx import TensorProto, helper, numpy_helper

from sparse_exp.config.runtimes import RUNTIMES
from sparse_exp.config.schema import ENGINES
from sparse_exp.engines import IsolatedEngine, create_engine, search_space
from sparse_exp.errors import EngineError, MissingDependency
from sparse_exp.hardware.deepsparse import VARIABLE
from sparse_exp.yolov5 import YOLOv5, save_checkpoint

SIZE, CHANNELS, BATCH = 32, 8, 2
ONNX_ENGINES = [name for name in ENGINES if name != "torch"]


class TinyModel:
    """uint8 (N, 3, 32, 32) -> 1/255 -> 3x3 convolution, stride 2 -> sigmoid -> (N, 256, 8)."""

    def __init__(self, path: Path) -> None:
        rng = np.random.default_rng(0)
        self.path = path
        self.weight = rng.normal(size=(CHANNELS, 3, 3, 3)).astype(np.float32)
        self.bias = rng.normal(size=CHANNELS).astype(np.float32)
        onnx.save(self._graph(), path)

    def _graph(self) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["float", "scale"], ["scaled"]),
            helper.make_node("Conv", ["scaled", "weight", "bias"], ["maps"], strides=[2, 2], pads=[1] * 4),
            helper.make_node("Sigmoid", ["maps"], ["scores"]),
            helper.make_node("Reshape", ["scores", "shape"], ["flat"]),
            helper.make_node("Transpose", ["flat"], ["output"], perm=[0, 2, 1]),
        ]
        constants = {
            "scale": np.array(1 / 255, np.float32),
            "weight": self.weight,
            "bias": self.bias,
            "shape": np.array([0, CHANNELS, -1]),
        }
        graph = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, SIZE, SIZE])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", SIZE**2 // 4, CHANNELS])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)

    def reference(self, images: np.ndarray) -> np.ndarray:
        """The same in NumPy and float64, window by window."""
        padded = np.pad(images / 255, ((0, 0), (0, 0), (1, 1), (1, 1)))
        half = SIZE // 2
        maps = np.empty((len(images), CHANNELS, half, half))
        for row in range(half):
            for column in range(half):
                window = padded[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                maps[:, :, row, column] = np.einsum("nchw,ochw->no", window, self.weight) + self.bias
        return (1 / (1 + np.exp(-maps))).reshape(len(images), CHANNELS, -1).transpose(0, 2, 1)


class TinyCheckpoint:
    """YOLOv5n with statistics that matter, as a checkpoint; its own forward pass is the reference."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        self.path, self._model = path, YOLOv5("n", 3).eval()
        for module in self._model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
                torch.nn.init.uniform_(module.weight, 0.5, 1.0)
        state, kind = self._model.state_dict(), {"size": "n", "num_classes": 3, "names": list("abc")}
        more = {"imgsz": SIZE, "recipe": "", "phase": "dense", "epoch": 1, "metrics": {}}
        save_checkpoint(path, model_state=state, **kind, **more)

    @torch.no_grad()
    def reference(self, images: np.ndarray) -> np.ndarray:
        return self._model(torch.from_numpy(images.copy()) / 255)[0].numpy()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("engines") / "tiny.onnx")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> TinyCheckpoint:
    return TinyCheckpoint(tmp_path_factory.mktemp("engines") / "tiny.pt")


# torch in a process of its own takes seconds to import: a test that is marked slow
KINDS = [
    pytest.param((name, kind), marks=needs(name), id=f"{name} {kind}")
    for name in ONNX_ENGINES
    for kind in ("here", "isolated")
]


@pytest.fixture(scope="module", params=[*KINDS, pytest.param(("torch", "here"), id="torch here")])
def loaded(request, model, checkpoint):
    """An engine, loaded for batches of two, and its model; tests leave it loaded."""
    name, kind = request.param
    engine = create_engine(name) if kind == "here" else IsolatedEngine(name)
    own = checkpoint if name == "torch" else model
    engine.load(own.path, batch_size=BATCH, cores=1)
    yield engine, own
    engine.close()


each_isolated = pytest.mark.parametrize(
    "loaded", [kind for kind in KINDS if "isolated" in kind.id], indirect=True
)


@pytest.fixture
def isolated(model):
    """One to break: what is tested with it does not depend on the library."""
    engine = IsolatedEngine("onnxruntime")
    engine.load(model.path, batch_size=BATCH, cores=1)
    yield engine
    engine.close()


def some_images(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8)


def is_one_line(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_output_is_the_reference_for_full_partial_and_several_batches(loaded, count):
    engine, model = loaded
    images = some_images(count)
    outputs = engine.run(images)
    assert len(outputs) == 1
    assert outputs[0].dtype == np.float32
    np.testing.assert_allclose(outputs[0], model.reference(images), rtol=1e-5, atol=1e-5)


def test_outputs_survive_the_next_run(loaded):
    engine, model = loaded
    first = some_images(2, seed=2)
    outputs = engine.run(first)
    engine.run(some_images(2, seed=3))
    np.testing.assert_allclose(outputs[0], model.reference(first), rtol=1e-5, atol=1e-5)


def test_images_need_not_be_contiguous(loaded):
    engine, model = loaded
    images = some_images(4)[::2, :, ::-1]
    np.testing.assert_allclose(engine.run(images)[0], model.reference(images), rtol=1e-5, atol=1e-5)


def test_names_itself_and_its_version(loaded):
    engine, _ = loaded
    assert engine.name in ENGINES
    assert engine.version[0].isdigit()


@pytest.mark.parametrize(
    "images",
    [
        some_images(2).astype(np.float32),
        some_images(2)[0],
        some_images(2)[:, :1],
        some_images(2)[:0],
        some_images(2)[..., :8],
    ],
    ids=["float", "no batch", "grey", "none", "another size"],
)
def test_refuses_other_images_and_stays_usable(loaded, images):
    engine, model = loaded
    with pytest.raises(EngineError, match=r"image|imgsz") as error:
        engine.run(images)
    assert is_one_line(error)
    right = some_images(1)
    np.testing.assert_allclose(engine.run(right)[0], model.reference(right), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", each_engine())
def test_streams_share_an_engine_and_each_gets_its_own_results(name, model, checkpoint):
    own, engine = checkpoint if name == "torch" else model, create_engine(name)
    images = [some_images(1, seed) for seed in range(4)]
    for options in search_space(name, batch_size=1, cores=2, streams=2):
        engine.load(own.path, batch_size=1, cores=2, streams=2, options=options)
        with ThreadPoolExecutor(3) as callers:  # one more than there are streams
            outputs = list(callers.map(engine.run, images * 3))
        for (output,), image in zip(outputs, images * 3, strict=True):
            np.testing.assert_allclose(output, own.reference(image), rtol=1e-4, atol=1e-4)
    engine.close()


@pytest.mark.parametrize("name", each_engine())
def test_the_search_space_is_short_plain_begins_with_the_defaults_and_can_be_loaded(name, model, checkpoint):
    space = search_space(name, batch_size=1, cores=2, streams=1)
    assert space[0] == {}
    assert 2 <= len(space) <= 5
    assert json.loads(json.dumps(space)) == space
    of_two = search_space(name, batch_size=1, cores=2, streams=2)  # loaded in the test above
    own, engine = checkpoint if name == "torch" else model, create_engine(name)
    for options in (options for options in space if options not in of_two):
        engine.load(own.path, batch_size=1, cores=2, options=options)
        images = some_images(1)
        np.testing.assert_allclose(engine.run(images)[0], own.reference(images), rtol=1e-4, atol=1e-4)
    engine.close()


@pytest.mark.parametrize("name", each_engine())
def test_an_unknown_option_and_an_unknown_value_are_refused(name, model, checkpoint):
    own, engine = checkpoint if name == "torch" else model, create_engine(name)
    first = next(iter(engine.choices))
    for options, word in (({"warp": 9}, "warp"), ({first: "sideways"}, "sideways")):
        with pytest.raises(EngineError, match=word) as error:
            engine.load(own.path, batch_size=1, cores=1, options=options)
        assert is_one_line(error)


def test_an_engine_leaves_the_number_of_torchs_threads_as_it_was(checkpoint):
    before, engine = torch.get_num_threads(), create_engine("torch")
    engine.load(checkpoint.path, batch_size=1, cores=before + 3)
    assert torch.get_num_threads() == before + 3
    engine.close()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("content", [b"not a model", b"", None], ids=["text", "empty", "missing"])
@pytest.mark.parametrize("name", each_engine())
def test_refuses_a_file_that_is_no_model_and_names_it(name, content, tmp_path):
    path = tmp_path / ("wrong.pt" if name == "torch" else "wrong.onnx")
    if content is not None:
        path.write_bytes(content)
    engine = create_engine(name)
    with pytest.raises(EngineError, match=r"wrong\.") as error:
        engine.load(path, batch_size=1, cores=1)
    assert is_one_line(error)
    with pytest.raises(EngineError, match="load"):
        engine.run(some_images(1))


@pytest.mark.parametrize("name", each_engine())
def test_refuses_the_kind_of_file_that_is_for_others(name, model, checkpoint):
    other = model if name == "torch" else checkpoint
    with pytest.raises(EngineError, match="ONNX file" if name != "torch" else "checkpoint") as error:
        create_engine(name).load(other.path, batch_size=1, cores=1)
    assert is_one_line(error)


@pytest.mark.parametrize("name", each_engine(*ONNX_ENGINES))
def test_a_model_with_an_operator_that_no_engine_knows_is_refused_in_one_line(name, model, tmp_path):
    graph = onnx.load(model.path)
    graph.graph.node[3].op_type = "Sigmoidal"
    path = tmp_path / "unknown.onnx"
    onnx.save(graph, path)
    with pytest.raises(EngineError, match=f"{name} cannot compile .*Sigmoidal") as error:
        create_engine(name).load(path, batch_size=1, cores=1)
    assert is_one_line(error)


@pytest.mark.parametrize("name", each_engine(*ONNX_ENGINES))
def test_a_file_that_fixes_the_batch_is_filled_up_to_it(name, model, tmp_path):
    graph = onnx.load(model.path)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = BATCH
    path = tmp_path / "fixed.onnx"
    onnx.save(graph, path)
    engine = create_engine(name)
    engine.load(path, batch_size=BATCH, cores=1)
    np.testing.assert_allclose(engine.run(some_images(3))[0], model.reference(some_images(3)), atol=1e-5)
    engine.close()


def test_openvino_opens_its_own_format_and_checks_it(model, tmp_path):
    import openvino

    path, network = tmp_path / "tiny.xml", openvino.Core().read_model(model.path)
    openvino.save_model(network, path, compress_to_fp16=False)
    engine = create_engine("openvino")
    engine.load(path, batch_size=BATCH, cores=1)
    images = some_images(3)
    np.testing.assert_allclose(engine.run(images)[0], model.reference(images), atol=1e-5)
    with pytest.raises(EngineError, match="wide"):
        engine.run(images[..., :8])
    engine.close()
    network.reshape([1, 3, SIZE, -1])
    openvino.save_model(network, path, compress_to_fp16=False)
    with pytest.raises(EngineError, match="one size"):
        engine.load(path, batch_size=1, cores=1)


def test_an_isolated_refusal_is_the_same_and_leaves_no_child(tmp_path):
    path = tmp_path / "wrong.onnx"
    path.write_text("not a model")
    engine = IsolatedEngine("onnxruntime")
    with pytest.raises(EngineError, match=r"wrong\.onnx") as error:
        engine.load(path, batch_size=1, cores=1)
    assert is_one_line(error)
    assert engine.pid is None


@pytest.mark.parametrize("make", [create_engine, IsolatedEngine])
@pytest.mark.parametrize("name", each_engine())
def test_use_without_load_and_after_close_is_refused(make, name, model):
    engine = make(name)
    engine.close()
    with pytest.raises(EngineError, match="load"):
        engine.run(some_images(1))
    if name == "onnxruntime":  # the fast one stands for all: closing is shared
        engine.load(model.path, batch_size=1, cores=1)
        engine.close()
        engine.close()
        with pytest.raises(EngineError, match="load"):
            engine.run(some_images(1))


@pytest.mark.parametrize("make", [create_engine, IsolatedEngine])
def test_can_be_loaded_again_for_another_batch(make, model):
    engine = make("openvino")
    for batch_size in (1, 3):
        engine.load(model.path, batch_size=batch_size, cores=1)
        np.testing.assert_allclose(engine.run(some_images(3))[0], model.reference(some_images(3)), atol=1e-5)
    engine.close()


def test_unknown_engine_is_refused():
    with pytest.raises(EngineError, match="deepsparse, onnxruntime, openvino, mnn, torch"):
        create_engine("tensorrt")


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "deepsparse"])
def test_a_library_that_is_not_installed_is_named_with_what_to_install(name, model, checkpoint, monkeypatch):
    own = checkpoint if name == "torch" else model
    package = RUNTIMES[name].module or name
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=f"pip install '{package}[>=]=") as error:
        create_engine(name).load(own.path, batch_size=1, cores=1)
    assert is_one_line(error)


@pytest.mark.parametrize("make", [create_engine, IsolatedEngine])
def test_without_deepsparse_its_absence_is_told_with_what_to_do(make, model, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "python"))
    engine = make("deepsparse")
    with pytest.raises(
        MissingDependency, match=r"deepsparse.*no program.*hardware\.deepsparse_python"
    ) as error:
        engine.load(model.path, batch_size=1, cores=1)
    assert is_one_line(error)
    assert engine.pid is None


def test_deepsparse_on_a_cpu_without_avx2_is_refused(model, monkeypatch):
    def import_fails(self):
        raise OSError("Unable to determine instruction set 'sse4'")

    monkeypatch.setattr("sparse_exp.engines.deepsparse.DeepSparseEngine._library", import_fails)
    with pytest.raises(EngineError, match="AVX2"):
        create_engine("deepsparse").load(model.path, batch_size=1, cores=1)


@pytest.mark.parametrize("name", each_engine())
def test_loading_prints_nothing(name, model, checkpoint, capfd):
    engine = create_engine(name)
    engine.load((checkpoint if name == "torch" else model).path, batch_size=1, cores=1)
    engine.run(some_images(1))
    engine.close()
    assert capfd.readouterr() == ("", "")


def test_measure_times_each_batch(loaded):
    engine, _ = loaded
    before = time.perf_counter()
    timing = engine.measure(some_images(3), 0.05, warmup=0.01)
    elapsed = time.perf_counter() - before
    assert min(timing.latencies) > 0
    assert 0.05 <= timing.wall < elapsed
    assert timing.warmed >= 0.01
    assert sum(timing.latencies[:-1]) < 0.05  # nothing is started after the time is over ...
    assert sum(timing.latencies) <= timing.wall  # ... and nothing is counted twice
    assert len(engine.measure(some_images(1), 1e-9).latencies) == 1


def test_measure_refuses_other_images(loaded):
    with pytest.raises(EngineError, match="image"):
        loaded[0].measure(some_images(2).astype(np.float32), 0.01)


@each_isolated
def test_the_peak_of_memory_is_that_of_the_child(loaded):
    engine, _ = loaded
    resident = [
        line for line in Path(f"/proc/{engine.pid}/status").read_text().splitlines() if "VmRSS" in line
    ]
    now = int(resident[0].split()[1]) * 1024 / 1e6
    assert now <= engine.peak_rss_mb() < 2 * now + 50
    big = np.zeros((20_000, 3, SIZE, SIZE), np.uint8)  # 61 MB, which travel to the child
    before = engine.peak_rss_mb()
    engine.measure(big, 1e-9)
    assert engine.peak_rss_mb() > before + 50


def test_the_peak_of_memory_is_not_the_parents():
    ballast = np.ones(60_000_000)  # 480 MB: a child begins as its parent, and ru_maxrss keeps that
    engine = IsolatedEngine("onnxruntime")
    engine._start("")
    assert ballast[0] == 1
    assert engine.peak_rss_mb() < 300
    engine.close()


KINDS_OF_LAYERS = {
    "deepsparse": "tile|conv",
    "onnxruntime": "Conv",
    "openvino": "Convolution",
    "torch": "conv",
}


@pytest.mark.parametrize("name", each_engine(*KINDS_OF_LAYERS))
def test_a_profile_has_the_layers_of_the_model_with_their_times(name, model, checkpoint):
    engine = create_engine(name)
    engine.load((checkpoint if name == "torch" else model).path, batch_size=BATCH, cores=1)
    profile = engine.profile(some_images(3))
    engine.close()
    assert any(re.search(KINDS_OF_LAYERS[name], layer.kind) for layer in profile.layers)
    assert all(layer.ms >= 0 and layer.name for layer in profile.layers)
    assert sum(layer.ms for layer in profile.layers) > 0
    assert profile.supported == (1.0 if name == "deepsparse" else None)
    assert profile.note


@needs("mnn")
def test_an_engine_without_a_profiler_says_so(model):
    engine = create_engine("mnn")
    engine.load(model.path, batch_size=BATCH, cores=1)
    with pytest.raises(EngineError, match="mnn has no profiler") as error:
        engine.profile(some_images(1))
    assert is_one_line(error)


def test_an_isolated_profile_comes_from_the_child(isolated):
    profile = isolated.profile(some_images(1))
    assert "Conv" in [layer.kind for layer in profile.layers]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("name", each_engine(*ONNX_ENGINES))
def test_a_pinned_child_and_all_its_threads_keep_to_their_cpu(name, model):
    cpu = max(os.sched_getaffinity(0))
    engine = IsolatedEngine(name)
    engine.load(model.path, batch_size=BATCH, cores=1, pin=[cpu])
    engine.run(some_images(2))
    threads = [int(task.name) for task in Path(f"/proc/{engine.pid}/task").iterdir()]
    assert {frozenset(os.sched_getaffinity(thread)) for thread in threads} == {frozenset({cpu})}
    engine.close()


@pytest.mark.parametrize("pin", [[], [4096]])
def test_cpus_that_this_process_may_not_use_are_refused(model, pin):
    engine = IsolatedEngine("onnxruntime")
    with pytest.raises(EngineError, match="CPUs") as error:
        engine.load(model.path, batch_size=1, cores=1, pin=pin)
    assert is_one_line(error)
    assert engine.pid is None


def test_questions_of_several_threads_to_one_child_do_not_mix(isolated, model):
    images = [some_images(1, seed) for seed in range(20)]
    with ThreadPoolExecutor(4) as callers:
        outputs = list(callers.map(isolated.run, images))
    for (output,), image in zip(outputs, images, strict=True):
        np.testing.assert_allclose(output, model.reference(image), atol=1e-5)


@pytest.mark.slow
def test_torch_runs_in_a_process_of_its_own(checkpoint):
    engine = IsolatedEngine("torch")
    engine.load(checkpoint.path, batch_size=BATCH, cores=2, streams=2, options={"frozen": True})
    images = some_images(3)
    np.testing.assert_allclose(engine.run(images)[0], checkpoint.reference(images), rtol=1e-4, atol=1e-4)
    timing = engine.measure(images, 0.2, warmup=0.1, max_warmup=5.0, streams=2)
    assert len(timing.latencies) >= 2
    assert timing.wall < sum(timing.latencies)  # two at a time
    engine.close()


def test_a_killed_child_is_an_error_and_not_a_hang(isolated):
    os.kill(isolated.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"onnxruntime died .signal 9") as error:
        isolated.run(some_images(1))
    assert is_one_line(error)
    with pytest.raises(EngineError, match="load"):
        isolated.run(some_images(1))


def test_a_child_killed_while_it_measures_is_an_error_and_not_a_hang(isolated):
    threading.Timer(0.3, os.kill, (isolated.pid, signal.SIGKILL)).start()
    with pytest.raises(EngineError, match="died"):
        isolated.measure(some_images(1), 60)


@pytest.fixture
def interruptible():
    """Ctrl-C counts, here and in children, even where the tests were started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_child_and_not_just_the_question(model):
    engine = IsolatedEngine("onnxruntime")
    engine.load(model.path, batch_size=1, cores=1)
    pid = engine.pid
    main = threading.main_thread().ident
    threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        engine.measure(some_images(1), 60)
    assert not Path(f"/proc/{pid}").exists()


def test_close_ends_the_child(isolated):
    pid = isolated.pid
    isolated.close()
    assert not Path(f"/proc/{pid}").exists()


def modules_of(pid: int) -> set[str]:
    """The site packages whose native code a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split("site-packages/")[1].split("/")[0] for line in lines if "site-packages/" in line}


@each_isolated
def test_the_child_loads_no_more_than_its_engine_needs(loaded):
    engine, _ = loaded
    packages = modules_of(engine.pid)
    assert "numpy" in packages
    assert "torch" not in packages
    # The parent checks the file. DeepSparse imports onnx itself.
    assert ("onnx" in packages) == (engine.name == "deepsparse")


def test_openvino_leaves_no_trace_of_its_telemetry(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    engine = IsolatedEngine("openvino")
    engine.load(model.path, batch_size=1, cores=1)
    engine.close()
    assert list(tmp_path.iterdir()) == []


# No guard against a second import of the main module; waits for its end in the middle of a measurement.
SCRIPT = """
import sys
import numpy as np
from sparse_exp.engines import IsolatedEngine
engine = IsolatedEngine("onnxruntime")
engine.load(sys.argv[1], batch_size=1, cores=1)
print(engine.pid, flush=True)
engine.measure(np.zeros((1, 3, 32, 32), np.uint8), 60)
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_the_child_of_a_script_ends_with_it_and_prints_nothing(end, model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(script), str(model.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    ) as parent:
        child = int(parent.stdout.readline())
        time.sleep(0.2)
        if end == signal.SIGINT:
            os.killpg(parent.pid, end)  # as a terminal does: to the child, too
        else:
            parent.kill()
        _, errors = parent.communicate(timeout=20)
    assert errors.count("Traceback") == (1 if end == signal.SIGINT else 0)  # the script's own
    assert gone(child)


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    for _ in range(200):
        status = Path(f"/proc/{pid}/stat")
        try:
            if status.read_text().rsplit(")", 1)[1].split()[0] == "Z":  # dead, and nobody's to reap
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False
